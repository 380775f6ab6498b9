"""Times the forms of the Hopper prefill kernel among which `kernels/tuning.py` chooses.

    python -m benchmarks.tune_hopper [--forms NAME,NAME] [--seconds 100]

Prints milliseconds, medians, beside FlashAttention 3's over all keys. Forms are compiled and compared with the portable
kernel in processes of their own, side by side and under a time limit; one whose result differs, or that hangs, is
reported and not timed. It writes no CSV: a tuning run, not a claim.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from farspan.command import run_command
from farspan.kernels.rotary_turn import Turn, make_string_turn
from farspan.kernels.tiles import BlockLists
from farspan.kernels.tuning import HopperPrefillConfig, device_capability

from benchmarks import calls, peers
from benchmarks.gate import relative_error
from benchmarks.inputs import AttentionShape, PagedBatch, PrefillCase, default_device, make_paged_batch
from benchmarks.prefill_lists import ALLOWED_ERROR, random_lists
from benchmarks.record import BenchmarkError
from benchmarks.timing import time_interleaved

WIDE, NARROW = AttentionShape(), AttentionShape(head_dim=64)
# Chunk, density of the lists (None: dense), and whether two thirds of the keys meet a turned query. First what a run
# that is cut short should not miss.
CASES: tuple[tuple[PrefillCase, float | None, bool], ...] = (
    (PrefillCase(65536, 65536, WIDE), None, True),
    (PrefillCase(32768, 32768, NARROW), None, False),
    (PrefillCase(32768, 32768, WIDE), None, False),
    (PrefillCase(16384, 131072, WIDE), 0.1, False),
    (PrefillCase(8192, 32768, WIDE), 0.3, False),
    (PrefillCase(8192, 32768, NARROW), 0.3, False),
    (PrefillCase(8192, 8192, WIDE), None, False),
    (PrefillCase(65536, 65536, WIDE), None, False),
    (PrefillCase(8192, 8192, NARROW), None, False),
    (PrefillCase(32768, 32768, NARROW), None, True),
    (PrefillCase(16384, 131072, WIDE), None, False),
)
ANY, ONLY_NARROW = (64, 128), (64,)
FORMS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "2 stages": (ANY, {"num_stages": 2}),
    "halves": (ONLY_NARROW, {"num_stages": 2, "in_halves": True}),
    "4 stages": (ONLY_NARROW, {"num_stages": 4}),
}
CHECKED_TOKENS = 2048
CHECK_SECONDS = 65


def is_made_for(form: str, case: PrefillCase, turns: bool) -> bool:
    """Whether the form runs on the heads, and its buffers fit into shared memory."""
    head_dims, fields = FORMS[form]
    head_dim = case.shape.head_dim
    if turns and fields.get("in_halves"):
        return False
    return head_dim in head_dims and not (turns and head_dim > 64 and fields["num_stages"] > 2)


def config_of(form: str) -> HopperPrefillConfig:
    return HopperPrefillConfig(heads_in_a_row=8, **FORMS[form][1])


def inputs(case: PrefillCase, density: float | None, turns: bool) -> tuple[PagedBatch, BlockLists | None, Turn | None]:
    batch = make_paged_batch([case.query_len], [case.seq_len], case.shape)
    lists = None if density is None else random_lists(calls.tiles_of(batch), case.shape.num_q_heads, density)
    turn: Turn | None = None
    if turns:
        inv_freq = 10_000.0 ** -(torch.arange(case.shape.head_dim // 2) / (case.shape.head_dim // 2))
        turn = make_string_turn(inv_freq, case.seq_len // 3, 128, True, batch.query.device)
    return batch, lists, turn


def check(form: str, head_dim: int) -> None:
    """Print, as JSON, the error of a form against the portable kernel on small cases of each kind."""
    for index, kind in enumerate(each for each in kinds_of(form) if each[0] == head_dim):
        _, has_lists, turns = kind
        # An odd number of blocks, and an odd length.
        case = PrefillCase(CHECKED_TOKENS + 63, CHECKED_TOKENS + 63 + 128 * index, AttentionShape(head_dim=head_dim))
        batch, lists, turn = inputs(case, 0.3 if has_lists else None, turns)
        out, lse = calls.prefill(batch, turn, block_lists=lists, config=config_of(form))()
        expected, expected_lse = calls.prefill(batch, turn, block_lists=lists, portable=True)()
        error = relative_error(out, expected.float())
        lse_error = float((lse - expected_lse).abs().max())
        print(json.dumps({"form": form, "kind": kind, "error": error, "lse_error": lse_error}), flush=True)


def kinds_of(form: str) -> list[tuple[int, bool, bool]]:
    """Head size, lists and turn of the cases that a form is made for."""
    kinds = [
        (c.shape.head_dim, density is not None, turns) for c, density, turns in CASES if is_made_for(form, c, turns)
    ]
    return sorted(set(kinds))


def right_forms(forms: list[str]) -> set[tuple[str, tuple[int, bool, bool]]]:
    """Compile and check all forms at once, each in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.tune_hopper", "--check"]
    processes = {
        (form, head_dim): subprocess.Popen(
            [*command, f"{form},{head_dim}"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for form in forms
        for head_dim in FORMS[form][0]
    }
    end = time.monotonic() + CHECK_SECONDS
    peers.has_module("vllm.vllm_flash_attn")  # its import takes as long as the checks
    right = set()
    for (form, head_dim), process in processes.items():
        try:
            output, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            output += "\n  stopped at the time limit"
        for line in output.splitlines():
            if not line.startswith("{"):
                continue
            result = json.loads(line)
            is_right = result["error"] <= ALLOWED_ERROR[torch.bfloat16] and result["lse_error"] < 1e-3
            print(
                f"  {form:20s} {result['kind']} error {result['error']:.1e} lse {result['lse_error']:.1e}", flush=True
            )
            if is_right:
                right.add((form, tuple(result["kind"])))
        if process.returncode:
            print(
                f"  {form} {head_dim}: FAILED {process.returncode}\n" + "\n".join(output.splitlines()[-6:]), flush=True
            )
    return right


def time_case(case: PrefillCase, density: float | None, turns: bool, forms: list[str]) -> None:
    """Time forms on one case."""
    batch, lists, turn = inputs(case, density, turns)
    print(f"{case.name} density {density} turn {turns}", flush=True)
    works: dict[str, Callable[[], object]] = {}
    if peers.has_module("vllm.vllm_flash_attn"):
        works["fa3"] = peers.fa3(batch)
    for form in forms:
        works[form] = calls.prefill(batch, turn, block_lists=lists, config=config_of(form))
    repeats = 5 if case.query_len > 40000 or case.seq_len > 100000 else 15
    for name, samples in time_interleaved(works, repeats=repeats, warmup=1).items():
        print(f"  {name:20s} {statistics.median(samples):9.3f}  (least {min(samples):.3f})", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_hopper", description=__doc__)
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--forms", default=",".join(FORMS), help="names, with commas between (default: all)")
    parser.add_argument("--seconds", type=float, default=100.0, help="start no case after this long (default: 100)")
    arguments = parser.parse_args()
    if device_capability(default_device())[0] != 9:
        raise BenchmarkError("the kernel is for NVIDIA GPUs of compute capability 9.0")
    if arguments.check:
        form, head_dim = arguments.check.split(",")
        check(form, int(head_dim))
        return
    start = time.monotonic()
    forms = arguments.forms.split(",")
    unknown = sorted(set(forms) - set(FORMS))
    if unknown:
        raise BenchmarkError(f"--forms: {', '.join(unknown)}; known are {', '.join(FORMS)}")
    right = right_forms(forms)
    print(f"checked in {time.monotonic() - start:.0f} s", flush=True)
    for case, density, turns in CASES:
        kind = (case.shape.head_dim, density is not None, turns)
        timed = [form for form in forms if (form, kind) in right]
        if time.monotonic() - start < arguments.seconds and timed:
            time_case(case, density, turns, timed)
    print(f"whole run {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(run_command("python -m benchmarks.tune_hopper", main, (BenchmarkError,)))
