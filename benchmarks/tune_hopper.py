"""Times the forms of the Hopper prefill kernel among which `kernels/tuning.py` chooses.

    python -m benchmarks.tune_hopper

Prints milliseconds, medians, beside the portable kernel's and, for dense prefill, FlashAttention 3's. A form whose
result differs from the portable kernel's is reported and not timed. It writes no CSV: a tuning run, not a claim.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from farspan.command import run_command
from farspan.kernels.rotary_turn import Turn, make_string_turn
from farspan.kernels.tiles import BlockLists
from farspan.kernels.tuning import HopperPrefillConfig, device_capability

from benchmarks import calls, peers
from benchmarks.gate import relative_error
from benchmarks.inputs import AttentionShape, PrefillCase, default_device, make_paged_batch
from benchmarks.prefill_lists import ALLOWED_ERROR, random_lists
from benchmarks.record import BenchmarkError
from benchmarks.timing import time_interleaved

WIDE, NARROW = AttentionShape(), AttentionShape(head_dim=64)
# Chunk, density of the lists (None: dense), and whether a third of the keys meets a turned query. First what the kernel
# is chosen for, since a run may be cut short; FlashAttention 3 computes plain dense attention.
CASES: tuple[tuple[PrefillCase, float | None, bool], ...] = (
    (PrefillCase(8192, 32768, WIDE), 0.3, False),
    (PrefillCase(32768, 32768, WIDE), None, True),
    (PrefillCase(8192, 32768, NARROW), 0.3, False),
    (PrefillCase(32768, 32768, WIDE), None, False),
    (PrefillCase(32768, 32768, NARROW), None, False),
    (PrefillCase(8192, 8192, WIDE), None, False),
    (PrefillCase(2048, 32768, WIDE), None, False),
    (PrefillCase(4096, 4096, WIDE), None, False),
    (PrefillCase(2048, 2048, WIDE), None, False),
    (PrefillCase(131072, 131072, WIDE), None, False),
)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {"overlaps": False},
    "overlaps": {"overlaps": True},
    "overlaps, 4 stages": {"overlaps": True, "num_stages": 4},
}


def time_case(case: PrefillCase, density: float | None, turns: bool, forms: Mapping[str, dict[str, Any]]) -> None:
    """Check and time all forms on one case."""
    batch = make_paged_batch([case.query_len], [case.seq_len], case.shape)
    lists: BlockLists | None = None
    if density is not None:
        lists = random_lists(calls.tiles_of(batch), case.shape.num_q_heads, density)
    turn: Turn | None = None
    if turns:
        inv_freq = 10_000.0 ** -(torch.arange(case.shape.head_dim // 2) / (case.shape.head_dim // 2))
        turn = make_string_turn(inv_freq, case.seq_len // 3, 128, True, batch.query.device)
    print(f"{case.name} density {density} turn {turns}", flush=True)
    portable = calls.prefill(batch, turn, block_lists=lists, portable=True)
    expected = portable()[0].float()
    works: dict[str, Callable[[], object]] = {"portable": portable}
    if density is None and not turns and peers.has_module("vllm.vllm_flash_attn"):
        works["fa3"] = peers.fa3(batch)
    for name, form in forms.items():
        # Four stages of wide heads are more than the shared memory holds.
        if form.get("num_stages", 2) > 2 and case.shape.head_dim > 64:
            continue
        config = HopperPrefillConfig(**({"heads_in_a_row": 8, "num_stages": 2} | form))
        call = calls.prefill(batch, turn, block_lists=lists, config=config)
        out = call()[0]
        error = relative_error(out, expected)
        if error <= ALLOWED_ERROR[case.shape.dtype]:
            works[name] = call
        else:
            print(f"  {name}: WRONG, differs from the portable kernel by {error:.1e}", flush=True)
    repeats = 4 if case.query_len > 60000 else 15
    for name, samples in time_interleaved(works, repeats=repeats).items():
        print(f"  {name:20s} {statistics.median(samples):9.3f}  (least {min(samples):.3f})", flush=True)


def main() -> None:
    argparse.ArgumentParser(prog="python -m benchmarks.tune_hopper", description=__doc__).parse_args()
    if device_capability(default_device())[0] != 9:
        raise BenchmarkError("the kernel is for NVIDIA GPUs of compute capability 9.0")
    for case, density, turns in CASES:
        time_case(case, density, turns, FORMS)


if __name__ == "__main__":
    sys.exit(run_command("python -m benchmarks.tune_hopper", main, (BenchmarkError,)))
