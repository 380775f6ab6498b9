"""Every path of this machine that computes a pass gives the reference's output and LSE."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farspan.engine_ext.config import BlockSparsePrefill, DensePrefill, FlexPrefill, parse_config
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.impl import FarspanImpl
from farspan.engine_ext.launch import attend, choose_dense_kernel, fa3_refusal
from farspan.engine_ext.pass_maker import PassMaker
from farspan.engine_ext.passes import Decode, LayerContext, Part, Pass, StepMetadata
from farspan.engine_ext.selection.methods import FlexSelector
from farspan.engine_ext.splits import num_multiprocessors
from farspan.kernels.batch import KVView, PagedBatch

from tests.kernels.helpers import Inputs, assert_attention_close, make_batch, poisoned_like, reference_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = ["cpu"] if DEVICE.type == "cpu" else ["triton", "fa3"]
DTYPE = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
LAYER = LayerContext(index=0, next_index=None, turn=None, selector=FlexSelector())


def maker(kernel: Any) -> PassMaker:
    return PassMaker(2, kernel, num_multiprocessors(DEVICE), None, False, DEVICE)


def run(inputs: Inputs, each: Pass, kv_heads: slice = slice(0, 2)) -> tuple[torch.Tensor, torch.Tensor]:
    group = inputs.query.shape[1] // 2
    heads = slice(kv_heads.start * group, kv_heads.stop * group)
    out = poisoned_like(inputs.query)[:, heads]
    lse = attend(each, inputs.query[:, heads], inputs.kv.of_heads(kv_heads), LAYER, inputs.scale, out)
    return out, lse


def prefill_pass(inputs: Inputs, prefill: Any, kernel: Any) -> Pass:
    starts, lens = inputs.query_start_loc.tolist(), inputs.seq_lens.tolist()
    return maker(kernel).prefill(prefill, inputs.paged, starts, lens, 0, turns=False)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "prefill",
    [DensePrefill(), FlexPrefill(gamma=1.0), BlockSparsePrefill(local_blocks=16)],
    ids=["dense", "flex", "block-sparse"],
)
@pytest.mark.parametrize("kv_heads", [slice(0, 2), slice(1, 2)], ids=["all-heads", "one-head"])
def test_prefill(prefill: Any, kernel: str, kv_heads: slice) -> None:
    inputs = make_batch([7, 130], [7, 200], page_size=128, head_dim=128, dtype=DTYPE, device=DEVICE)
    if kernel == "fa3":
        # FlashAttention 3 multiplies values past a request's end by zero; vLLM's caches hold no NaN.
        inputs.kv_cache.nan_to_num_(0.0)
    out, lse = run(inputs, prefill_pass(inputs, prefill, kernel), kv_heads)
    expected_out, expected_lse = reference_attention(inputs)
    heads = slice(2 * kv_heads.start, 2 * kv_heads.stop)
    assert_attention_close(out, lse, expected_out[:, heads], expected_lse[heads], DTYPE)


@pytest.mark.parametrize("max_kv_len", [200, 230, 1000])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_fa3_reads_adjacent_pages_as_one_row_of_tokens(
    monkeypatch: pytest.MonkeyPatch, is_causal: bool, max_kv_len: int
) -> None:
    """Pages staged for a chunk, in a buffer that holds more; the second of two KV heads."""
    inputs = make_batch([130], [200], head_dim=128, dtype=DTYPE, device=DEVICE)
    buffer = torch.zeros(2, 20, 16, 256, dtype=DTYPE, device=DEVICE)
    buffer[:, :13] = inputs.kv_cache[inputs.block_table[0, :13].long()].nan_to_num(0.0).transpose(0, 1)

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, **arguments: Any) -> Any:
        """What FlashAttention 3 does, in PyTorch."""
        assert arguments["block_table"] is None
        num_keys = int(arguments["seqused_k"])
        # FlashAttention 3 refuses others.
        assert k.shape == v.shape == (1, arguments["max_seqlen_k"], 1, 128)
        keys, values = k[0, :num_keys, 0].float(), v[0, :num_keys, 0].float()
        logits = torch.einsum("nhd,kd->hnk", q.float(), keys) * arguments["softmax_scale"]
        if arguments["causal"]:
            positions = torch.arange(num_keys - len(q), num_keys, device=q.device)
            logits.masked_fill_(torch.arange(num_keys, device=q.device) > positions[:, None], float("-inf"))
        out.copy_(torch.einsum("hnk,kd->nhd", logits.softmax(-1), values))
        return out, logits.logsumexp(-1)

    arguments = {"seqused_k": inputs.seq_lens, "softmax_scale": inputs.scale, "causal": is_causal, "block_table": None}
    arguments["max_seqlen_k"] = 320
    query = inputs.query[:, 2:]
    expected, (keys, values) = torch.empty_like(query), buffer[1].flatten(0, 1).split(128, -1)
    _, expected_lse = attention(query, keys[None, :, None], values[None, :, None], expected, **arguments)
    if DEVICE.type == "cpu":
        module = SimpleNamespace(flash_attn_varlen_func=attention)
        monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", module)
    view = KVView(buffer.transpose(0, 1), are_adjacent=True)
    assert view.tokens(200)[0].data_ptr() == buffer.data_ptr(), "a copy"
    out = poisoned_like(inputs.query)[:, 2:]
    # Another request of the step may be longer than the buffer.
    each = prefill_pass(inputs, DensePrefill(), "fa3")
    each = replace(each, is_causal=is_causal, batch=replace(each.batch, max_kv_len=max_kv_len))
    lse = attend(each, query, view.of_heads(slice(1, 2)), LAYER, inputs.scale, out)
    assert_attention_close(out, lse, expected, expected_lse, DTYPE)


def test_decode() -> None:
    inputs = make_batch([1, 1, 1], [5, 63, 150], dtype=DTYPE, device=DEVICE)
    each = maker(KERNELS[0]).decode(inputs.paged)
    assert isinstance(each.work, Decode)
    assert_attention_close(*run(inputs, each), *reference_attention(inputs), DTYPE)


@pytest.mark.parametrize("kernel", [kernel for kernel in KERNELS if kernel != "fa3"])
def test_partial_passes_are_the_whole(kernel: str) -> None:
    """The keys are cut in two: queries see all keys of the first part, and those of the second causally."""
    inputs = make_batch([100], [356], page_size=128, head_dim=128, dtype=DTYPE, device=DEVICE)
    cut = 256
    whole = prefill_pass(inputs, DensePrefill(), kernel)
    first = replace(
        whole,
        batch=replace(
            whole.batch,
            kv_lens=torch.full_like(inputs.seq_lens, cut),
            first_pos=torch.full_like(inputs.seq_lens, cut),
        ),
        is_causal=False,
        part=Part(0, 2),
    )
    rest = inputs.seq_lens - cut
    second = maker(kernel).prefill(
        DensePrefill(),
        PagedBatch(inputs.query_start_loc, rest, inputs.block_table[:, cut // 128 :], 100, 100),
        [0, 100],
        [100],
        0,
        turns=False,
    )
    second = replace(second, part=Part(1, 2))
    output = poisoned_like(inputs.query)
    forward(inputs, (first, second), output)
    expected, expected_lse = reference_attention(inputs)
    assert_attention_close(output, expected_lse, expected, expected_lse, DTYPE)


def test_passes_over_parts_of_the_heads_fill_the_output() -> None:
    inputs = make_batch([70, 9], [300, 9], dtype=DTYPE, device=DEVICE)
    whole = prefill_pass(inputs, DensePrefill(), KERNELS[0])
    passes = tuple(replace(whole, kv_heads=slice(head, head + 1)) for head in range(2))
    output = poisoned_like(inputs.query)
    forward(inputs, passes, output)
    expected, expected_lse = reference_attention(inputs)
    assert_attention_close(output, expected_lse, expected, expected_lse, DTYPE)


def forward(inputs: Inputs, passes: tuple[Pass, ...], output: torch.Tensor) -> None:
    """The loop of `FarspanImpl.forward`, without an engine."""
    impl: Any = object.__new__(FarspanImpl)
    impl.num_heads, impl.num_kv_heads, impl.scale = inputs.query.shape[1], 2, inputs.scale
    layer: Any = type("Attention", (), {"layer_name": "layer"})()
    step = StepMetadata(passes, {"layer": LAYER})
    FarspanImpl.forward(impl, layer, inputs.query, inputs.key, inputs.value, inputs.kv_cache, step, output)


def test_a_view_of_some_heads_keeps_the_layers_numbers() -> None:
    view = KVView(torch.zeros(3, 4, 16, 128), first_kv_head=2)
    part = view.of_heads(slice(3, 5))
    assert part.first_kv_head == 3
    assert part.pages.shape == (3, 2, 16, 128)
    with pytest.raises(AssertionError):
        view.of_heads(slice(0, 3))


def test_kernel_choice_on_a_gpu() -> None:
    device = torch.device("cuda")
    assert choose_dense_kernel(parse_config({"kernel": "triton"}), device, 128, torch.bfloat16) == "triton"
    assert choose_dense_kernel(parse_config(None), device, 128, torch.float32) == "triton"
    assert "float16 and bfloat16, not float32" in str(fa3_refusal(128, torch.float32))
    assert "head sizes up to 256, not 512" in str(fa3_refusal(512, torch.bfloat16))
    with pytest.raises(ConfigError, match="kernel='fa3'; FlashAttention 3 supports float16 and bfloat16"):
        choose_dense_kernel(parse_config({"kernel": "fa3"}), device, 128, torch.float32)
