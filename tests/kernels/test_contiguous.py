"""`farspan.kernels.attention` against float32 attention with a mask."""

import os
import subprocess
import sys

import farspan.kernels
import pytest
import torch
from farspan.kernels import PATTERNS, attention, attention_tiles, reference, static_block_lists

from tests.kernels.helpers import assert_attention_close

DTYPES = [torch.float32, torch.float16]


def draw(batch, query_len, kv_len, heads, kv_heads, head_dim, dtype, device):
    """Random q, k, v."""
    q = torch.randn(batch, query_len, heads, head_dim).to(device, dtype)
    k, v = (torch.randn(batch, kv_len, kv_heads, head_dim).to(device, dtype) for _ in range(2))
    return q, k, v


def expected(q, k, v, *, visible=None, lengths=None, causal=False, scale=None):
    """The reference, sequence by sequence. visible: [batch, heads, kv_len, kv_len] bool, by position, or None."""
    batch, query_len, heads, head_dim = q.shape
    kv_len = k.shape[1]
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full((batch, heads, query_len), float("-inf"), device=q.device)
    position = torch.arange(kv_len, device=q.device)
    query_position = position[kv_len - query_len :]
    for b in range(batch):
        length = kv_len if lengths is None else int(lengths[b])
        mask = (position < length) & (query_position < length)[:, None]
        if causal:
            mask = mask & (position <= query_position[:, None])
        mask = mask.expand(heads, -1, -1)
        if visible is not None:
            mask = mask & visible[b][:, query_position]
        out[b], lse[b] = reference.attend(
            q[b].float().nan_to_num(),
            k[b].float().nan_to_num(),
            v[b].float().nan_to_num(),
            scale or head_dim**-0.5,
            mask,
        )
    return out, lse


def by_position(block_mask, block_size, length, heads):
    """Expand a mask […, list heads, blocks, blocks] to […, heads, length, length]."""
    mask = block_mask.repeat_interleave(heads // block_mask.shape[-3], dim=-3)
    return mask.repeat_interleave(block_size, -1).repeat_interleave(block_size, -2)[..., :length, :length]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    ("batch", "query_len", "kv_len", "heads", "kv_heads", "head_dim"),
    [
        pytest.param(1, 1, 1, 1, 1, 64, id="b1-q1-kv1-gqa1-d64"),
        pytest.param(2, 63, 63, 4, 2, 64, id="b2-q63-kv63-gqa2-d64"),
        pytest.param(2, 129, 129, 2, 2, 128, id="b2-q129-kv129-gqa1-d128"),
        pytest.param(1, 65, 300, 7, 1, 64, id="b1-q65-kv300-gqa7-d64"),
        pytest.param(1, 1, 1000, 2, 1, 128, id="b1-q1-kv1000-gqa2-d128"),
    ],
)
def test_dense(batch, query_len, kv_len, heads, kv_heads, head_dim, causal, dtype, device):
    q, k, v = draw(batch, query_len, kv_len, heads, kv_heads, head_dim, dtype, device)
    out, lse = attention(q, k, v, causal=causal, return_lse=True)
    assert_attention_close(out, lse, *expected(q, k, v, causal=causal), dtype)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    ("query_len", "listed", "dtype"),
    [(257, False, torch.float32), (70, False, torch.float32), (257, True, torch.float16), (70, True, torch.float16)],
    ids=["q257-dense-fp32", "q70-dense-fp32", "q257-lists-fp16", "q70-lists-fp16"],
)
def test_padding(query_len, listed, dtype, causal, device):
    q, k, v = draw(5, query_len, 257, 2, 1, 64, dtype, device)
    lengths = torch.tensor([257, 256, 200, 1, 0], device=device)
    for b, length in enumerate(lengths.tolist()):
        k[b, length:] = v[b, length:] = float("nan")
    mask = torch.ones(attention_tiles(1, query_len, 257, device=device).num_tiles, 3, dtype=torch.bool, device=device)
    out, lse = attention(q, k, v, lengths=lengths, causal=causal, return_lse=True, block_mask=mask if listed else None)
    assert_attention_close(out, lse, *expected(q, k, v, lengths=lengths, causal=causal), dtype)


WHOLE = (False, torch.float32, "whole-lists")
MASKED = (True, torch.float32, "lengths-mask")
MASKED_FP16 = (True, torch.float16, "lengths-mask-fp16")


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize(
    ("query_len", "kv_len", "block_size", "pattern", "masked", "dtype"),
    [
        # The kernels see lists alone: each pattern once a shape, and each way to give lists at each shape. What a
        # pattern lists, its own tests say. A case at 500 takes a quarter of a minute.
        pytest.param(*lens, size, pattern, *how, id=f"q{lens[0]}-kv{lens[1]}-block{size}-{pattern}-{name}")
        for lens, size, hows in (
            ((321, 321), 64, (WHOLE, MASKED, MASKED_FP16, WHOLE)),
            ((70, 500), 64, (MASKED, MASKED_FP16, WHOLE, MASKED)),
            ((500, 500), 128, (WHOLE, MASKED_FP16)),
        )
        for pattern, (*how, name) in zip(PATTERNS, hows, strict=False)
    ],
)
def test_patterns(query_len, kv_len, block_size, pattern, causal, masked, dtype, device):
    batch, heads = 2, 2
    q, k, v = draw(batch, query_len, kv_len, heads, 1, 64, dtype, device)
    blocks = -(-kv_len // block_size)
    options = {"sink_blocks": 1, "local_blocks": 2, "stride": 3, "causal": causal}
    num_kv_blocks = torch.full((2 * batch,), blocks, dtype=torch.int32, device=device)
    whole = attention_tiles(1, kv_len, kv_len, block_size, device=device)
    rows = static_block_lists(whole, pattern, **options, num_kv_blocks=num_kv_blocks)
    mask = torch.zeros(1, blocks, blocks, dtype=torch.bool, device=device)
    for row in range(blocks):
        mask[0, row, rows.block_ids[0, row, : rows.block_counts[0, row]].long()] = True
    lengths = torch.tensor([kv_len - 20, kv_len // 2], device=device) if masked else None
    visible = by_position(mask, block_size, kv_len, heads).expand(batch, -1, -1, -1)
    result = expected(q, k, v, visible=visible, lengths=lengths, causal=causal)

    tiles = attention_tiles(batch, query_len, kv_len, block_size, device=device)
    lists = static_block_lists(tiles, pattern, **options, num_kv_blocks=num_kv_blocks)
    block_mask = mask[:, tiles.tile_block[: tiles.num_tiles // batch].long()] if masked else lists
    out, lse = attention(
        q, k, v, block_mask=block_mask, lengths=lengths, causal=causal, block_size=block_size, return_lse=True
    )
    assert_attention_close(out, lse, *result, dtype)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("shape", [(), (1,), (2,), (4,), (1, 2), (3, 1), (3, 4)], ids=str)
def test_boolean_masks(shape, causal, device):
    q, k, v = draw(3, 200, 200, 4, 2, 64, torch.float16, device)
    mask = (torch.rand(*shape, 4, 4) < 0.4) | torch.eye(4, dtype=torch.bool)
    mask = mask.to(device)
    visible = by_position(mask[(None,) * (5 - mask.ndim)][0], 64, 200, 4).expand(3, -1, -1, -1)
    out, lse = attention(q, k, v, block_mask=mask, causal=causal, block_size=64, return_lse=True)
    assert_attention_close(out, lse, *expected(q, k, v, visible=visible, causal=causal), torch.float16)


def test_a_full_mask_is_dense(device):
    q, k, v = draw(2, 150, 150, 2, 2, 64, torch.float32, device)
    full = torch.ones(3, 3, dtype=torch.bool, device=device)
    torch.testing.assert_close(attention(q, k, v, block_mask=full, block_size=64), attention(q, k, v, block_size=64))


def test_lists_of_one_sequence_serve_the_batch(device):
    q, k, v = draw(2, 150, 150, 2, 2, 64, torch.float32, device)
    options = {"local_blocks": 2, "sink_blocks": 0}
    results = [
        attention(
            q,
            k,
            v,
            causal=True,
            block_size=64,
            block_mask=static_block_lists(attention_tiles(batch, 150, 150, 64, device=device), "sink_local", **options),
        )
        for batch in (1, 2)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=["paged-kernel", "short-lists"])
def test_the_lse_changes_nothing(dtype, device):
    q, k, v = draw(2, 150, 150, 2, 2, 64, dtype, device)
    mask = torch.eye(3, dtype=torch.bool, device=device)
    out, _ = attention(q, k, v, block_mask=mask, block_size=64, return_lse=True)
    torch.testing.assert_close(attention(q, k, v, block_mask=mask, block_size=64), out, rtol=0, atol=0)


def test_strided_inputs_and_scale(device):
    q, k, v = draw(2, 4, 100, 100, 100, 64, torch.float32, device)
    q, k, v = (tensor[..., :70, :].transpose(1, 2) for tensor in (q[:, :4], k[:, :4], v[:, :4]))
    out, lse = attention(q, k, v.contiguous(), scale=0.3, return_lse=True)
    assert_attention_close(out, lse, *expected(q, k, v, scale=0.3), torch.float32)


@pytest.mark.parametrize("shape", [(0, 5, 2, 64), (2, 0, 2, 64)], ids=["no-sequences", "no-queries"])
def test_nothing_to_do(shape, device):
    q, k = torch.ones(shape, device=device), torch.ones(shape[0], 5, 2, 64, device=device)
    out, lse = attention(q, k, k, return_lse=True)
    assert out.shape == shape
    assert lse.shape == (shape[0], 2, shape[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 9, 4, 64)}, "at least as many keys as queries"),
        ({"q": torch.ones(2, 8, 3, 64)}, "heads be a multiple of kv_heads"),
        ({"q": torch.ones(2, 8, 64)}, r"must be \[batch, length, heads, head_dim\]"),
        ({"q": torch.ones(2, 8, 4, 64).half()}, "dtypes"),
        ({"q": torch.ones(2, 8, 4, 128)[..., ::2]}, "must be contiguous"),
        ({"lengths": torch.ones(3, dtype=torch.int32)}, r"int32 or int64 \[2\]"),
        ({"lengths": torch.ones(2)}, "lengths"),
        ({"scale": 0.0}, "above 0"),
        ({"block_size": 32}, "64 or 128"),
        ({"block_mask": torch.ones(2, 2, dtype=torch.bool)}, "1 rows and 1 columns of 128 tokens"),
        ({"block_mask": torch.ones(3, 1, 1, dtype=torch.bool)}, "3 heads"),
        ({"block_mask": torch.zeros(1, 1, dtype=torch.bool)}, "does not see"),
    ],
    ids=[
        "longer",
        "heads",
        "dims",
        "dtype",
        "strides",
        "lengths",
        "float-lengths",
        "scale",
        "block",
        "mask",
        "h",
        "empty",
    ],
)
def test_bad_arguments_are_refused(change, message):
    arguments = {"q": torch.ones(2, 8, 4, 64), "k": torch.ones(2, 8, 2, 64), "v": torch.ones(2, 8, 2, 64)} | change
    with pytest.raises(ValueError, match=message):
        attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_public_names():
    for name in farspan.kernels.__all__:
        assert getattr(farspan.kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = farspan.kernels.nothing


def test_a_cpu_without_the_interpreter_is_refused_with_a_sentence() -> None:
    code = (
        "import torch\nfrom farspan.kernels import attention\nq = torch.zeros(1, 4, 2, 64)\n"
        "try:\n    attention(q, q, q)\nexcept ValueError as error:\n    print(error)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("device cpu; these kernels run on CUDA devices.")
