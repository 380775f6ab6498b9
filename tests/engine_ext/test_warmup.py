"""What runs at start compiles every kernel that requests can reach, by Triton's rule of when to compile anew."""

import random
from typing import Any

import pytest
import torch
import triton.language as tl
from farspan.engine_ext import launch
from farspan.engine_ext.config import BlockSparsePrefill, DensePrefill, FlexPrefill, Prefill
from farspan.engine_ext.launch import attend, write_kv
from farspan.engine_ext.pass_maker import PassMaker, effective_prefill
from farspan.engine_ext.passes import LayerContext
from farspan.engine_ext.selection.crossover import AttentionSize
from farspan.engine_ext.selection.methods import FlexSelector
from farspan.engine_ext.splits import most_parts
from farspan.engine_ext.warmup import WarmUp, warm_up_cases
from farspan.kernels.batch import FP8, KVView, PagedBatch
from farspan.kernels.decode import make_decode_workspace
from farspan.kernels.rotary_turn import Turn, make_string_turn
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts launches in place of Triton's interpreter")

DEVICE = torch.device("cpu")
NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
MAX_MODEL_LEN, MAX_CHUNK_LEN, MAX_DECODE_LEN, MAX_NUM_REQS, NUM_SMS = 20_000, 2048, 7, 2, 40
SIZE = AttentionSize(NUM_Q_HEADS, HEAD_DIM)
Kernel = tuple[Any, ...]


def is_another_kernel_by(value: Any, name: str, options: dict[str, Any]) -> Any:
    """What Triton looks at in an argument when it decides whether a kernel is compiled already."""
    if isinstance(value, torch.Tensor):
        if name in (options.get("do_not_specialize_on_alignment") or ()):
            return value.dtype
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, TensorDescriptor):
        return "descriptor", value.base.dtype, tuple(value.block_shape)
    if isinstance(value, bool) or not isinstance(value, int):
        return type(value)
    if name in (options.get("do_not_specialize") or ()):
        return int
    return (value == 1, value % 16 == 0, value >= 2**31)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[Kernel]:
    """The kernels that Triton would have compiled by now; none of them runs."""
    found: set[Kernel] = set()

    def note(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False)) | kwargs
        key = []
        for name, value in values.items():
            is_constant = name not in self.arg_names or self.fn.__annotations__.get(name) in (
                tl.constexpr,
                "tl.constexpr",
            )
            key.append((name, value if is_constant else is_another_kernel_by(value, name, self.kwargs)))
        found.add((self.__name__, *key))

    monkeypatch.setattr(InterpretedFunction, "run", note)
    monkeypatch.setattr(launch, "is_on_host", lambda tensor: False)
    return found


def make_maker(kernel: Any, *, has_turn: bool) -> PassMaker:
    parts = most_parts(MAX_NUM_REQS, NUM_KV_HEADS, MAX_MODEL_LEN, NUM_SMS)
    workspace = make_decode_workspace(parts * NUM_Q_HEADS * MAX_DECODE_LEN, HEAD_DIM, DEVICE)
    return PassMaker(NUM_KV_HEADS, kernel, NUM_SMS, workspace, has_turn, DEVICE)


def make_pages(page_size: int) -> torch.Tensor:
    return torch.zeros(2, NUM_KV_HEADS, page_size, 2 * HEAD_DIM, dtype=torch.bfloat16)


def run_requests(maker: PassMaker, prefill: Prefill, turn: Turn | None, view: KVView, layer: LayerContext) -> None:
    """A random batch as the builder cuts it: a decode pass and a pass of requests that prefill alike."""
    width = -(-MAX_MODEL_LEN // 128) * 128 // view.page_size
    scales = {"key_scale": view.key_scale, "value_scale": view.value_scale}

    def batch_of(query_lens: list[int], kv_lens: list[int]) -> PagedBatch:
        starts = torch.tensor([0, *query_lens]).cumsum(0).int()
        table = torch.zeros(len(kv_lens), width, dtype=torch.int32)
        return PagedBatch(starts, torch.tensor(kv_lens).int(), table, max(query_lens), max(kv_lens))

    def run(each: Any, num_tokens: int) -> None:
        fused = torch.zeros(num_tokens, (NUM_Q_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, dtype=torch.bfloat16)
        parts = fused.split([NUM_Q_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM], dim=1)
        query, key, value = (part.unflatten(1, (-1, HEAD_DIM)) for part in parts)
        write_kv(key, value, view.pages, torch.zeros(num_tokens, dtype=torch.int64), **scales)
        attend(each, query, view, layer, 0.125, torch.empty_like(query))

    num_decodes = random.randint(1, MAX_NUM_REQS)
    lens = [random.randint(MAX_DECODE_LEN, MAX_MODEL_LEN) for _ in range(num_decodes)]
    run(maker.decode(batch_of([1] * num_decodes, lens)), num_decodes)
    most = random.randint(1, MAX_DECODE_LEN)
    query_lens = [random.randint(1, most) for _ in range(num_decodes)]
    run(maker.decode(batch_of(query_lens, lens), num_rows=sum(query_lens)), sum(query_lens))

    most = random.choice([3, 20, 130, MAX_CHUNK_LEN])
    query_lens = [random.randint(1, most) for _ in range(random.randint(1, 3))]
    kv_lens = [random.randint(query_len, MAX_MODEL_LEN) for query_len in query_lens]
    alike = effective_prefill(prefill, query_lens[0], kv_lens[0], None, SIZE)
    kept = [
        place
        for place, (query_len, kv_len) in enumerate(zip(query_lens, kv_lens, strict=True))
        if effective_prefill(prefill, query_len, kv_len, None, SIZE) == alike
    ]
    query_lens, kv_lens = [query_lens[place] for place in kept], [kv_lens[place] for place in kept]
    turns = turn is not None and any(turn.reaches(kv_len - 1) for kv_len in kv_lens)
    starts = [sum(query_lens[:place]) for place in range(len(query_lens) + 1)]
    each = maker.prefill(alike, batch_of(query_lens, kv_lens), starts, kv_lens, 0, turns=turns)
    if alike != DensePrefill() or maker.dense_kernel == "triton" or turns:
        run(each, sum(query_lens))


PREFILLS: dict[str, Prefill] = {
    "dense": DensePrefill(),
    "flex": FlexPrefill(),
    "flex-always": FlexPrefill(min_seq_len=0, min_chunk_len=0),
    "flex-measured": FlexPrefill(coverage_rows=4, share_kv_group=True),
    "flexprefill": FlexPrefill(selection="flexprefill", min_seq_len=0, min_chunk_len=100),
    "block-sparse": BlockSparsePrefill(),
    "block-sparse-64": BlockSparsePrefill(block_size=64),
}


@pytest.mark.parametrize("has_turn", [False, True], ids=["", "string"])
@pytest.mark.parametrize(
    ("kernel", "page_size", "is_fp8"),
    [("triton", 16, False), ("triton", 128, False), ("fa3", 16, False), ("fa3", 128, False), ("triton", 128, True)],
    ids=["triton-16", "triton-128", "fa3-16", "fa3-128", "fp8-128"],
)
@pytest.mark.parametrize("name", PREFILLS)
def test_requests_reach_no_other_kernels(
    compiled: set[Kernel], name: str, page_size: int, kernel: Any, is_fp8: bool, has_turn: bool
) -> None:
    turn = make_string_turn(torch.rand(HEAD_DIM // 2), 5000, 128, is_neox=True, device=DEVICE) if has_turn else None
    layer = LayerContext(0, None, turn, FlexSelector())
    maker, pages = make_maker(kernel, has_turn=has_turn), make_pages(page_size)
    view = KVView(pages)
    if is_fp8:
        view = KVView(pages.to(FP8), key_scale=0.5, value_scale=2.0)
    warm_up = WarmUp(
        PREFILLS[name],
        SIZE,
        maker,
        layer,
        view,
        view,
        NUM_Q_HEADS // NUM_KV_HEADS,
        torch.bfloat16,
        MAX_MODEL_LEN,
        MAX_CHUNK_LEN,
        MAX_DECODE_LEN,
    )
    for case in warm_up.cases():
        warm_up.run(case)
    warmed = set(compiled)
    # What the start compiles at most, per metadata builder.
    assert len(warmed) <= 80
    random.seed(f"{name} {page_size} {kernel} {has_turn}")
    for _ in range(20):
        run_requests(maker, PREFILLS[name], turn, view, layer)
    assert compiled <= warmed


@pytest.mark.parametrize("max_model_len", [1, 100, 128, 129, 8192, 131072, 1 << 20])
@pytest.mark.parametrize("name", PREFILLS)
def test_no_case_is_impossible(name: str, max_model_len: int) -> None:
    maker = make_maker("triton", has_turn=True)
    cases = warm_up_cases(
        PREFILLS[name],
        SIZE,
        maker,
        max_model_len=max_model_len,
        max_chunk_len=8192,
        max_decode_len=min(5, max_model_len),
    )
    assert len(cases) == len(set(cases))
    for case in cases:
        assert 1 <= case.query_len <= case.kv_len <= max(max_model_len, 1)
        assert case.query_len <= 8192
