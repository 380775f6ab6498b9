"""Run benchmarks: `python -m benchmarks.run decode prefill_dense --out DIR`, `--dry-run` without a GPU.

A benchmark is a module of this package with `cases(dry_run) -> list` and `run(recorder)`; the module's docstring says
what it measures. Those with `NEEDS_GPU = False` also run on a CPU. Some also want a checkpoint and texts,
`--model DIR --text FILES`. `--collect DIR` appends rows that another machine wrote to benchmarks/data.
"""

import argparse
import importlib
import os
import re
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from farspan.command import integers, make_folder, mapping, run_command, words

from benchmarks.record import DATA, BenchmarkError, Environment, Recorder, append_rows, iso_date, read_rows

PROGRAM = "python -m benchmarks.run"
MODULES = (
    "prefill_dense",
    "prefill_lists",
    "prefill_flex",
    "select",
    "host_side",
    "stages",
    "decode",
    "decode_fp8",
    "ttft",
    "flex_ttft",
    "serve",
    "prefill_block_sparse",
    "string_e2e",
    "string_calls",
    "string_requests",
    "offload_decode",
    "offload_select",
    "offload",
    "offload_whole",
    "offload_far",
    "offload_spans",
    "offload_select_engine",
    "offload_memory",
    "offload_tight",
    "offload_exact",
    "offload_quality",
    "star",
    "star_decode",
    "star_quality",
    "real",
    "rules",
    "fp8_drift",
)
ON_TEXTS = ("real", "rules", "fp8_drift", "star_quality")
"""Those that read texts with a checkpoint."""

PARTS = ("string_calls", "string_requests", "stages")
"""Parts of other benchmarks, which take a minute instead of many: they run where they are named."""


def collect(folder: Path) -> int:
    """Append the rows in a folder to benchmarks/data, except of runs that are there already; returns how many."""
    if not any(folder.glob("*.csv")):
        raise BenchmarkError(f"--collect {folder}: no folder with CSV files")
    known = {row.run_id for row in read_rows(DATA)}
    rows = [row for row in read_rows(folder) if row.run_id not in known]
    append_rows(rows, DATA)
    return len(rows)


def expression(text: str) -> str:
    """A regular expression, for argparse."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error
    return text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Run benchmarks on a GPU.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help=f"of {', '.join(MODULES)}; all but {' and '.join(PARTS)} when none is given",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=DATA, help="folder of the CSV files (default: benchmarks/data)")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on any machine; writes nothing")
    parser.add_argument("--date", type=iso_date, help="date of the rows, YYYY-MM-DD (default: today)")
    parser.add_argument(
        "--cases", type=expression, default="", metavar="REGEX",
        help="run only cases in whose name this is found, of benchmarks that have CHOOSES_CASES",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint", type=Path, action="append", default=[], metavar="DIR",
        help="a trained model for the benchmarks that can use one; may be given several times",
    )  # fmt: skip
    real = parser.add_argument_group("real, rules, fp8_drift, star_quality and flex_ttft")
    real.add_argument("--model", help="folder of a checkpoint, or a name on the model hub")
    real.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE", help="plain texts that it reads")
    real.add_argument("--label", help="what the rows call checkpoint and texts: smollm2-135m-code")
    real.add_argument(
        "--lengths", type=integers, default=(), help="prompt lengths; 8192 if left out, or those of flex_ttft"
    )
    real.add_argument(
        "--prompts", type=int, default=4, help="most prompts of each length; of real also 0, questions alone"
    )
    real.add_argument("--questions", type=int, default=0, help="retrieval questions of each length and task")
    real.add_argument(
        "--variants",
        type=words,
        default=(),
        help="of real, rules, fp8_drift, star_quality, flex_ttft, serve; else the usual ones",
    )
    real.add_argument("--kinds", type=words, default=(), help="of star_quality's questions; all if left out")
    real.add_argument("--shapes", type=words, default=(), help="of flex_ttft.py; the usual ones if left out")
    real.add_argument("--turns", type=integers, default=(), help="flex_ttft: tokens behind a cached prefix")
    real.add_argument("--repeats", type=int, help="flex_ttft: requests of each length")
    real.add_argument("--engine-args", type=mapping, default={}, metavar="JSON", help="further arguments of vllm.LLM")
    real.add_argument("--seconds", type=float, help="rules, star_quality: begin nothing further after that long")
    real.add_argument("--untimed", action="store_true", help="real: no times, where something else runs on the GPU")
    parser.add_argument("--collect", type=Path, metavar="DIR", help="append the CSV rows in DIR to benchmarks/data")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(MODULES):
        parser.error(f"no benchmark named {', '.join(sorted(unknown))}; there are {', '.join(MODULES)}")
    return arguments


def needs_gpu(name: str) -> bool:
    """Whether a benchmark's rows say something of a GPU only; those that do not are fractions and drifts, no times."""
    return bool(getattr(importlib.import_module(f"benchmarks.{name}"), "NEEDS_GPU", True))


def real_inputs(arguments: argparse.Namespace) -> Any:
    """What those ON_TEXTS run on; None where no checkpoint is named."""
    from benchmarks.real import Inputs

    if arguments.model is None:
        return None
    if not arguments.text or not arguments.label:
        raise BenchmarkError(f"{', '.join(ON_TEXTS)} with --model need --text FILES and --label, their name in rows.")
    return Inputs(
        arguments.model,
        tuple(arguments.text),
        arguments.label,
        arguments.lengths or (8192,),
        arguments.prompts,
        arguments.questions,
        arguments.variants,
        arguments.engine_args,
        arguments.seconds,
        not arguments.untimed,
        arguments.kinds,
    )


def main() -> int:
    arguments = parse_arguments()
    return run_command(PROGRAM, lambda: run(arguments), (BenchmarkError,))


def run(arguments: argparse.Namespace) -> int:
    """Run what was asked for; returns 1 where a benchmark failed. Raises BenchmarkError or ConfigError."""
    if arguments.collect:
        print(f"{collect(arguments.collect)} rows added to {DATA}")
        return 0
    names = arguments.names or [name for name in MODULES if name not in PARTS]
    if not torch.cuda.is_available():
        # Read when triton is first imported: kernels run in its interpreter.
        os.environ["TRITON_INTERPRET"] = "1"
        if not arguments.dry_run and any(needs_gpu(name) for name in names):
            raise BenchmarkError("benchmarks need a CUDA GPU; try them out without one by --dry-run.")
    environment = Environment.detect(arguments.date, needs_commit=not arguments.dry_run)
    if not arguments.dry_run:
        make_folder(arguments.out)
    out = None if arguments.dry_run else arguments.out
    recorder = Recorder(out, environment, arguments.checkpoint, arguments.cases)
    print(recorder.environment)
    failed = []
    for name in names:
        print(f"{name}:", flush=True)
        started, num_rows = time.monotonic(), len(recorder.rows)
        try:
            module = importlib.import_module(f"benchmarks.{name}")
            if arguments.cases and not getattr(module, "CHOOSES_CASES", False):
                raise BenchmarkError(f"--cases: {name} runs all of its cases")
            if name in ON_TEXTS:
                module.run(recorder, real_inputs(arguments))
            elif name == "flex_ttft":
                inputs = real_inputs(arguments)
                checkpoint = inputs and module.Checkpoint(Path(inputs.model), inputs.texts, inputs.label)
                module.run(
                    recorder,
                    arguments.shapes,
                    arguments.lengths,
                    arguments.variants,
                    arguments.repeats,
                    checkpoint,
                    arguments.engine_args,
                    arguments.turns,
                )
            elif name == "serve":
                module.run(recorder, arguments.variants)
            else:
                module.run(recorder)
            if arguments.cases and len(recorder.rows) == num_rows:
                raise BenchmarkError(f"--cases: {arguments.cases!r} is in no name of a case of {name}")
        except Exception:  # the next benchmarks can still report
            traceback.print_exc()
            failed.append(name)
        print(f"  ({time.monotonic() - started:.0f} s)", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
