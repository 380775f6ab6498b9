"""Whether a change makes anything slower: two revisions on one machine in one run, in turns.

    python -m benchmarks.compare_revisions --base DIR [--base-adapter FILE] --out CSVDIR [--kernels] [--engine]

DIR is another checkout of this repository. FILE is a module like `benchmarks/calls.py` that calls that checkout's
kernels; by default `benchmarks/calls.py` calls them too. Where DIR is no git checkout, the environment variable
FARSPAN_BASE_COMMIT names its commit. Each revision runs in separate processes, which prepare a case and then time one
call per message; the order within a turn is random. Rows have the benchmark `no_harm` and the variants `before` and
`after`. Printed per case: the ratio of the times after and before, over the turns. --kernels runs only the kernels,
--engine only the engines; neither or both runs everything.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from farspan.command import make_folder, run_command

from benchmarks.compare_cases import ENGINE_MODEL, TIME_ONCE, engine_cases, kernel_cases
from benchmarks.engine import LOGPROB_TOLERANCE, TINY_LLAMA, Answer, Engine, EngineSpec, Request, logprob_distance
from benchmarks.record import ROOT, BenchmarkError, Environment, Recorder, commit_of, iso_date, quantile
from benchmarks.worker_process import WorkerProcess

T = TypeVar("T")

PROGRAM = "python -m benchmarks.compare_revisions"
NAME = "no_harm"
BEFORE, AFTER = "before", "after"
KERNEL_REPEATS = 15
TIMEOUT_S = 540
# Two engines share one GPU.
ENGINE_ROOM = {"kv_cache_memory_bytes": 10 * 2**30, "gpu_memory_utilization": 0.4}
# Largest error of a row, relative to its norm, between two exact kernels in bfloat16.
SAME_RESULT = 0.02


class Comparison:
    """Records the times of both revisions, and prints their ratio."""

    def __init__(self, before: Recorder, after: Recorder) -> None:
        self.recorders = {BEFORE: before, AFTER: after}
        self.ratios: dict[str, float] = {}
        """Median per case."""

    def add(self, case: str, samples: Mapping[str, list[float]]) -> None:
        """Record milliseconds of each side; sample i of both sides is from the same turn."""
        for side, recorder in self.recorders.items():
            recorder.add(NAME, case, side, "time", "ms", samples[side])
        ratios = [after / before for before, after in zip(samples[BEFORE], samples[AFTER], strict=True)]
        self.ratios[case] = quantile(ratios, 0.5)
        low, high = quantile(ratios, 0.2), quantile(ratios, 0.8)
        self.note(f"{case}: after / before {self.ratios[case]:.3f} [{low:.3f}, {high:.3f}]")

    def note(self, text: str) -> None:
        self.recorders[AFTER].note(text)

    def summarise(self) -> None:
        """Print all ratios, the slowest first."""
        for case, ratio in sorted(self.ratios.items(), key=lambda each: -each[1]):
            print(f"{ratio:7.3f}  {case}", flush=True)


def take_turns(repeats: int, measure: Callable[[str, int], T], seed: int) -> dict[str, list[T]]:
    """Call `measure(side, repeat)` for both sides, `repeats` times; `seed` draws which side is first in each turn."""
    order = random.Random(seed)
    samples: dict[str, list[T]] = {BEFORE: [], AFTER: []}
    for repeat in range(repeats):
        for side in order.sample([BEFORE, AFTER], 2):
            samples[side].append(measure(side, repeat))
    return samples


def difference(before: Any, after: Any) -> float:
    """Largest difference of a row of two results, relative to the row's norm; infinite where one is not finite."""
    a, b = torch.from_numpy(before), torch.from_numpy(after)
    norms = torch.linalg.vector_norm(a, dim=-1).clamp_min(1e-6)
    largest = float((torch.linalg.vector_norm(a - b, dim=-1) / norms).max())
    return largest if largest == largest else float("inf")


def compare_kernels(
    comparison: Comparison, environments: dict[str, dict[str, str]], adapters: dict[str, Path], dry_run: bool
) -> None:
    """Time every kernel case. Raises BenchmarkError where the two revisions' exact results differ."""
    deadline = time.monotonic() + TIMEOUT_S
    with ExitStack() as stack:
        workers = {
            side: stack.enter_context(
                WorkerProcess(side, "benchmarks.compare_worker", [str(adapters[side])], environment, deadline)
            )
            for side, environment in environments.items()
        }
        for index, case in enumerate(kernel_cases(dry_run)):
            for worker in workers.values():
                worker.send(case)
            results = {side: worker.receive() for side, worker in workers.items()}
            if any(result is None for result in results.values()):
                comparison.note(f"{case.name}: left out, this machine cannot compute it")
                continue
            error = difference(results[BEFORE], results[AFTER])
            comparison.note(f"{case.name}: results differ by {error:.1e}")
            if case.gamma is None and not error <= SAME_RESULT:
                raise BenchmarkError(f"{case.name}: results differ by {error:.1e}, allowed {SAME_RESULT}")
            repeats = 5 if dry_run else KERNEL_REPEATS
            comparison.add(case.name, take_turns(repeats, lambda side, _: workers[side].ask(TIME_ONCE), index))


def compare_engines(comparison: Comparison, environments: dict[str, dict[str, str]], dry_run: bool) -> None:
    """Time whole requests in vLLM. Raises BenchmarkError where dense answers differ."""
    model, label = (TINY_LLAMA, "tiny-fp32") if dry_run else (ENGINE_MODEL, "llama8b-16layers-bf16")
    for case in engine_cases(dry_run):
        requests = [request for each in case.requests.values() for request in each]
        specs = {
            side: EngineSpec(
                requests,
                model,
                "CUSTOM",
                {"prefill": case.prefill},
                {} if dry_run else ENGINE_ROOM,
                warmup_lens=[request.prompt_len for request in requests[:2]],
                environment=environment,
            )
            for side, environment in environments.items()
        }
        deadline = time.monotonic() + TIMEOUT_S
        with ExitStack() as stack:
            engines = {side: stack.enter_context(Engine(spec, deadline)) for side, spec in specs.items()}
            for side, engine in engines.items():
                comparison.note(f"{side}: engine ready after {engine.receive():.0f} s")
            for method, each in case.requests.items():
                for request in each:
                    compare_requests(comparison, engines, request, f"{method}-n{request.prompt_len}-b1-{label}")


def compare_requests(comparison: Comparison, engines: dict[str, Engine], request: Request, case: str) -> None:
    """Time one prompt length with one method."""

    def measure(side: str, repeat: int) -> Answer:
        return engines[side].answer(request, repeat)

    answers = take_turns(request.repeats, measure, request.prompt_len)
    timings = {side: [answer.timing for answer in each] for side, each in answers.items()}
    distance = max(logprob_distance(a, b) for a, b in zip(timings[BEFORE], timings[AFTER], strict=True))
    comparison.note(f"{case}: first-token log probabilities differ by {distance:.3f}")
    if case.startswith("dense") and not distance <= LOGPROB_TOLERANCE:
        raise BenchmarkError(f"{case}: log probabilities off by {distance:.3f}, allowed {LOGPROB_TOLERANCE}")
    comparison.add(f"ttft-{case}", {side: [timing.ttft_ms for timing in each] for side, each in timings.items()})
    # The first interval holds what is allocated at first use.
    tpot = {side: [quantile(timing.tpot_ms[1:], 0.5) for timing in each] for side, each in timings.items()}
    comparison.add(f"tpot-{case}", tpot)


def environment_of(checkout: Path, folder: Path) -> dict[str, str]:
    """Environment variables with which a process imports the checkout's `farspan`; `folder` gets the link tree.

    Raises BenchmarkError where the process would import another `farspan`.
    """
    command = "import sys; from pathlib import Path; from tools.link_tree import make_link_tree; "
    command += "make_link_tree(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", command, str(folder)], cwd=checkout, check=True)
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = "import importlib.util; print(importlib.util.find_spec('farspan.engine_ext').origin)"
    found = subprocess.run(
        [sys.executable, "-c", command],
        env=os.environ | environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    imported = Path(found.stdout.strip()).resolve()
    if not imported.is_relative_to(checkout.resolve()):
        raise BenchmarkError(f"{checkout}: its farspan would be imported from {imported}")
    return environment


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, required=True, metavar="DIR", help="checkout of the revision before")
    parser.add_argument(
        "--base-adapter", type=Path, default=ROOT / "benchmarks" / "calls.py", metavar="FILE",
        help="module that calls its kernels (default: this revision's benchmarks/calls.py)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder of the CSV files; needed unless --dry-run")
    parser.add_argument("--kernels", action="store_true", help="single calls only")
    parser.add_argument("--engine", action="store_true", help="requests in vLLM only")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on any machine; writes nothing")
    parser.add_argument("--date", type=iso_date, help="date of the rows, YYYY-MM-DD (default: today)")
    arguments = parser.parse_args()
    if not (arguments.base / "pyproject.toml").is_file():
        parser.error(f"--base {arguments.base} is no checkout of this repository")
    if not arguments.base_adapter.is_file():
        parser.error(f"--base-adapter {arguments.base_adapter} is no file")
    if arguments.out is None and not arguments.dry_run:
        parser.error("--out DIR says where the rows go; --dry-run writes none")
    return arguments


def main() -> int:
    arguments = parse_arguments()
    return run_command(PROGRAM, lambda: run(arguments), (BenchmarkError,))


def run(arguments: argparse.Namespace) -> None:
    """Compare what was asked for. Raises BenchmarkError or ConfigError."""
    dry_run: bool = arguments.dry_run
    if not (dry_run or torch.cuda.is_available()):
        raise BenchmarkError("revisions are compared on a CUDA GPU; try it out without one by --dry-run.")
    both = arguments.kernels == arguments.engine
    environment = Environment.detect(arguments.date)
    base_commit = commit_of(arguments.base, "FARSPAN_BASE_COMMIT") if environment.commit else ""
    out = None if dry_run else arguments.out
    if out is not None:
        make_folder(out)
    comparison = Comparison(Recorder(out, replace(environment, commit=base_commit)), Recorder(out, environment))
    print(f"{environment}; before: {base_commit}", flush=True)
    with tempfile.TemporaryDirectory(prefix="farspan-revisions-") as folder:
        checkouts = {BEFORE: arguments.base.resolve(), AFTER: ROOT}
        environments = {side: environment_of(checkout, Path(folder, side)) for side, checkout in checkouts.items()}
        if arguments.kernels or both:
            adapters = {BEFORE: arguments.base_adapter.resolve(), AFTER: ROOT / "benchmarks" / "calls.py"}
            compare_kernels(comparison, environments, adapters, dry_run)
        if arguments.engine or both:
            compare_engines(comparison, environments, dry_run)
    comparison.summarise()


if __name__ == "__main__":
    sys.exit(main())
