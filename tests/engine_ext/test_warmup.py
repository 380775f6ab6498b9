"""What runs at start compiles every kernel that requests can reach, by Triton's rule of when to compile anew."""

import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton.language as tl
from farspan.engine_ext import launch
from farspan.engine_ext import parts as partial_results
from farspan.engine_ext.config import BlockSparsePrefill, DensePrefill, FlexPrefill, Prefill
from farspan.engine_ext.launch import attend, write_kv
from farspan.engine_ext.metadata import FarspanMetadataBuilder, span_passes
from farspan.engine_ext.offload.cache import ColdCache
from farspan.engine_ext.parts import Parts, combine
from farspan.engine_ext.pass_maker import PassMaker, effective_prefill
from farspan.engine_ext.passes import Dense, LayerContext, Part, Pass
from farspan.engine_ext.runs import ChunkKind, Run
from farspan.engine_ext.selection.crossover import AttentionSize
from farspan.engine_ext.selection.methods import FlexSelector
from farspan.engine_ext.splits import most_parts
from farspan.engine_ext.star import keys as star_keys
from farspan.engine_ext.star import steps as star_steps
from farspan.engine_ext.star.exchange import PartialResult, unpacked
from farspan.engine_ext.star.pieces import cut_chunk, moved_rows
from farspan.engine_ext.star.positions import Turns
from farspan.engine_ext.star.steps import StarSteps
from farspan.engine_ext.string import Rotation
from farspan.engine_ext.warmup import WarmUp, WarmUpCase, warm_up_cases
from farspan.kernels import prefill
from farspan.kernels.batch import FP8, KVView, PagedBatch
from farspan.kernels.decode_workspace import make_decode_workspace
from farspan.kernels.flex import tile_rows
from farspan.kernels.hopper.log_sums_kernel import hopper_log_sums_kernel
from farspan.kernels.hopper.prefill_kernel import hopper_prefill_kernel
from farspan.kernels.rotary_turn import Turn, make_string_turn
from farspan.star.blocks import BlockSizes, plan_shards, shards_of_one, window_shards, windowed_len
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor
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
    if isinstance(value, (TensorDescriptor, GluonDescriptor)):
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
                "gl.constexpr",
            )
            key.append((name, value if is_constant else is_another_kernel_by(value, name, self.kwargs)))
        found.add((self.__name__, *key))

    monkeypatch.setattr(InterpretedFunction, "run", note)
    # Gluon kernels are no InterpretedFunction.
    for kernel in (hopper_prefill_kernel, hopper_log_sums_kernel):
        options = {
            name: [param.name for param in kernel.params if getattr(param, name)]
            for name in ("do_not_specialize", "do_not_specialize_on_alignment")
        }
        gluon = SimpleNamespace(arg_names=kernel.arg_names, fn=kernel.fn, kwargs=options, __name__=kernel.fn.__name__)
        monkeypatch.setattr(kernel, "run", partial(note, gluon))
    for module in (launch, partial_results):
        monkeypatch.setattr(module, "is_on_host", lambda tensor: False)
    return found


def set_capability(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    """FlashAttention 3 is there on Hopper alone, as are the kernels in Gluon."""
    for module in (prefill, tile_rows):
        monkeypatch.setattr(module, "device_capability", lambda device: (9, 0) if kernel == "fa3" else (8, 0))


def make_maker(kernel: Any, *, has_turn: bool) -> PassMaker:
    parts = most_parts(MAX_NUM_REQS, NUM_KV_HEADS, MAX_MODEL_LEN, NUM_SMS)
    workspace = make_decode_workspace(parts * NUM_Q_HEADS * MAX_DECODE_LEN, HEAD_DIM, DEVICE)
    return PassMaker(NUM_KV_HEADS, kernel, NUM_SMS, workspace, has_turn, DEVICE)


def make_pages(page_size: int) -> torch.Tensor:
    return torch.zeros(2, NUM_KV_HEADS, page_size, 2 * HEAD_DIM, dtype=torch.bfloat16)


def table_width(pages: torch.Tensor) -> int:
    """Of vLLM's block tables."""
    return -(-MAX_MODEL_LEN // 128) * 128 // pages.shape[2]


def run_requests(maker: PassMaker, prefill: Prefill, turn: Turn | None, view: KVView, layer: LayerContext) -> None:
    """A random batch as the builder cuts it: a decode pass and a pass of requests that prefill alike."""
    width = table_width(view.pages)
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
    if alike != DensePrefill() or each.work.kernel == "triton":  # type: ignore[union-attr]
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
    compiled: set[Kernel],
    name: str,
    page_size: int,
    kernel: Any,
    is_fp8: bool,
    has_turn: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_capability(monkeypatch, kernel)
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
    in_gluon = any(each[0] == "hopper_prefill_kernel" for each in compiled)
    # Dense prefill without a turn is FlashAttention 3's, and blocks of 64 are the portable kernel's. By the measured
    # crossover these prompts are dense.
    is_ours = has_turn or name in ("flex-always", "flexprefill", "block-sparse")
    assert in_gluon == (kernel == "fa3" and is_ours)
    # Selection under a turn is the portable kernel's, where the turn reaches the chunk.
    selects_in_gluon = any(each[0] == "hopper_log_sums_kernel" for each in compiled)
    assert selects_in_gluon == (kernel == "fa3" and name == "flex-always")


@pytest.mark.parametrize("has_turn", [False, True], ids=["", "string"])
@pytest.mark.parametrize("kernel", ["triton", "fa3"])
@pytest.mark.parametrize("group_size", [1, 4, 8])
def test_spans_reach_no_other_kernels(
    compiled: set[Kernel], monkeypatch: pytest.MonkeyPatch, group_size: int, kernel: Any, has_turn: bool
) -> None:
    """Long contexts of cold heads, one KV head of a buffer after the other."""
    set_capability(monkeypatch, kernel)
    turn = make_string_turn(torch.rand(HEAD_DIM // 2), 5000, 128, is_neox=True, device=DEVICE) if has_turn else None
    layer, page_size, num_heads = LayerContext(0, None, turn, FlexSelector()), 128, group_size * NUM_KV_HEADS
    maker = replace(make_maker(kernel, has_turn=has_turn), workspace=None)
    pages, size = make_pages(page_size), AttentionSize(num_heads, HEAD_DIM)
    view, width = KVView(pages), table_width(pages)
    warm_up = WarmUp(
        DensePrefill(), size, maker, layer, view, view, group_size, torch.bfloat16, MAX_MODEL_LEN, MAX_CHUNK_LEN,
        MAX_DECODE_LEN, table_width=width, span_heads=(1,),
    )  # fmt: skip
    for case in warm_up.cases():
        warm_up.run(case)
    warmed = set(compiled)
    random.seed(f"{group_size} {kernel} {has_turn}")
    buffer = torch.zeros(1, 20, page_size, 2 * HEAD_DIM, dtype=torch.bfloat16).transpose(0, 1)
    entries = torch.zeros(3, width, dtype=torch.int32)
    cache: Any = SimpleNamespace(
        staging=SimpleNamespace(num_pages=20),
        sizes=SimpleNamespace(page_size=page_size),
        stage_spans=partial(ColdCache.stage_spans, SimpleNamespace(entries=entries)),  # type: ignore[arg-type]
    )
    builder: Any = SimpleNamespace(device=DEVICE)
    for _ in range(12):
        query_len = random.randint(1, random.choice([3, 130, MAX_CHUNK_LEN]))
        kv_len = random.randint(20 * page_size + 1, MAX_MODEL_LEN)
        kind = ChunkKind(DensePrefill(), turn is not None and turn.reaches(kv_len - 1), True)
        request = random.randint(0, 2)
        run = Run(request, request + 1, kind, 0, [0, query_len], [kv_len])
        made = FarspanMetadataBuilder.spans_of(builder, cache, run)
        query = torch.zeros(query_len, num_heads, HEAD_DIM, dtype=torch.bfloat16)
        parts = Parts(torch.empty_like(query), group_size)
        for head in range(NUM_KV_HEADS):
            heads = slice(head * group_size, (head + 1) * group_size)
            for each in span_passes(replace(maker, num_kv_heads=1, first_kv_head=head), run, *made):
                target, lse = parts.room(each)
                found = torch.zeros(group_size, query_len)
                if not (isinstance(each.work, Dense) and each.work.kernel == "fa3"):
                    found = attend(each, query[:, heads], KVView(buffer, head), layer, 0.125, target, lse)
                parts.add(each, found)
    assert any(each[0] == "_add_kernel" for each in compiled)
    assert compiled <= warmed


NUM_HOSTS = 3


class Others:
    """An exchange whose other hosts send zeros."""

    num_hosts, num_bytes, gathers_keys = NUM_HOSTS, 0, True

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.ends: list[int] = []
        """What all hosts tell of a window."""

    def agree(self, digest: bytes, number: int = 0) -> list[int]:
        """All do what this host does."""
        return self.ends

    def gather(self, mine: PartialResult) -> tuple[torch.Tensor, torch.Tensor]:
        """[num_hosts, …] of each."""
        return unpacked(mine.buffer.repeat(NUM_HOSTS, 1), mine.out)

    def gather_pages(self, pages: torch.Tensor) -> torch.Tensor:
        """By ranks."""
        return pages.repeat(NUM_HOSTS, 1, 1, 1)


def attend_star(passes: list[Pass], moved: Any, pages: torch.Tensor, layer: LayerContext) -> None:
    """What a layer does with a step; FlashAttention's passes are left out, since nothing is compiled for them."""
    num_tokens = max(each.rows.stop for each in passes)
    fused = torch.zeros(num_tokens, (NUM_Q_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM, dtype=torch.bfloat16)
    widths = [NUM_Q_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM]
    query, key, value = (part.unflatten(1, (-1, HEAD_DIM)) for part in fused.split(widths, dim=1))
    key = launch.at_true_positions(key, moved, layer.to_true_positions)
    write_kv(key, value, pages, torch.zeros(num_tokens, dtype=torch.int64))
    query = launch.at_true_positions(query, moved, layer.to_true_positions)
    parts = Parts(torch.empty_like(query), NUM_Q_HEADS // NUM_KV_HEADS)
    for each in passes:
        target, lse = parts.room(each)
        if not (isinstance(each.work, Dense) and each.work.kernel == "fa3"):
            found = attend(each, query[each.rows], KVView(pages), layer, 0.125, target, lse)
        else:
            found = torch.zeros(NUM_Q_HEADS, each.rows.stop - each.rows.start)
        if each.part is not None:
            parts.add(each, found)


def run_star_blocks(steps: StarSteps, rank: int, pages: torch.Tensor, layer: LayerContext) -> None:
    """A step of chunks of one to three requests, of context and query."""
    pieces, moved, row = [], [], 0
    num_reqs = random.randint(1, 3)
    for request in range(num_reqs):
        block_len = random.randint(1, 24) * 128
        num_tokens = random.randint(1, MAX_MODEL_LEN // 200) * 128
        sizes = BlockSizes(block_len, random.choice([None, block_len, 0]))
        shards = plan_shards("r", num_tokens, NUM_HOSTS, pages.shape[2], sizes, 1000.0)
        shard = (shards or shards_of_one("r", num_tokens, NUM_HOSTS, pages.shape[2]))[rank]
        query_len = random.choice([1, 1, random.randint(2, 700)])
        begin = random.choice([shard.local_len, random.randint(0, shard.local_len // 128) * 128])
        end = min(begin + random.choice([1, 30, MAX_CHUNK_LEN]), shard.local_len + query_len)
        pieces += cut_chunk(request, row, shard, begin, end)
        moved += moved_rows(row, shard, begin, end)
        row += end - begin
    common = SimpleNamespace(block_table_tensor=torch.zeros(num_reqs, table_width(pages), dtype=torch.int32))
    attend_star(steps.passes(common, pieces, []), moved, pages, layer)


def run_star_window(steps: StarSteps, exchange: Others, pages: torch.Tensor, layer: LayerContext) -> None:
    """A step of all hosts in which every token sees all before it, up to more keys than one host can have."""
    page_size, rank = pages.shape[2], exchange.rank
    num_tokens = random.randint(1, (NUM_HOSTS * MAX_MODEL_LEN - MAX_CHUNK_LEN) // page_size) * page_size
    num_tokens = windowed_len(num_tokens, NUM_HOSTS, page_size, MAX_CHUNK_LEN)
    if num_tokens == 0:
        return
    shards = window_shards("r", list(range(num_tokens)), NUM_HOSTS, page_size, MAX_CHUNK_LEN)
    window = random.randint(0, (num_tokens - 1) // shards[0].window_len)
    begin, stop = window * MAX_CHUNK_LEN, (window + 1) * MAX_CHUNK_LEN
    exchange.ends = [min(stop, shard.local_len) for shard in shards]
    end = exchange.ends[rank]
    common = SimpleNamespace(
        block_table_tensor=torch.zeros(1, table_width(pages), dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor([end]),
        query_start_loc_cpu=torch.tensor([0, end - begin]),
        num_reqs=1,
    )
    passes, moved, keys = steps.window(common, 0, shards[rank], begin)
    attend_star(passes, moved, keys.pages(pages), layer)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kernel", ["triton", "fa3"])
@pytest.mark.parametrize("page_size", [16, 128])
@pytest.mark.parametrize("name", ["dense", "flex", "flex-always"])
def test_hosts_of_star_reach_no_other_kernels(
    compiled: set[Kernel], monkeypatch: pytest.MonkeyPatch, name: str, page_size: int, kernel: Any, rank: int
) -> None:
    exchange: Any = Others(rank)
    monkeypatch.setattr(star_steps, "exchange_of", lambda num_hosts, rank: exchange)
    monkeypatch.setattr(star_keys, "current", lambda: exchange)
    turns = Turns(Rotation(torch.rand(HEAD_DIM // 2 - 8), True), DEVICE)
    turns.make_rows(4)
    layer = LayerContext(0, None, None, FlexSelector(), turns)
    maker, pages, prefill = make_maker(kernel, has_turn=False), make_pages(page_size), PREFILLS[name]
    view = KVView(pages)
    warm_up = WarmUp(
        prefill, SIZE, maker, layer, view, view, NUM_Q_HEADS // NUM_KV_HEADS, torch.bfloat16, MAX_MODEL_LEN,
        MAX_CHUNK_LEN, num_hosts=NUM_HOSTS, max_kv_len=star_keys.longest_kv_len(MAX_MODEL_LEN),
    )  # fmt: skip
    for case in warm_up.cases():
        warm_up.run(case)
    warmed = set(compiled)
    assert len(warmed) <= 80
    requests: Any = SimpleNamespace(prefills=lambda common: [prefill] * 3)
    steps = StarSteps(maker, requests, SIZE, 1, page_size, (NUM_Q_HEADS, HEAD_DIM, 2), 1)
    random.seed(f"{name} {page_size} {kernel} {rank}")
    for _ in range(12):
        run_star_blocks(steps, rank, pages, layer)
        run_star_window(steps, exchange, pages, layer)
    # A step of decode from buffers, each row turned by its own angle.
    lockstep = maker.decode(PagedBatch(torch.arange(3).int(), torch.ones(2).int(), torch.zeros(2, 7).int(), 1, 900))
    attend_star([replace(lockstep, part=Part(0, 1, exchange))], [(slice(0, 2), None)], pages, layer)
    assert compiled <= warmed


def test_hosts_combine_hot_and_cold_heads_together(compiled: set[Kernel]) -> None:
    group_size = 8
    turns = Turns(Rotation(torch.rand(HEAD_DIM // 2), True), DEVICE)
    layer, view = LayerContext(0, None, None, None, turns), KVView(make_pages(128)).of_heads(slice(0, 1))
    warm_up = WarmUp(
        DensePrefill(), SIZE, make_maker("triton", has_turn=False), layer, view, view, group_size, torch.bfloat16,
        MAX_MODEL_LEN, MAX_CHUNK_LEN, num_hosts=NUM_HOSTS, num_kv_heads=NUM_KV_HEADS,
    )  # fmt: skip
    warm_up.run(WarmUpCase("combine"))
    warmed = set(compiled)
    out = torch.zeros(5, NUM_KV_HEADS * group_size, HEAD_DIM, dtype=torch.bfloat16)
    mine = PartialResult.empty(out)
    combine(*unpacked(mine.buffer.repeat(NUM_HOSTS, 1), out), out, torch.empty_like(mine.lse))
    assert compiled == warmed != set()


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
