"""Flex prefill of the needle model over many options: `python -m benchmarks.needle_training.sweep --out DIR`.

The selection is the paper's, "flexprefill", which has more options than the default.

Every combination of the lists given (gamma, tau, min budget, chunk, length) answers the same questions, and so does
dense prefill. Three tables are written into DIR, row by row as they come:

- `accuracy.csv`, in the columns of `farspan eval`: exact match per task. A method is called after its options, as
  `flex-g0.95-t0.1-m1024-c2048`; c0 is the whole prompt in one chunk.
- `heads.csv`: density, pattern and coverage per layer and head, over the questions of a length.
- `sweep.csv`: one row a combination: what the others sum up to, and how far the answers and the lists moved.

A question is right when greedy decoding would write its completion. It is computed as an engine would, by
`farspan.needle.paged`.
"""

import argparse
import itertools
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from farspan.command import device, floats, integers, make_folder, run_command, words
from farspan.engine_ext.config import DensePrefill, FlexPrefill
from farspan.engine_ext.errors import ConfigError
from farspan.evaluation.needle_answers import (
    HEAD_COLUMNS,
    SWEEP_COLUMNS,
    Answers,
    Question,
    Variant,
    ask,
    sweep_row,
    to_question,
)
from farspan.evaluation.results import ACCURACY_COLUMNS
from farspan.needle import model_dir
from farspan.needle.evaluate import encode_sample
from farspan.needle.network import load_network
from farspan.needle.paged import PagedNeedle
from farspan.needle.tasks import MIN_LENGTH, TASKS
from farspan.tables import Tables

PROGRAM = "python -m benchmarks.needle_training.sweep"
SWEPT_TASKS = ("niah_single", "niah_multikey_2", "niah_multiquery", "variable_tracking")


def accuracy_rows(name: str, length: int, seed: int, questions: list[Question], answers: Answers) -> Iterator[dict]:
    """One row of `farspan eval`'s columns per task; depths are drawn by the seeds."""
    for task in dict.fromkeys(question.task for question in questions):
        right = [ok for ok, question in zip(answers.right, questions, strict=True) if question.task == task]
        values = (name, task, length, "", seed, len(right), sum(right) / len(right))
        yield dict(zip(ACCURACY_COLUMNS, values, strict=True))


def variants_of(args: argparse.Namespace) -> list[Variant]:
    """The combinations in the order in which they run: within the same options the whole prompt first, because the
    other chunks are compared with it.
    """
    if args.paper:
        return paper_variants()
    return _product(args.gammas, args.taus, args.min_budgets, args.chunks)


def paper_variants() -> list[Variant]:
    """Gamma against chunk, and the paper's ablations (tables 6 and 10), the most telling first."""
    chunks = [0, 8192, 2048]
    variants = _product([0.95], [0.1], [1024], chunks)
    variants += _product([0.9, 0.8, 0.97], [0.1], [1024], chunks)
    variants += _product([0.95, 0.9], [0.1], [0, 512, 2048], [0])
    variants += _product([0.95], [0.0, 0.2, 0.3], [1024], [0])
    return variants


def _product(gammas: list[float], taus: list[float], min_budgets: list[int], chunks: list[int]) -> list[Variant]:
    chunks = sorted(chunks, key=lambda chunk: (chunk != 0, -chunk))
    return [
        Variant(FlexPrefill(selection="flexprefill", gamma=gamma, tau=tau, min_budget=budget, min_seq_len=0), chunk)
        for gamma, tau, budget, chunk in itertools.product(gammas, taus, min_budgets, chunks)
    ]


def run(args: argparse.Namespace) -> None:
    """Run the sweep; starts nothing new once `args.seconds` have passed."""
    check_arguments(args)
    make_folder(args.out)
    deadline = time.monotonic() + args.seconds
    tables = Tables(args.out)
    plan = [(length, task, args.seed + i) for length in args.lengths for task in args.tasks for i in range(args.count)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        made = [(length, task, pool.submit(encode_sample, task, length, seed, None)) for length, task, seed in plan]
        dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        model = PagedNeedle(load_network(args.model, args.device, dtype), max(args.lengths) + 256)
        questions = {
            length: [to_question(task, *future.result(), args.device) for n, task, future in made if n == length]
            for length in args.lengths
        }
    dense: dict[int, Answers] = {}
    whole: dict[tuple[int, FlexPrefill], Answers] = {}
    for variant, length in itertools.product(variants_of(args), args.lengths):
        if time.monotonic() > deadline:
            print(f"out of time before {variant.name} at {length} tokens", flush=True)
            return
        if variant.chunk >= length:
            continue
        asked = questions[length]
        if length not in dense:
            dense[length] = ask(model, Variant(DensePrefill(), 0), asked, 0)
            tables.add(
                "accuracy.csv", ACCURACY_COLUMNS, accuracy_rows("dense", length, args.seed, asked, dense[length])
            )
        started = time.monotonic()
        answers = ask(model, variant, asked, args.rows, keep_lists=True)
        assert isinstance(variant.prefill, FlexPrefill)
        if variant.chunk == 0:
            whole[length, variant.prefill] = answers
        row = sweep_row(variant, length, args.seed, answers, dense[length], whole.get((length, variant.prefill)))
        named = {"method": variant.name, "length": length, "seed": args.seed}
        tables.add("sweep.csv", SWEEP_COLUMNS, [row])
        tables.add("heads.csv", HEAD_COLUMNS, ({**named, **head} for head in answers.heads))
        tables.add("accuracy.csv", ACCURACY_COLUMNS, accuracy_rows(variant.name, length, args.seed, asked, answers))
        shown = {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}
        print(f"{length} {variant.name} {time.monotonic() - started:.1f} s {shown}", flush=True)


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ConfigError for what no question or no option can be."""
    if min(args.lengths, default=0) < MIN_LENGTH:
        raise ConfigError(f"lengths={list(args.lengths)}; prompts have at least {MIN_LENGTH} tokens")
    if not args.tasks or not set(args.tasks) <= set(TASKS):
        raise ConfigError(f"tasks={list(args.tasks)}; known are {', '.join(TASKS)}")
    if min(args.count, args.workers) < 1 or min(args.rows, *args.chunks, 0) < 0:
        raise ConfigError("count and workers are at least 1, rows and chunks at least 0")
    for variant in variants_of(args):
        variant.prefill.check("sweep")


def main() -> int:
    """Parse the command line and run; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, default=model_dir())
    add("--tasks", type=words, default=",".join(SWEPT_TASKS))
    add("--lengths", type=integers, default="4096,8192", help="prompt tokens")
    add("--gammas", type=floats, default="0.95")
    add("--taus", type=floats, default="0.1")
    add("--min-budgets", type=integers, default="1024", help="KV tokens")
    add("--chunks", type=integers, default="0", help="prompt tokens a step; 0 for the whole prompt")
    add("--paper", action="store_true", help="gamma x chunk and the paper's ablations instead of the lists above")
    add("--rows", type=int, default=16, help="query rows a prompt on which coverage is measured")
    add("--count", type=int, default=2, help="questions per task and length")
    add("--seed", type=int, default=30000, help="of the first question")
    add("--workers", type=int, default=1, help="processes that write the questions")
    add("--seconds", type=float, default=3600.0, help="start no combination after this time")
    add("--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu")
    add("--out", type=Path, required=True)
    args = parser.parse_args()
    return run_command(PROGRAM, lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
