"""Times forms of attention over short lists: the short-list kernel's, and the Hopper prefill kernel.

    python -m benchmarks.tune_short_lists

Prints milliseconds, medians, on the longest case of the benchmark `prefill_block_sparse`. A form whose result differs
from that of the form in use is reported and not timed. It writes no CSV: a tuning run, not a claim.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial

import torch
from farspan.command import run_command
from farspan.kernels.batch import PagedBatch
from farspan.kernels.contiguous import attention as contiguous
from farspan.kernels.contiguous.short_lists import short_list_attention
from farspan.kernels.prefill import prefill_attention
from farspan.kernels.tiles import BlockLists
from farspan.kernels.tuning import HopperPrefillConfig, PrefillConfig, ShortListConfig, device_capability

from benchmarks.gate import relative_error
from benchmarks.inputs import default_device
from benchmarks.prefill_block_sparse import BLOCK_SIZE, Case, Inputs, constant_lists
from benchmarks.record import BenchmarkError
from benchmarks.timing import time_interleaved

ALLOWED_ERROR = 4e-3
SHORT_LISTS = {
    "in use": None,
    "128 keys, 2 stages": ShortListConfig(128, 8, 2, use_tma=True, add_by_hand=True, max_registers=128),
    "128 keys, 4 warps": ShortListConfig(128, 4, 2, use_tma=True, add_by_hand=True),
    "64 keys, 3 stages": ShortListConfig(64, 8, 3, use_tma=True, add_by_hand=True, max_registers=128),
    "64 keys, 4 warps": ShortListConfig(64, 4, 3, use_tma=True, add_by_hand=True),
}
PREFILL = {f"hopper, {heads} heads in a row": HopperPrefillConfig(heads, 2, overlaps=False) for heads in (8, 1)}


def by_prefill(
    inputs: Inputs, lists: BlockLists, out: torch.Tensor, config: HopperPrefillConfig | PrefillConfig | None
) -> None:
    """Attention by the kernel of prefill, with every sequence as one page."""
    case = inputs.case
    layout = contiguous._layout(case.batch, case.length, case.length, BLOCK_SIZE, inputs.q.device)
    prefill_attention(
        inputs.q.flatten(0, 1),
        inputs.k.transpose(1, 2),
        inputs.v.transpose(1, 2),
        PagedBatch(
            layout.query_start_loc,
            layout.seq_lens,
            layout.block_table,
            max_query_len=case.length,
            max_kv_len=case.length,
        ),
        layout.tiles,
        case.head_dim**-0.5,
        block_lists=lists,
        causal=False,
        out=out.flatten(0, 1),
        config=config,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_short_lists", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="a tiny case, without the forms for Hopper")
    args = parser.parse_args()
    is_hopper = device_capability(default_device())[0] == 9
    if not is_hopper and not args.dry_run:
        raise BenchmarkError("the forms are for NVIDIA GPUs of compute capability 9.0")
    case = Case(256, batch=1) if args.dry_run else Case(65536)
    inputs, lists = Inputs.draw(case), constant_lists(case)
    tiles = contiguous.attention_tiles(case.batch, case.length, case.length, BLOCK_SIZE, device=inputs.q.device)
    out = torch.empty_like(inputs.q)
    works: dict[str, Callable[[], None]] = {
        name: partial(
            short_list_attention, inputs.q, inputs.k, inputs.v, tiles, lists, case.head_dim**-0.5,
            causal=False, lengths=None, out=out, lse=None, config=config,
        )
        for name, config in SHORT_LISTS.items()
        if is_hopper or config is None
    }  # fmt: skip
    works |= {
        name: partial(by_prefill, inputs, lists, out, config)
        for name, config in ({"prefill, as chosen": None} | (PREFILL if is_hopper else {})).items()
    }
    expected: torch.Tensor | None = None
    for name, work in list(works.items()):
        out.fill_(float("nan"))
        try:
            work()
            sample = out[:: case.batch // 2 or 1].float()
        except RuntimeError as problem:
            print(f"  {name}: left out: {problem}", flush=True)
            del works[name]
            continue
        expected = sample if expected is None else expected
        error = relative_error(sample, expected)
        if not error <= ALLOWED_ERROR:
            print(f"  {name}: WRONG, differs from the form in use by {error:.1e}", flush=True)
            del works[name]
    for name, samples in time_interleaved(works, repeats=15).items():
        print(f"  {name:28s} {statistics.median(samples):7.3f} ms  (least {min(samples):.3f})", flush=True)


if __name__ == "__main__":
    sys.exit(run_command("python -m benchmarks.tune_short_lists", main, (BenchmarkError,)))
