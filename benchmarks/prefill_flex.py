"""Dynamic sparse prefill on calibrated inputs: one attention call, selection included, and dense peers.

Every time is recorded with the density of the lists and the attention mass that they kept on sampled rows.
"""

from collections.abc import Callable

import torch
from farspan.engine_ext.config import FlexPrefill
from farspan.engine_ext.launch import measure_coverage
from farspan.engine_ext.pass_maker import PassMaker
from farspan.engine_ext.selection.methods import TILE_ROWS_RULE, flex_budget
from farspan.engine_ext.splits import num_multiprocessors
from farspan.kernels.flex.select import flex_block_lists
from farspan.kernels.flex.spans import SpanRule, make_spans
from farspan.kernels.flex.tile_rows import tile_row_lists
from farspan.kernels.prefill import paged_prefill
from farspan.kernels.tiles import BlockLists, PrefillTiles, make_prefill_tiles

from benchmarks import peers
from benchmarks.calls import kv_of, paged_of
from benchmarks.gate import relative_error
from benchmarks.inputs import TINY, PagedBatch, PrefillCase, contiguous_kv, make_calibrated_batch
from benchmarks.record import BenchmarkError, Recorder
from benchmarks.timing import time_interleaved

CHOOSES_CASES = True
BLOCK_SIZE = 128
GAMMAS = (0.9, 0.95)
COVERAGE_ROWS = 128
GATE_TILES = 6
SLOW_REPEATS = 2


def cases(dry_run: bool) -> list[PrefillCase]:
    """List whole prompts, and the last 8K chunk of a long prompt."""
    if dry_run:
        return [PrefillCase(70, 200, TINY)]
    return [*(PrefillCase(n, n) for n in (8192, 16384, 32768, 65536, 131072, 262144)), PrefillCase(8192, 131072)]


class FlexCall:
    """Our selection and attention on one batch, the buffers and tiles made beforehand as the backend does.

    prefill: its gamma and selection.
    """

    def __init__(self, batch: PagedBatch, prefill: FlexPrefill, block_size: int, *, shared: bool = False) -> None:
        device = batch.query.device
        self.batch = batch
        starts = batch.query_start_loc.tolist()
        self.tiles: PrefillTiles = make_prefill_tiles(starts, batch.seq_lens_cpu, block_size, device)
        maker = PassMaker(batch.shape.num_kv_heads, "triton", num_multiprocessors(device), None, False, device)
        self.samples = maker.sample(paged_of(batch), starts, batch.seq_lens_cpu, COVERAGE_ROWS)
        heads_per_list = batch.shape.num_q_heads // batch.shape.num_kv_heads if shared else 1
        self.budget = flex_budget(prefill, block_size, heads_per_list)
        self.spans = None
        if prefill.selection == "tile_rows":
            rule = SpanRule(TILE_ROWS_RULE.span_len * block_size // BLOCK_SIZE, TILE_ROWS_RULE.rows_per_span)
            self.spans = make_spans(starts, batch.seq_lens_cpu, self.tiles, rule)
        self.out = torch.empty_like(batch.query)
        self.lse = torch.empty(batch.shape.num_q_heads, len(batch.query), dtype=torch.float32, device=device)
        self.inputs = (batch.query, kv_of(batch), paged_of(batch))
        self.lists = self.select()

    def select(self) -> BlockLists:
        if self.spans is not None:
            return tile_row_lists(
                *self.inputs, self.tiles, self.spans, self.batch.shape.scale, self.budget
            ).block_lists  # fmt: skip
        return flex_block_lists(*self.inputs, self.tiles, self.batch.shape.scale, self.budget).block_lists

    def attend(self, lists: BlockLists | None = None) -> None:
        lists = lists or self.lists
        paged_prefill(
            *self.inputs, self.tiles, self.batch.shape.scale, block_lists=lists, out=self.out, lse=self.lse
        )  # fmt: skip

    def __call__(self) -> None:
        self.attend(self.select())

    def densities(self) -> list[float]:
        """Blocks listed over causal blocks, per list head."""
        causal_blocks = (self.tiles.tile_block + 1).sum()
        densities: list[float] = (self.lists.block_counts.sum(1) / causal_blocks).tolist()
        return densities

    def coverage(self) -> torch.Tensor:
        """Kept mass per query head, mean over the sampled rows: [num_q_heads]."""
        query, kv, _ = self.inputs
        return measure_coverage(query, kv, self.samples, self.batch.shape.scale, None, self.lse).mean(1)

    def check(self) -> float:
        """Compare some tiles of some heads with float32 attention over their lists; BenchmarkError where wrong."""
        batch, block = self.batch, self.tiles.block_size
        key, value = contiguous_kv(batch, 0)
        group = batch.shape.num_q_heads // batch.shape.num_kv_heads
        list_group = batch.shape.num_q_heads // self.lists.block_ids.shape[0]
        chunk_start = batch.seq_lens_cpu[0] - batch.query_lens_cpu[0]
        worst = 0.0
        for index in range(GATE_TILES):
            tile = (self.tiles.num_tiles - 1) * index // (GATE_TILES - 1)
            head = (7 * index) % batch.shape.num_q_heads
            first = int(self.tiles.tile_block[tile]) * block
            low, high = max(first, chunk_start), min(first + block, batch.seq_lens_cpu[0])
            count = int(self.lists.block_counts[head // list_group, tile])
            ids = self.lists.block_ids[head // list_group, tile, :count].long()
            pos = (ids[:, None] * block + torch.arange(block, device=ids.device)).flatten()
            pos = pos[pos < high]
            rows = torch.arange(low, high, device=ids.device)
            tile_rows = slice(low - chunk_start, high - chunk_start)
            logits = batch.query[tile_rows, head].float() @ key[pos, head // group].float().T
            logits = (logits * batch.shape.scale).masked_fill(pos > rows[:, None], float("-inf"))
            expected = logits.softmax(-1) @ value[pos, head // group].float()
            worst = max(worst, relative_error(self.out[tile_rows, head], expected))
        if not worst < 0.02:
            raise BenchmarkError(f"sparse attention differs from float32 over the same lists by {worst:.1e}")
        return worst


def public_flexprefill(batch: PagedBatch, gamma: float) -> peers.Peer | None:
    """Build the public FlexPrefill's call on contiguous keys and values; None where its module cannot be imported."""
    if not peers.has_module("flex_prefill_attention"):
        return None
    from flex_prefill_attention import flex_prefill_attention

    key, value = contiguous_kv(batch, 0)
    return lambda: flex_prefill_attention(
        batch.query[None], key[None], value[None], gamma, 0.1, min_budget=1024, block_size=BLOCK_SIZE
    )[0]


def works_of(batch: PagedBatch, calls: dict[str, FlexCall], recorder: Recorder) -> dict[str, Callable[[], object]]:
    """Our calls, their stages, and the peers that exist on this machine, by name."""
    works: dict[str, Callable[[], object]] = {}
    for name, call in calls.items():
        works |= {name: call, f"{name}-select": call.select, f"{name}-attention": call.attend}
    if peers.has_module("vllm.vllm_flash_attn"):
        works["fa3"] = peers.fa3(batch)
        works["triton_attn"] = peers.triton_attn(batch)
    if batch.query_lens_cpu == batch.seq_lens_cpu:
        for gamma in GAMMAS:
            if public := public_flexprefill(batch, gamma):
                works[f"flexprefill-public-g{gamma}"] = public
    for name in [name for name in works if not name.startswith("farspan")]:
        try:
            works[name]()
        except (RuntimeError, AssertionError, ImportError, TypeError) as problem:
            recorder.note(f"{name} left out: {str(problem)[:200]}")
            del works[name]
    return works


def run(recorder: Recorder) -> None:
    for case in filter(lambda case: recorder.wants(case.name), cases(recorder.dry_run)):
        batch = make_calibrated_batch(case.query_len, case.seq_len, case.shape)
        block_size = 64 if recorder.dry_run else BLOCK_SIZE
        calls = {f"farspan-g{gamma}": FlexCall(batch, FlexPrefill(gamma=gamma), block_size) for gamma in GAMMAS}
        # The rule of the paper, under which earlier rows of the same name were measured.
        paper = FlexPrefill(gamma=GAMMAS[0], selection="flexprefill")
        calls[f"farspan-flexprefill-g{GAMMAS[0]}"] = FlexCall(batch, paper, block_size)
        for name, call in calls.items():
            call()
            error, coverage = call.check(), call.coverage()
            recorder.note(f"{case.name} {name}: relative error {error:.1e}, worst head {float(coverage.min()):.4f}")
            recorder.add("prefill_flex", case.name, name, "density", "fraction", call.densities())
            recorder.add("prefill_flex", case.name, name, "coverage", "fraction", coverage.tolist())
        works = works_of(batch, calls, recorder)
        slow = {name: SLOW_REPEATS for name in works if name == "triton_attn" or name.startswith("flexprefill")}
        times = time_interleaved(works, repeats=7 if case.seq_len > 60000 else 15, repeats_of=slow)
        for name, samples in times.items():
            recorder.add("prefill_flex", case.name, name, "time", "ms", samples)
        del batch, calls, works
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
