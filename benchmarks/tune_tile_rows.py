"""Measure what the constants of selection by tile rows rest on; prints tables, writes no rows.

`python -m benchmarks.tune_tile_rows PART...`, on a GPU: `check` holds the compiled kernels against PyTorch, `sweep`
times shapes of programs, `spans` does both for the forms of two rules, `host` times the host's side of a layer and
chunk, which `profile` takes apart, `crossover` sparse and dense attention over chunk lengths, prefixes and densities,
which `selection/crossover.py` models. `--dry-run` runs everything on tiny shapes through Triton's interpreter.
"""

import argparse
import cProfile
import itertools
import os
import pstats
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks._bootstrap import ensure_farspan

ensure_farspan()


@dataclass(frozen=True)
class Shape:
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


SHAPES = {"8b": Shape(32, 8, 128), "1.5b": Shape(12, 2, 128), "0.5b": Shape(14, 2, 64), "135m": Shape(9, 3, 64)}
SWEPT = ("8b", "0.5b", "tiny")
TINY = {"tiny": Shape(4, 2, 64)}


class Workbench:
    """Chunks of random queries over random keys, and the calls on them."""

    def __init__(self, dry_run: bool) -> None:
        from farspan.engine_ext.splits import num_multiprocessors

        from benchmarks.inputs import default_device

        self.dry_run = dry_run
        self.device = default_device()
        self.num_sms = num_multiprocessors(self.device)
        self.block_size = 64 if dry_run else 128

    def chunk(self, shape: Shape, query_len: int, seq_len: int) -> Any:
        """A batch of one request, from `benchmarks.inputs`."""
        from benchmarks.inputs import AttentionShape, make_paged_batch

        dtype = torch.float32 if self.dry_run else torch.bfloat16
        page = 16 if self.dry_run else 128
        return make_paged_batch([query_len], [seq_len], AttentionShape(**vars(shape), page_size=page, dtype=dtype))

    def selection(self, batch: Any, rule: Any, config: Any = None) -> Any:
        """The stages of selection on a batch: masses alone, and all of it."""
        from farspan.kernels.flex import tile_rows
        from farspan.kernels.flex.spans import make_spans
        from farspan.kernels.flex.types import NO_LIMIT, Budget
        from farspan.kernels.tiles import make_prefill_tiles

        from benchmarks.calls import kv_of, paged_of

        starts = batch.query_start_loc.tolist()
        tiles = make_prefill_tiles(starts, batch.seq_lens_cpu, self.block_size, self.device)
        spans = make_spans(starts, batch.seq_lens_cpu, tiles, rule)
        kv, paged = kv_of(batch), paged_of(batch)
        key_pages, _ = kv.split()
        size = (batch.shape.num_q_heads, spans.num_spans, tiles.max_kv_blocks, rule.rows_per_span)
        log_sums = torch.full(size, float("nan"), dtype=torch.float32, device=self.device)
        budget = Budget(0.98, 0.0, 8, NO_LIMIT)

        launch: Any = None
        if config is not None:
            launch = tile_rows.LogSumsLaunch(
                batch.query, key_pages, paged, spans, tiles.max_kv_blocks, self.block_size, None, config
            )  # fmt: skip

        def masses() -> torch.Tensor:
            launch(batch.query, key_pages, batch.shape.scale, None, log_sums)
            return log_sums

        def select() -> Any:
            return tile_rows.tile_row_lists(
                batch.query, kv, paged, tiles, spans, batch.shape.scale, budget, config=config
            )

        return masses, select, spans, tiles, budget


def spans(bench: Workbench, shapes: dict[str, Shape]) -> None:
    """Rules of 16 rows per 256 and per 128 queries, with every form of the pass over the keys, checked and timed."""
    from farspan.kernels.flex.spans import SpanRule
    from farspan.kernels.tuning import HopperLogSumsConfig, device_capability, tile_rows_config

    from benchmarks import peers
    from benchmarks.timing import time_interleaved

    size, page = bench.block_size, 16 if bench.dry_run else 128
    capability = device_capability(bench.device)
    for name, shape in ((name, shape) for name, shape in shapes.items() if name in SWEPT):
        dtype = torch.float32 if bench.dry_run else torch.bfloat16
        portable = tile_rows_config(shape.head_dim, dtype, capability, block_size=size, keys_in_a_row=page)
        forms: dict[str, Any] = {"portable": portable}
        if not bench.dry_run:
            forms["hopper"] = HopperLogSumsConfig(num_stages=4)
        rules = {"16/128": SpanRule(size, 16), "16/256": SpanRule(2 * size, 16)}
        right = []
        checked = bench.chunk(shape, *((300, 700) if bench.dry_run else (4500, 10000)))
        checked.query.mul_(3)
        for (rule_name, rule), (form, config) in itertools.product(rules.items(), forms.items()):
            try:
                print(f"spans {name} {rule_name} {form}: {check_form(bench, checked, rule, config)}", flush=True)
            except Exception as problem:
                print(f"spans {name} {rule_name} {form}: {type(problem).__name__} {str(problem)[:400]}", flush=True)
                continue
            right.append((f"{rule_name} {form}", rule, config))
        chunks = [(300, 700)] if bench.dry_run else [(8192, 131072), (8192, 32768), (16384, 131072), (8192, 8192)]
        for query_len, seq_len in chunks:
            batch = bench.chunk(shape, query_len, seq_len)
            works: dict[str, Callable[[], object]] = {}
            if peers.has_module("vllm.vllm_flash_attn"):
                works["fa3"] = peers.fa3(batch)
            flops = {}
            for label, rule, config in right:
                masses, select, *_ = bench.selection(batch, rule, config)
                works[f"masses {label}"], works[f"select {label}"] = masses, select
                flops[label] = batch.causal_flops / 2 * rule.rows_per_span / rule.span_len
            for work, samples in time_interleaved(works, repeats=7, warmup=2).items():
                ms = sorted(samples)[len(samples) // 2]
                rate = flops.get(work.partition(" ")[2], batch.causal_flops) / ms / 1e9
                print(
                    f"spans {name} q{query_len} n{seq_len} {work}: {ms:.3f} ms (least {min(samples):.3f}), "
                    f"{rate:.0f} TFLOP/s",
                    flush=True,
                )
            del batch, works


def check_form(bench: Workbench, batch: Any, rule: Any, config: Any) -> str:
    """Hold a form's log-sums against float32 products, and its lists against the choice from those; raises if wrong."""
    from farspan.kernels.flex import tile_rows_reference
    from farspan.kernels.flex.spans import make_spans
    from farspan.kernels.tiles import make_prefill_tiles

    masses, select, spans, tiles, budget = bench.selection(batch, rule, config)
    log_sums = masses().clone()
    for _ in range(5):
        # Buffers are refilled while others are read; a missing barrier would show as a difference now and then.
        if not torch.equal(masses().nan_to_num(7.0), log_sums.nan_to_num(7.0)):
            raise ValueError("WRONG: another run gives other log-sums")
    mass, worst = masses_of(bench, batch, rule, spans, tiles.max_kv_blocks, log_sums)
    starts = batch.query_start_loc.tolist()
    cpu_tiles = make_prefill_tiles(starts, batch.seq_lens_cpu, bench.block_size, torch.device("cpu"))
    cpu_spans = make_spans(starts, batch.seq_lens_cpu, cpu_tiles, rule)
    expected = tile_rows_reference.choose(mass.cpu(), cpu_spans, cpu_tiles, budget).block_lists
    found = select().block_lists
    counts = found.block_counts.cpu()
    listed = torch.arange(tiles.max_kv_blocks) < counts[..., None]
    differs = (counts != expected.block_counts) | ((found.block_ids.cpu() != expected.block_ids) & listed).any(-1)
    # Of blocks with equal masses but for rounding either may be chosen.
    share = float(differs.float().mean())
    verdict = f"log-sums off by {worst:.1e}, {share:.4f} of {differs.numel()} lists differ"
    if not worst < 2e-3 or share > 0.01:
        raise ValueError(f"WRONG: {verdict}")
    return verdict


def masses_of(
    bench: Workbench, batch: Any, rule: Any, spans: Any, num_blocks: int, log_sums: torch.Tensor
) -> tuple[torch.Tensor, float]:
    """The masses of all spans by float32 products, as `tile_rows_reference.span_masses`, and log-sums' worst error."""
    from farspan.kernels.flex.spans import MASS_UNIT

    from benchmarks.inputs import contiguous_kv

    key, _ = contiguous_kv(batch, 0)
    group = batch.shape.num_q_heads // batch.shape.num_kv_heads
    keys = key.float().repeat_interleave(group, 1).permute(1, 2, 0).contiguous()
    mass = torch.zeros(batch.shape.num_q_heads, spans.num_spans, 2, num_blocks, dtype=torch.int32, device=bench.device)
    columns = (spans.span_request.tolist(), spans.span_index.tolist(), spans.span_row.tolist())
    worst = 0.0
    for span, (request, index, row) in enumerate(zip(*columns, strict=True)):
        if request < 0:
            continue
        place = rule.places(torch.tensor(index, device=bench.device))
        end = (index + 1) * rule.span_len
        logits = batch.query[row + place].float().transpose(0, 1) @ keys[..., :end] * batch.shape.scale
        hidden = torch.arange(end, device=bench.device) > (index * rule.span_len + place)[:, None]
        logits = logits.masked_fill_(hidden, float("-inf"))
        blocks = logits.unflatten(2, (-1, bench.block_size)).logsumexp(-1)
        expected, found = blocks.transpose(1, 2) / 0.6931471805599453, log_sums[:, span, : blocks.shape[2]]
        finite = expected.isfinite()
        if not torch.equal(finite, found.isfinite()):
            raise ValueError(f"WRONG: infinite or missing log-sums in span {span}")
        worst = max(worst, float((found - expected)[finite].abs().max()))
        halves = blocks.softmax(2).unflatten(1, (-1, 2)).mean(1) / 2
        mass[:, span, :, : blocks.shape[2]] = (halves * MASS_UNIT + 0.5).int()
    return mass, worst


def configs(head_dim: int, dry_run: bool) -> Iterator[Any]:
    from farspan.kernels.tuning import TileRowsConfig

    if dry_run:
        yield TileRowsConfig(64, 4, 2, use_tma=False)
        return
    for block_m, num_warps, num_stages in ((64, 4, 3), (64, 4, 2), (128, 8, 3)):
        for use_tma in (False, True):
            yield TileRowsConfig(block_m, num_warps, num_stages, use_tma)
    if head_dim <= 64:
        yield TileRowsConfig(64, 4, 4, use_tma=True)
    yield TileRowsConfig(128, 4, 3, use_tma=True)


def check(bench: Workbench, shapes: dict[str, Shape]) -> None:
    """Log-sums against float32 products, lists against PyTorch's choice from the same log-sums."""
    from farspan.kernels.flex import tile_rows_reference
    from farspan.kernels.flex.spans import SpanRule

    from benchmarks.inputs import contiguous_kv

    sizes = [(300, 700)] if bench.dry_run else [(4500, 20000)]
    swept = {name: shape for name, shape in shapes.items() if name in SWEPT}
    for (name, shape), (query_len, seq_len) in itertools.product(swept.items(), sizes):
        batch = bench.chunk(shape, query_len, seq_len)
        batch.query.mul_(3)
        key, _ = contiguous_kv(batch, 0)
        group = shape.num_q_heads // shape.num_kv_heads
        for rule in (SpanRule(4 * bench.block_size, 32), SpanRule(2 * bench.block_size, 16)):
            for config in configs(shape.head_dim, bench.dry_run):
                if rule.rows_per_span == 16 and (config.block_m, config.num_stages) != (64, 3):
                    continue
                masses, select, spans, tiles, budget = bench.selection(batch, rule, config)
                try:
                    log_sums = masses()
                    lists = select()
                except Exception as problem:
                    print(f"check {name} {rule} {config}: {type(problem).__name__} {str(problem)[:200]}", flush=True)
                    continue
                worst = 0.0
                real = [span for span, request in enumerate(spans.span_request.tolist()) if request >= 0]
                for span in real[:1] + real[-1:]:
                    index, row = int(spans.span_index[span]), int(spans.span_row[span])
                    place = rule.places(torch.tensor(index, device=bench.device))
                    position, end = index * rule.span_len + place, (index + 1) * rule.span_len
                    for head in (0, shape.num_q_heads - 1):
                        logits = batch.query[row + place, head].float() @ key[:end, head // group].float().T
                        logits = logits * (batch.shape.scale * 1.4426950408889634)
                        visible = torch.arange(end, device=bench.device) <= position[:, None]
                        logits = logits.masked_fill(~visible, float("-inf")) * 0.6931471805599453
                        expected = logits.unflatten(1, (-1, bench.block_size)).logsumexp(-1).T / 0.6931471805599453
                        found = log_sums[head, span, : expected.shape[0]]
                        finite = expected.isfinite()
                        assert torch.equal(finite, found.isfinite()), "infinite log-sums differ"
                        worst = max(worst, float((found - expected)[finite].abs().max()))
                ends = (spans.span_index.long() + 1) * (rule.span_len // bench.block_size)
                inside = torch.arange(tiles.max_kv_blocks, device=bench.device) < ends[:, None]
                inside = inside & (spans.span_request >= 0)[:, None]
                logs = log_sums.masked_fill(~inside[None, :, :, None], float("-inf"))
                mass = (logs * 0.6931471805599453).softmax(2).nan_to_num(0)
                mass = mass.unflatten(3, (-1, 2)).mean(3).movedim(-1, 2) / 2
                whole = (mass * tile_rows_reference.MASS_UNIT + 0.5).int().cpu()
                cpu_tiles = type(tiles)(
                    tiles.block_size, tiles.tile_request.cpu(), tiles.tile_block.cpu(), tiles.max_kv_blocks
                )
                cpu_spans = type(spans)(
                    rule, *(each.cpu() for each in (spans.span_request, spans.span_index, spans.span_row,
                                                    spans.span_tile, spans.cut_tile))
                )  # fmt: skip
                expected_lists = tile_rows_reference.choose(whole, cpu_spans, cpu_tiles, budget)
                counts = lists.block_lists.block_counts.cpu()
                differing = int((counts != expected_lists.block_lists.block_counts).sum())
                listed = torch.arange(tiles.max_kv_blocks) < counts[..., None]
                same_count = (counts == expected_lists.block_lists.block_counts)[..., None]
                ids = lists.block_lists.block_ids.cpu() != expected_lists.block_lists.block_ids
                wrong_ids = int((ids & listed & same_count).any(-1).sum())
                print(
                    f"check {name} {rule.rows_per_span}/{rule.span_len} {config}: log-sums off by {worst:.1e}, "
                    f"lists of another length {differing} and of other blocks {wrong_ids} of {counts.numel()}",
                    flush=True,
                )
                if not worst < 0.02 or differing + wrong_ids > 0.002 * counts.numel():
                    raise SystemExit("the compiled kernels are wrong")


def sweep(bench: Workbench, shapes: dict[str, Shape]) -> None:
    """Masses and the whole selection beside dense attention."""
    from farspan.kernels.flex.spans import SpanRule

    from benchmarks import calls, peers
    from benchmarks.timing import time_interleaved

    sizes = [(300, 700)] if bench.dry_run else [
        (16384, 131072), (8192, 131072), (8192, 65536), (8192, 32768), (8192, 8192)
    ]  # fmt: skip
    for name, (query_len, seq_len) in itertools.product([n for n in shapes if n in SWEPT], sizes):
        shape = shapes[name]
        batch = bench.chunk(shape, query_len, seq_len)
        works: dict[str, Callable[[], object]] = {"triton": calls.prefill(batch)}
        if peers.has_module("vllm.vllm_flash_attn"):
            works["fa3"] = peers.fa3(batch)
        full = (query_len, seq_len) in ((16384, 131072), (8192, 32768)) or bench.dry_run
        for config in configs(shape.head_dim, bench.dry_run):
            for rule in (SpanRule(4 * bench.block_size, 32), SpanRule(2 * bench.block_size, 16)):
                if not full and (config.block_m, config.num_stages) != (64, 3):
                    continue
                if rule.rows_per_span == 16 and (config.block_m, config.num_stages) != (64, 3):
                    continue
                masses, select, *_ = bench.selection(batch, rule, config)
                label = (
                    f"{rule.rows_per_span}/{rule.span_len} m{config.block_m} w{config.num_warps} s{config.num_stages} "
                    f"tma{int(config.use_tma)}"
                )
                try:
                    masses()
                    select()
                except Exception as problem:
                    print(f"sweep {name} {label}: {type(problem).__name__} {str(problem)[:120]}", flush=True)
                    continue
                works[f"masses {label}"] = masses
                works[f"select {label}"] = select
        times = time_interleaved(works, repeats=5, warmup=1)
        dense = sorted(times.get("fa3", times["triton"]))[len(times.get("fa3", times["triton"])) // 2]
        for work, samples in times.items():
            median = sorted(samples)[len(samples) // 2]
            print(
                f"sweep {name} q{query_len} n{seq_len} {work}: {median:.3f} ms, {median / dense:.3f} of dense",
                flush=True,
            )
        del batch, works


def host(bench: Workbench, shapes: dict[str, Shape]) -> None:
    """Milliseconds of the host for one layer and chunk, the device's work not waited for."""
    from farspan.engine_ext.config import DensePrefill, FlexPrefill
    from farspan.kernels.flex.spans import SpanRule

    from benchmarks import calls, peers
    from benchmarks.timing import synchronize

    for name, shape in shapes.items():
        batch = bench.chunk(shape, 600 if bench.dry_run else 1024, 1500 if bench.dry_run else 2048)
        kernels: list[Any] = ["triton"] + (["fa3"] if peers.has_module("vllm.vllm_flash_attn") else [])
        if bench.dry_run:
            kernels = ["cpu"]
        works = {f"dense {kernel}": calls.through_the_engine(batch, DensePrefill(), kernel) for kernel in kernels}
        for selection in ("tile_rows", "flexprefill"):
            how = FlexPrefill(selection=selection, min_seq_len=0, min_chunk_len=0)
            works[selection] = calls.through_the_engine(batch, how, kernels[0])
        block_size = bench.block_size
        _, works["selection by tile rows alone"], *_ = bench.selection(batch, SpanRule(2 * block_size, 16))
        for work_name, work in works.items():
            work()
            synchronize()
            laps = []
            for _ in range(1 if bench.dry_run else 5):
                started = time.perf_counter()
                for _ in range(1 if bench.dry_run else 30):
                    work()
                laps.append((time.perf_counter() - started) * 1e3 / (1 if bench.dry_run else 30))
                synchronize()
            print(
                f"host {name} {work_name}: {min(laps):.3f} ms a layer and chunk "
                f"(median {sorted(laps)[len(laps) // 2]:.3f})",
                flush=True,
            )


def profile(bench: Workbench, shapes: dict[str, Shape]) -> None:
    """Where the host's time goes, by Python function."""
    from farspan.engine_ext.config import FlexPrefill

    from benchmarks import calls
    from benchmarks.timing import synchronize

    shape = next(iter(shapes.values()))
    batch = bench.chunk(shape, *((300, 700) if bench.dry_run else (1024, 2048)))
    work = calls.through_the_engine(
        batch, FlexPrefill(min_seq_len=0, min_chunk_len=0), "cpu" if bench.dry_run else "triton"
    )
    work()
    synchronize()
    profiler = cProfile.Profile()
    for _ in range(1 if bench.dry_run else 8):
        profiler.enable()
        for _ in range(1 if bench.dry_run else 25):
            work()
        profiler.disable()
        synchronize()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(30)


def crossover(bench: Workbench, shapes: dict[str, Shape]) -> None:
    """Dense attention, selection, and sparse attention over lists of a given density."""
    from farspan.kernels.flex.spans import SpanRule
    from farspan.kernels.prefill import paged_prefill
    from farspan.kernels.tiles import BlockLists

    from benchmarks import calls, peers
    from benchmarks.calls import kv_of, paged_of
    from benchmarks.timing import time_interleaved

    sizes = [(300, 700)]
    if not bench.dry_run:
        sizes = [(2048, 4096), (8192, 8192), (2048, 16384), (8192, 16384), (8192, 32768), (2048, 65536), (8192, 131072)]
    for (name, shape), (query_len, seq_len) in itertools.product(shapes.items(), sizes):
        batch = bench.chunk(shape, query_len, seq_len)
        rule = SpanRule(4 * bench.block_size, 32)
        config = next(iter(configs(shape.head_dim, bench.dry_run)))
        _, select, _, tiles, _ = bench.selection(batch, rule, config if bench.dry_run else None)
        works: dict[str, Callable[[], object]] = {"triton": calls.prefill(batch), "select": select}
        if peers.has_module("vllm.vllm_flash_attn"):
            works["fa3"] = peers.fa3(batch)
        out, lse = calls.empty_results(batch)
        for density in (0.2, 0.4, 0.7):
            lists = random_lists(tiles, shape.num_q_heads, density)

            def attend(lists: BlockLists = lists, batch=batch, tiles=tiles, out=out, lse=lse) -> None:
                paged_prefill(
                    batch.query,
                    kv_of(batch),
                    paged_of(batch),
                    tiles,
                    batch.shape.scale,
                    block_lists=lists,
                    out=out,
                    lse=lse,
                )

            works[f"density {density}"] = attend
        times = time_interleaved(works, repeats=7, warmup=2)
        medians = {work: sorted(samples)[len(samples) // 2] for work, samples in times.items()}
        dense = medians.get("fa3", medians["triton"])
        tflops = batch.causal_flops / dense / 1e9
        parts = [f"{work} {ms:.3f} ({ms / dense:.2f})" for work, ms in medians.items()]
        print(f"crossover {name} q{query_len} n{seq_len} dense {tflops:.0f} TFLOP/s: {', '.join(parts)}", flush=True)
        del batch, works


def random_lists(tiles: Any, num_heads: int, density: float) -> Any:
    """The first and the diagonal block, and others at random: one list for every query head."""
    from farspan.kernels.tiles import BlockLists

    generator = torch.Generator(tiles.tile_block.device).manual_seed(0)
    block = torch.arange(tiles.max_kv_blocks, device=tiles.tile_block.device)
    own = tiles.tile_block.long()[:, None]
    size = (num_heads, tiles.num_tiles, tiles.max_kv_blocks)
    chosen = torch.rand(size, generator=generator, device=block.device) < density
    chosen = (chosen | (block == 0) | (block == own)) & (block <= own)
    return BlockLists(torch.argsort(~chosen, dim=-1, stable=True).int(), chosen.sum(-1).int())


PARTS: dict[str, Callable[[Workbench, dict[str, Shape]], None]] = {
    "check": check,
    "sweep": sweep,
    "host": host,
    "crossover": crossover,
    "spans": spans,
    "profile": profile,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_tile_rows", description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help=f"of {', '.join(PARTS)}; all if none")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes through Triton's interpreter")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
    bench = Workbench(arguments.dry_run)
    for name in arguments.parts or PARTS:
        started = time.monotonic()
        PARTS[name](bench, TINY if arguments.dry_run else SHAPES)
        print(f"({name}: {time.monotonic() - started:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
