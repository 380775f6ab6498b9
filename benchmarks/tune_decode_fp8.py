"""Times of decode on fp8 pages by the form of its programs and the number of splits, beside bfloat16.

    python -m benchmarks.tune_decode_fp8

Prints medians of CUDA graphs in microseconds, the most important cases first. A form whose result is off is reported
and not timed. It writes no CSV: a tuning run, not a claim.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from farspan.command import run_command
from farspan.engine_ext.splits import num_multiprocessors, plan_splits
from farspan.kernels import decode
from farspan.kernels.batch import FP8
from farspan.kernels.decode_workspace import make_decode_workspace
from farspan.kernels.tuning import DecodeConfig, decode_config

from benchmarks import calls
from benchmarks.decode_fp8 import DRAFTED, Case, make_batch
from benchmarks.gate import check_attention
from benchmarks.inputs import TINY, PagedBatch
from benchmarks.record import BenchmarkError
from benchmarks.timing import time_graphs

FORMS = {
    "by bytes": DecodeConfig(64),
    **{
        f"{groups} x {keys // groups} keys, {stages} stages": DecodeConfig(keys, groups, stages)
        for groups, keys, stages in ((1, 64, 3), (4, 128, 3), (1, 128, 3), (1, 64, 4), (4, 64, 3))
    },
}
DRAFT_FORMS = ("by bytes", "1 x 64 keys, 3 stages", "4 x 32 keys, 3 stages", "1 x 128 keys, 3 stages")
# Splits besides those that the engine plans, for the first forms.
SPLITS: tuple[tuple[Case, tuple[int, ...]], ...] = (
    (Case(8, 32768), (2, 4, 8)),
    (Case(1, 131072), (32, 33, 49)),
    (Case(32, 8192), (1, 4, 16)),
    (Case(1, 8192), (32, 64)),
)
SPLIT_FORMS = ("1 x 64 keys, 3 stages", "4 x 32 keys, 3 stages")


def call(batch: PagedBatch, query_len: int, config: DecodeConfig | None, num_splits: int) -> calls.Call:
    """Decode with a form and a number of splits; the launcher's own form where it is None."""
    kv, paged, shape = calls.kv_of(batch), calls.paged_of(batch), batch.shape
    workspace = make_decode_workspace(
        len(batch.query) * shape.num_q_heads * num_splits, shape.head_dim, batch.query.device
    )
    out, lse = calls.empty_results(batch)
    module: Any = decode

    def work() -> tuple[torch.Tensor, torch.Tensor]:
        if config is not None:
            module.decode_config = lambda *args, **options: config
        try:
            return decode.paged_decode(
                batch.query, kv, paged, shape.scale, num_splits=num_splits, min_split_keys=128, query_len=query_len,
                out=out, lse=lse, workspace=workspace,
            )  # fmt: skip
        finally:
            module.decode_config = decode_config

    return work


def time_case(case: Case, query_len: int, forms: Sequence[str], other_splits: Sequence[int]) -> None:
    """Check and time forms on one case."""
    copies = 1 if case.num_reqs * case.seq_len > 100_000 else 16
    batches = [make_batch(case, query_len, seed) for seed in range(copies)]
    in_fp8 = [replace(batch, kv_cache=batch.kv_cache.to(FP8)) for batch in batches]
    device = batches[0].query.device
    planned = plan_splits(case.num_reqs, case.shape.num_kv_heads, case.seq_len, num_multiprocessors(device)).num_splits
    print(f"{case.num_reqs} x {case.seq_len}, {query_len} tokens, {planned} splits planned", flush=True)
    wanted: dict[str, tuple[list[PagedBatch], DecodeConfig | None, int]] = {"bf16": (batches, None, planned)}
    for name in forms:
        wanted[name] = (in_fp8, FORMS[name], planned)
    for splits in other_splits:
        wanted[f"bf16, {splits} splits"] = (batches, None, splits)
        for name in SPLIT_FORMS:
            wanted[f"{name}, {splits} splits"] = (in_fp8, FORMS[name], splits)
    works: dict[str, list[Callable[[], object]]] = {}
    for name, (inputs, config, splits) in wanted.items():
        try:
            work = call(inputs[0], query_len, config, splits)
            error = check_attention(batches[0], *work(), name=name)
        except (BenchmarkError, RuntimeError) as problem:  # wrong, or too much shared memory
            print(f"  {name}: left out: {problem}", flush=True)
            continue
        works[name] = [work, *(call(batch, query_len, config, splits) for batch in inputs[1:])]
        print(f"  {name}: relative error {error:.1e}", flush=True)
    medians = {name: 1e3 * statistics.median(each) for name, each in time_graphs(works, repeats=15).items()}
    for name, us in medians.items():
        kv_bytes = batches[0].kv_bytes // (1 if name.startswith("bf16") else 2)
        print(
            f"  {name:36s} {us:7.1f} us  {kv_bytes / us / 1e6:5.2f} TB/s  {medians.get('bf16', 0.0) / us:5.2f} x bf16",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_decode_fp8", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="one tiny case")
    parser.add_argument("--forms", type=int, default=len(FORMS), help="how many of the forms")
    args = parser.parse_args()
    start = time.monotonic()
    if args.dry_run:
        shape = replace(TINY, page_size=64, dtype=torch.float16)
        for query_len in (1, DRAFTED):
            time_case(Case(3, 200, shape), query_len, DRAFT_FORMS, (2,))
        return
    names = list(FORMS)[: args.forms]
    for case, other_splits in SPLITS:
        time_case(case, 1, names, other_splits)
        print(f"{time.monotonic() - start:.0f} s", flush=True)
    for case in (Case(8, 32768), Case(1, 131072)):
        time_case(case, DRAFTED, DRAFT_FORMS, ())
        print(f"{time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(run_command("python -m benchmarks.tune_decode_fp8", main, (BenchmarkError,)))
