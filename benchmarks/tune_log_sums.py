"""Time forms of the pass over the keys: `python3 -m benchmarks.tune_log_sums`; taken out again when one is chosen."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks._bootstrap import ensure_farspan

ensure_farspan()

NAMES = ("MODE", "PIPE", "AREG", "POLY")
FORMS = [form.split(",") for form in os.environ.get("FORMS", "").split()] or [
    ["now"], ["prod", 1, 0, 0], ["whole", 0, 0, 0], ["halves", 1, 0, 0], ["halves", 1, 64, 0], ["whole", 0, 0, 8], ["halves", 1, 0, 8],
    ["whole", 0, 0, 4], ["halves", 1, 0, 4], ["alone", 0, 128, 0], ["alone", 1, 128, 0], ["alone", 0, 0, 0],
    ["alone", 1, 64, 0], ["alone", 1, 128, 8], ["alone", 0, 128, 8],
]  # fmt: skip


@contextlib.contextmanager
def form_in_place(form: list[Any]) -> Iterator[None]:
    from farspan.kernels.hopper import log_sums

    from benchmarks import log_sums_forms

    kernel, real = log_sums.hopper_log_sums_kernel, log_sums.RepeatedLaunch
    if form[0] == "prod":
        from benchmarks import log_sums_prod

        log_sums.hopper_log_sums_kernel = log_sums_prod.hopper_log_sums_kernel
    elif form[0] != "now":
        pipe, areg, poly = (int(each) for each in form[1:])
        log_sums.hopper_log_sums_kernel = (
            log_sums_forms.alone_kernel if form[0] == "alone" else log_sums_forms.forms_kernel
        )

        def launch(kernel: Any, grid: Any, names: Any, fixed: dict[str, Any], **options: Any) -> Any:
            head_dim = HEAD_DIM[0]
            flags = {"PIPE": pipe, "AREG": min(areg, head_dim), "POLY": poly}
            return real(kernel, grid, names, fixed | flags, **options)

        log_sums.RepeatedLaunch = launch
    try:
        yield
    finally:
        log_sums.hopper_log_sums_kernel, log_sums.RepeatedLaunch = kernel, real


HEAD_DIM = [128]


def extremes(bench: Any, batch: Any, rule: Any, config: Any) -> str:
    from farspan.kernels.flex import tile_rows_reference
    from farspan.kernels.flex.spans import MASS_UNIT, make_spans
    from farspan.kernels.tiles import make_prefill_tiles

    from benchmarks.inputs import contiguous_kv

    masses, select, spans, tiles, budget = bench.selection(batch, rule, config)
    found_all = masses().clone()
    key, _ = contiguous_kv(batch, 0)
    group = batch.shape.num_q_heads // batch.shape.num_kv_heads
    keys = key.float().repeat_interleave(group, 1).permute(1, 2, 0).contiguous()
    mass = torch.zeros(
        batch.shape.num_q_heads, spans.num_spans, 2, tiles.max_kv_blocks, dtype=torch.int32, device=bench.device
    )
    columns = (spans.span_request.tolist(), spans.span_index.tolist(), spans.span_row.tolist())
    worst, high, low, wrong = 0.0, 0, 0, 0
    for span, (request, index, row) in enumerate(zip(*columns, strict=True)):
        if request < 0:
            continue
        place = rule.places(torch.tensor(index, device=bench.device))
        end = (index + 1) * rule.span_len
        logits = batch.query[row + place].float().transpose(0, 1) @ keys[..., :end] * batch.shape.scale
        hidden = torch.arange(end, device=bench.device) > (index * rule.span_len + place)[:, None]
        logits = logits.masked_fill_(hidden, float("-inf"))
        blocks = logits.unflatten(2, (-1, bench.block_size)).logsumexp(-1)
        expected, found = blocks.transpose(1, 2) / 0.6931471805599453, found_all[:, span, : blocks.shape[2]]
        first = expected[:, :1]
        near = expected > first - 100
        high += int((expected > first + 128).sum())
        low += int((~near & expected.isfinite()).sum())
        error = (found - expected).abs() / expected.abs().clamp(min=64) * 64
        worst = max(worst, float(error[near].max()))
        wrong += int((found.isnan() | (~near & ~(found < first - 99))).sum())
        halves = blocks.softmax(2).unflatten(1, (-1, 2)).mean(1) / 2
        mass[:, span, :, : blocks.shape[2]] = (halves * MASS_UNIT + 0.5).int()
    starts = batch.query_start_loc.tolist()
    cpu_tiles = make_prefill_tiles(starts, batch.seq_lens_cpu, bench.block_size, torch.device("cpu"))
    cpu_spans = make_spans(starts, batch.seq_lens_cpu, cpu_tiles, rule)
    expected_lists = tile_rows_reference.choose(mass.cpu(), cpu_spans, cpu_tiles, budget).block_lists
    lists = select().block_lists
    counts = lists.block_counts.cpu()
    listed = torch.arange(tiles.max_kv_blocks) < counts[..., None]
    differs = (counts != expected_lists.block_counts) | (
        (lists.block_ids.cpu() != expected_lists.block_ids) & listed
    ).any(-1)
    from farspan.kernels.flex.tile_rows import LogSumsLaunch

    from benchmarks.calls import kv_of, paged_of

    key_pages, by_splits = kv_of(batch).split()[0], []
    for num_splits in (1, 2, 7):
        out = torch.full_like(found_all, 7.0)
        launch = LogSumsLaunch(
            batch.query, key_pages, paged_of(batch), spans, tiles.max_kv_blocks, 128, None, config, num_splits
        )
        launch(batch.query, key_pages, batch.shape.scale, None, out)
        by_splits.append(out)
    same = [torch.equal(each, by_splits[0]) for each in by_splits]
    import dataclasses

    from benchmarks.inputs import PagedBatch  # noqa: F401

    tail = 2300 * batch.query.shape[0] // 4500
    shorter = dataclasses.replace(
        batch, query=batch.query[-tail:].contiguous(), query_lens_cpu=[tail],
        query_start_loc=torch.tensor([0, tail], dtype=torch.int32, device=bench.device),
    )  # fmt: skip
    masses2, _, spans2, *_ = bench.selection(shorter, rule, config)
    other, by_index, compared, differing = masses2(), {}, 0, 0
    for span, (request, index) in enumerate(zip(spans.span_request.tolist(), spans.span_index.tolist(), strict=True)):
        if request >= 0:
            by_index[index] = span
    for span, (request, index) in enumerate(zip(spans2.span_request.tolist(), spans2.span_index.tolist(), strict=True)):
        if request >= 0:
            blocks = (index + 1) * rule.span_len // bench.block_size
            compared += 1
            differing += not torch.equal(other[:, span, :blocks], found_all[:, by_index[index], :blocks])
    same.append(f"{differing} of {compared} spans differ in another chunk")
    verdict = (
        f"{'right' if worst < 1e-3 and wrong == 0 else 'WRONG'}: off by {worst:.1e}, wrong {wrong}, {high} above, "
        f"{low} below, equal by splits {same}, {float(differs.float().mean()):.4f} of lists differ"
    )
    return verdict


def check(form: list[Any]) -> None:
    from farspan.kernels.flex.spans import SpanRule
    from farspan.kernels.tuning import HopperLogSumsConfig

    from benchmarks.tune_tile_rows import SHAPES, Workbench, check_form

    bench = Workbench(False)
    rule, config = SpanRule(128, 16), HopperLogSumsConfig(num_stages=4)
    good = True
    for name in ("8b", "0.5b"):
        shape = SHAPES[name]
        HEAD_DIM[0] = shape.head_dim
        with form_in_place(form):
            batch = bench.chunk(shape, 4500, 10000)
            batch.query.mul_(3)
            try:
                print(f"check {form} {name}: {check_form(bench, batch, rule, config)}", flush=True)
                generator = torch.Generator(bench.device).manual_seed(1)
                pages = batch.kv_cache
                loud = torch.rand(pages.shape[:3], generator=generator, device=pages.device) < 0.002
                pages[..., : shape.head_dim][loud] *= 30
                verdict = extremes(bench, batch, rule, config)
                print(f"extremes {form} {name}: {verdict}", flush=True)
                good = good and (verdict.startswith("right") or form[0] == "now")
            except Exception as problem:
                good = False
                print(f"check {form} {name}: {type(problem).__name__} {str(problem)[-300:]}", flush=True)
    raise SystemExit(0 if good else 1)


def main() -> None:
    if len(sys.argv) > 1:
        return check(sys.argv[1].split(","))
    started = time.monotonic()
    words = [",".join(map(str, form)) for form in FORMS]
    checks = [subprocess.Popen([sys.executable, "-m", "benchmarks.tune_log_sums", word]) for word in words]
    right = []
    for form, process in zip(FORMS, checks, strict=True):
        try:
            code = process.wait(max(1.0, 150 - (time.monotonic() - started)))
        except subprocess.TimeoutExpired:
            process.kill()
            code = "too long"
        print(f"{form}: {code} after {time.monotonic() - started:.0f} s", flush=True)
        if code == 0:
            right.append(form)
    from farspan.kernels.flex.spans import SpanRule
    from farspan.kernels.tuning import HopperLogSumsConfig

    from benchmarks.timing import time_interleaved
    from benchmarks.tune_tile_rows import SHAPES, Workbench

    bench = Workbench(False)
    rule, config = SpanRule(128, 16), HopperLogSumsConfig(num_stages=4)
    cases = [("8b", 8192, 131072), ("8b", 8192, 32768), ("8b", 16384, 131072), ("0.5b", 8192, 131072), ("8b", 8192, 8192)]
    for name, query_len, seq_len in cases:
        shape = SHAPES[name]
        HEAD_DIM[0] = shape.head_dim
        batch = bench.chunk(shape, query_len, seq_len)
        works, lists, flops = {}, {}, batch.causal_flops / 2 / 8
        for form in right:
            if form[0] != "now" and shape.head_dim == 64 and form[:3] == ['halves', 1, 64]:
                continue
            with form_in_place(form):
                masses, select, *_ = bench.selection(batch, rule, config)
                masses()
                lists[str(form)] = select().block_lists
            works[str(form)] = masses
        for form, samples in time_interleaved(works, repeats=9, warmup=2).items():
            ms = sorted(samples)[len(samples) // 2]
            same = torch.equal(lists[form].block_counts, lists["['now']"].block_counts) if "['now']" in lists else None
            print(
                f"time {name} q{query_len} n{seq_len} {form}: {ms:.3f} ms (least {min(samples):.3f}), "
                f"{flops / ms / 1e9:.0f} TFLOP/s, counts as now: {same}",
                flush=True,
            )
        del batch, works, lists
    print(f"{time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
