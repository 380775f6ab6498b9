"""Times the forms of the short-list kernel among which `kernels/tuning.py` chooses.

    python -m benchmarks.tune_short_lists [--forms NAME,NAME]

Prints milliseconds of 16 sequences of 65536 tokens, 8 heads of 64, with the lists of `prefill_block_sparse`: alone, and
each call behind 0.1 s of matrix products, as beside dense kernels. Each form runs in a process of its own under a time
limit, after it has been compared with attention in float32; one whose result differs, or that hangs, is reported and
not timed. It writes no CSV: a tuning run, not a claim.
"""

import argparse
import dataclasses
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from farspan.command import run_command
from farspan.kernels.contiguous.attention import attention_tiles
from farspan.kernels.contiguous.short_lists import LOG2_E, short_list_attention
from farspan.kernels.hopper.short_lists import hopper_short_lists
from farspan.kernels.tiles import BlockLists
from farspan.kernels.tuning import HopperShortListConfig, device_capability

from benchmarks import prefill_block_sparse as table
from benchmarks.inputs import default_device
from benchmarks.record import BenchmarkError
from benchmarks.timing import FLUSH_BYTES, graph_of

ALL = 10**9
FORMS: dict[str, HopperShortListConfig | None] = {
    "persistent": HopperShortListConfig(4, 264, form=0),
    "persistent, peeled": HopperShortListConfig(4, 264, form=1),
    "four, both products": HopperShortListConfig(4, 132, 96, 112, form=2, num_rings=2),
    "portable": None,
    "four, peeled": HopperShortListConfig(4, 132, 96, 112, form=1, num_rings=2),
    "a program a tile": HopperShortListConfig(4, ALL, form=0),
}
CHECK_SECONDS = 30
SILENT_SECONDS = 20
"""A run that prints nothing for so long is stopped; its start takes about ten."""
ALLOWED_ERROR = 2e-3


def call_of(
    form: str, inputs: table.Inputs, lists: BlockLists, has_lse: bool = False, num_programs: int = 0
) -> Callable[[], torch.Tensor]:
    """A call of a form, into outputs full of NaN. num_programs: instead of the form's, unless 0."""
    case, config = inputs.case, FORMS[form]
    if config is not None and num_programs:
        config = dataclasses.replace(config, num_programs=num_programs)
    out = torch.full_like(inputs.q, float("nan"))
    lse = torch.full((case.heads, case.batch * case.length), float("nan"), device=out.device) if has_lse else None
    scale = case.head_dim**-0.5
    tiles = attention_tiles(case.batch, case.length, case.length, device=out.device)

    def call() -> torch.Tensor:
        if config is None:
            short_list_attention(
                inputs.q, inputs.k, inputs.v, tiles, lists, scale, causal=False, lengths=None, out=out, lse=lse
            )
        else:
            hopper_short_lists(inputs.q, inputs.k, inputs.v, lists, scale * LOG2_E, out, lse, config)
        return out

    return call


def check(form: str) -> None:
    """Compare a form with float32, with and without the LSE, on lists of different lengths, one of them empty."""
    case = table.Case(1024, batch=2)
    lists = table.constant_lists(case)
    lists.block_counts[0, 3] = 0
    # Few programs have many tiles each.
    for has_lse, num_programs in ((False, 0), (True, 0), (False, 10), (True, 10)):
        inputs = table.Inputs.draw(case)
        out = call_of(form, inputs, lists, has_lse, num_programs)()
        visible = torch.zeros(8, 2 * 8, 8, dtype=torch.bool, device=out.device)
        for head in range(8):
            for tile in range(16):
                visible[head, tile, lists.block_ids[head, tile, : lists.block_counts[head, tile]].long()] = True
        visible = visible.view(8, 2, 8, 8).transpose(0, 1).repeat_interleave(128, 2).repeat_interleave(128, 3)
        q, k, v = (x.float().transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v))
        logits = (q @ k.transpose(2, 3) * case.head_dim**-0.5).masked_fill(~visible, float("-inf"))
        expected = (logits.softmax(-1).nan_to_num(0.0) @ v).transpose(1, 2)
        error = float((out.float() - expected).norm() / expected.norm())
        print(f"  {form:24s} {num_programs:3d} programs, error {error:.1e}", flush=True)
        if not error <= ALLOWED_ERROR:
            bad = (out.float() - expected).abs().amax(-1).nan_to_num(9.0) > 0.02
            by_tile = bad.view(2, 8, 128, 8).sum((2, 3)).tolist()
            print(f"    wrong rows by head {bad.sum((0, 1)).tolist()}, by tile {by_tile}", flush=True)
            raise BenchmarkError(f"{form}: relative error {error:.2e}")


def right_forms(forms: list[str]) -> list[str]:
    """Compile and check all forms at once, each in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.tune_short_lists", "--check"]
    processes = {form: subprocess.Popen([*command, form]) for form in forms}
    end = time.monotonic() + CHECK_SECONDS
    right = []
    for form, process in processes.items():
        try:
            if process.wait(max(1.0, end - time.monotonic())) == 0:
                right.append(form)
        except subprocess.TimeoutExpired:
            process.kill()
            print(f"  {form}: stopped after {CHECK_SECONDS} s", flush=True)
    return right


def median_ms(work: Callable[[], object], repeats: int, products: int = 0) -> float:
    """Median time of `work` with a cold L2 cache, behind so many products of large matrices."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    matrix = torch.randn(8192, 8192, dtype=torch.float16, device="cuda")
    samples = []
    for _ in range(repeats):
        for _ in range(products):
            torch.mm(matrix, matrix)
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        samples.append(start.elapsed_time(end))
    return statistics.median(samples)


def time_forms(forms: list[str]) -> None:
    """Time the forms one after the other; what each computes from lists of one block, and of none, too."""
    inputs = table.Inputs.draw(table.Case(65536))
    lists = table.constant_lists(inputs.case)
    for form in forms:
        call = call_of(form, inputs, lists)
        first = call().clone()
        for _ in range(5):
            if not torch.equal(call(), first):
                print(f"  {form}: TWO RUNS DIFFER", flush=True)
        del first
        replay, _ = graph_of([call])
        same = call_of(form, inputs, BlockLists(torch.zeros_like(lists.block_ids), lists.block_counts))
        none = call_of(form, inputs, BlockLists(lists.block_ids, torch.zeros_like(lists.block_counts)))
        # From the coolest to the hottest.
        time.sleep(1.0)
        alone, of_none, of_one, hot = (
            median_ms(work, repeats, products)
            for work, repeats, products in ((replay, 20, 0), (none, 8, 0), (same, 8, 0), (replay, 8, 60))
        )
        print(
            f"  {form:24s} alone {alone:.3f}, behind products {hot:.3f}, one block for all {of_one:.3f}, no block "
            f"{of_none:.3f}",
            flush=True,
        )


def time_long_lists(forms: list[str]) -> None:
    """TFLOP/s of the forms where lists name all 64 blocks, beside FlashAttention 3's dense call."""
    inputs = table.Inputs.draw(table.Case(8192, batch=4))
    case = inputs.case
    tiles = case.batch * case.length // 128
    ids = torch.arange(64, dtype=torch.int32, device=inputs.q.device).expand(1, tiles, 64).contiguous()
    lists = BlockLists(ids, torch.full((1, tiles), 64, dtype=torch.int32, device=ids.device))
    flops = 4 * case.length**2 * case.head_dim * case.heads * case.batch
    works: dict[str, Callable[[], torch.Tensor]] = {form: call_of(form, inputs, lists) for form in forms}
    try:
        works["fa3"] = table.fa3(inputs)
        expected = works["fa3"]().float()
        for form in forms:
            error = float((works[form]().float() - expected).norm() / expected.norm())
            print(f"    {form}: against fa3 {error:.1e}", flush=True)
    except Exception as problem:  # a diagnosis more, not what the run is for
        print(f"    fa3 left out: {problem!r}", flush=True)
    for name, work in works.items():
        print(f"  64 blocks, {name:24s} {flops / median_ms(work, 20) / 1e9:.0f} TFLOP/s", flush=True)


def time_apart(forms: list[str]) -> int:
    """Time forms in another process, which is stopped where one hangs; returns how many it timed."""
    command = [sys.executable, "-m", "benchmarks.tune_short_lists", "--time", ";".join(forms)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    done, waited = 0, select.poll()
    waited.register(process.stdout)
    while waited.poll(1000 * SILENT_SECONDS):
        line = process.stdout.readline()
        if not line:
            break
        print(line, end="", flush=True)
        done += "alone" in line
    else:
        print(f"  {forms[min(done, len(forms) - 1)]}: stopped, silent for {SILENT_SECONDS} s", flush=True)
        process.kill()
    process.wait()
    return done


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune_short_lists", description=__doc__)
    parser.add_argument("--check", help=argparse.SUPPRESS)
    parser.add_argument("--time", help=argparse.SUPPRESS)
    parser.add_argument("--forms", default=";".join(FORMS), help="names, with semicolons between (default: all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="start no timing after this long (default: 60)")
    arguments = parser.parse_args()
    if device_capability(default_device())[0] != 9:
        raise BenchmarkError("the kernel is for NVIDIA GPUs of compute capability 9.0")
    if arguments.check:
        check(arguments.check)
    elif arguments.time:
        time_forms(arguments.time.split(";"))
        time_long_lists(arguments.time.split(";"))
    else:
        start = time.monotonic()
        right = right_forms(arguments.forms.split(";"))
        print(f"checked in {time.monotonic() - start:.0f} s", flush=True)
        while right and time.monotonic() - start < arguments.seconds:
            done = time_apart(right)
            right = right[done if done == len(right) else done + 1 :]
        print(f"whole run {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(run_command("python -m benchmarks.tune_short_lists", main, (BenchmarkError,)))
