"""What Star Attention's blocks cost in answers: retrieval and drift against dense attention, with any anchor.

In plain PyTorch, so that the paper's ablations of the anchor (its table 3) can be measured, which no engine does:
float32 on a CPU, bfloat16 with FlashAttention 3 on a GPU. The bundled needle model answers questions; a checkpoint
(`--model`, with `--text`) answers those of `farspan eval`, and reads real text (`drift`: log-probability of the last
tokens of a prompt less dense attention's, in nats a token). Two blocks are dense attention, as phase 1 then sees the
whole context: their drift is that of rounding.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from farspan.evaluation.audit import AuditSettings, cut_prompts, read_tokens
from farspan.evaluation.audit_results import BLOCK_TOKENS
from farspan.evaluation.evaluate import ANSWER_ROOM, EvalSettings, accuracy, make_samples, model_path
from farspan.evaluation.results import Cell
from farspan.evaluation.ruler import RulerSample
from farspan.needle import model_dir
from farspan.needle.tasks import Sample, make_sample
from farspan.star.command import split_question
from farspan.tokenizer import load_tokenizer

from benchmarks.plain_llama import PlainLlama
from benchmarks.real import Inputs, on_texts
from benchmarks.record import BenchmarkError, Recorder
from benchmarks.star_blocks import Anchor, Blocks, generate, log_probs, read_context

NAME = "star"
NEEDS_GPU = False
GROUPS = {
    "niah": ("niah_single", "niah_multikey_2", "niah_multivalue", "niah_multiquery"),
    "variable_tracking": ("variable_tracking",),
}
"""Of the bundled model."""
REAL_GROUPS = {
    "niah_single": ("niah_single",),
    "niah_multi": ("niah_multikey_1", "niah_multivalue", "niah_multiquery"),
    "variable_tracking": ("variable_tracking",),
}
"""Of checkpoints; several needles hidden, or asked for."""
SHARES = (Blocks(1), Blocks(2), Blocks(4), Blocks(8))
SMALLER = Blocks(16)
ABLATIONS = (
    Blocks(4, Anchor(content="none"), "no-anchor"),
    Blocks(4, Anchor(positions="random"), "random-positions"),
    Blocks(4, Anchor(positions="previous"), "previous-positions"),
    Blocks(4, Anchor(content="constant"), "constant-content"),
    Blocks(4, Anchor(content="random"), "random-content"),
    Blocks(4, Anchor(content="shuffled"), "shuffled-content"),
    Blocks(4, Anchor(content="previous", positions="previous"), "previous-block"),
    Blocks(4, Anchor(size=1 / 4), "quarter-anchor"),
    Blocks(4, Anchor(size=1 / 16), "sixteenth-anchor"),
)
"""Of the paper's table 3, and smaller anchors."""
REAL_BLOCKS = (*SHARES, SMALLER, ABLATIONS[0], ABLATIONS[-2])
ASKED = (*SHARES, SMALLER)
"""Ways of cutting that also answer questions, of those that are run."""
QUERY_LEN = 1024
"""Tokens whose log-probabilities count, at the end of each prompt."""


def cases(dry_run: bool) -> list[tuple[int, int]]:
    """List (prompt tokens, questions of each task) of the needle model."""
    return [(256, 1)] if dry_run else [(2048, 25)]


def run(recorder: Recorder, inputs: Inputs | None) -> None:
    if inputs is None:
        needle = PlainLlama.from_folder(model_dir())
        for length, count in cases(recorder.dry_run):
            ask_needle(recorder, needle, length, count)
    on_texts(recorder, inputs, measure, lengths=(512,), prompts=2, questions=1)


def ask_needle(recorder: Recorder, model: PlainLlama, length: int, count: int) -> None:
    """Rows of the bundled model: every way of cutting gets the same questions."""
    tokenizer = load_tokenizer(str(model_dir()))
    for group, tasks in GROUPS.items():
        samples = [make_sample(task, length, seed=20_000 + seed) for task in tasks for seed in range(count)]
        answers = Answers(model, tokenizer, (*SHARES, *ABLATIONS))
        for sample in samples:
            answers.ask(sample)
        answers.record(recorder, f"n{length}-{group}-needle")


def measure(recorder: Recorder, inputs: Inputs) -> None:
    """Rows of one checkpoint: drift on all texts, then questions in rounds of one a task and length, while time is."""
    known = {each.variant: each for each in (*REAL_BLOCKS, *ABLATIONS)}
    if unknown := set(inputs.variants) - known.keys():
        raise BenchmarkError(f"variants {sorted(unknown)}; known are {', '.join(known)}")
    if unknown := set(inputs.kinds) - REAL_GROUPS.keys():
        raise BenchmarkError(f"kinds {sorted(unknown)}; known are {', '.join(REAL_GROUPS)}")
    chosen = [known[name] for name in inputs.variants] or list(REAL_BLOCKS)
    all_blocks = (SHARES[0], *(each for each in chosen if each.share > 1))
    started = time.monotonic()
    is_on_gpu = torch.cuda.is_available()
    device, dtype = (torch.device("cuda"), torch.bfloat16) if is_on_gpu else (torch.device("cpu"), torch.float32)
    model = PlainLlama.from_folder(Path(model_path(inputs.model)), dtype, device)
    label = f"{inputs.label}-{'bf16' if is_on_gpu else 'fp32'}"
    if inputs.prompts:
        settings = AuditSettings(inputs.model, inputs.texts, inputs.lengths, (), Path(), inputs.prompts)
        texts = read_tokens(inputs.model, inputs.texts)
        recorder.note(f"model and texts read after {time.monotonic() - started:.0f} s")
        for number, (length, prompts) in enumerate(cut_prompts(settings, texts).items()):
            # What is left of the time, in equal parts.
            now, left = time.monotonic(), len(inputs.lengths) - number
            until = math.inf if inputs.seconds is None else now + (started + inputs.seconds - now) / left
            measure_drift(recorder, model, f"n{length}-{label}", prompts, all_blocks, until)
            recorder.note(f"drift at {length} done after {time.monotonic() - started:.0f} s")
    tokenizer = load_tokenizer(model_path(inputs.model))
    asked = tuple(each for each in all_blocks if each in ASKED)
    kinds = [(length, group) for length in inputs.lengths for group in inputs.kinds or REAL_GROUPS]
    answers = {kind: Answers(model, tokenizer, asked) for kind in kinds}
    try:
        for seed in range(inputs.questions):
            for length, group in kinds:
                for task in REAL_GROUPS[group]:
                    if inputs.seconds is not None and time.monotonic() - started > inputs.seconds:
                        break
                    said = answers[length, group].ask(sample_of(inputs.model, task, length, seed))
                    recorder.note(f"{length} {task} {seed}, {time.monotonic() - started:.0f} s: {said}")
    finally:
        # Also of a run that is ended from outside.
        for (length, group), found in answers.items():
            if found.samples:
                found.record(recorder, f"n{length}-{group}-{label}")


def sample_of(model: str, task: str, length: int, seed: int) -> Sample:
    """A question of `farspan eval`, whose prompt and answer together have at most `length` tokens."""
    room = min(ANSWER_ROOM, length // 4)
    settings = EvalSettings(model, (task,), (length - room,), Path(), seed=seed)
    (sample,) = make_samples(settings, Cell("", task, length - room, None, seed, 1))
    return sample


class Answers:
    """Questions that every way of cutting has answered, and what it said."""

    def __init__(self, model: PlainLlama, tokenizer: Any, all_blocks: Sequence[Blocks]) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.samples: list[Sample] = []
        self.texts: dict[Blocks, list[str]] = {each: [] for each in all_blocks}

    def ask(self, sample: Sample) -> str:
        """Greedy tokens behind the question, which is Star's query; what stands before it is the context.

        Returns what was said, on one line.
        """
        tokens, query_len = tokens_of(self.tokenizer, sample)
        context, query = tokens[:-query_len], tokens[-query_len:]
        stop = self.tokenizer.eos_token_id
        said = []
        for blocks in self.texts:
            cache = read_context(self.model, context, blocks, sample.seed)
            answer = generate(self.model, cache, len(context), query, sample.max_new_tokens, stop)
            said.append(self.tokenizer.decode(answer))
        self.samples.append(sample)
        for texts, text in zip(self.texts.values(), said, strict=True):
            texts.append(text)
        found = [f"{blocks.variant} {' '.join(text.split())!r}" for blocks, text in zip(self.texts, said, strict=True)]
        return f"{' '.join(sample.answers)} | {' | '.join(found)}"

    def record(self, recorder: Recorder, case: str) -> None:
        """A row of the share of right answers for every way of cutting; the number of questions is in the case."""
        for blocks, texts in self.texts.items():
            right = accuracy(self.samples, texts)
            recorder.add(NAME, f"{case}-q{len(texts)}", blocks.variant, "accuracy", "fraction", [right])


def tokens_of(tokenizer: Any, sample: Sample) -> tuple[torch.Tensor, int]:
    """Tokens of a prompt, and how many of them are the question and what follows it."""
    if isinstance(sample, RulerSample):
        tokens, question = list(sample.token_ids), sample.prompt[sample.prompt.rindex(sample.question) :]
    else:
        tokens, question = tokenizer(sample.prompt)["input_ids"], " " + split_question(sample.prompt)[1]
    return torch.tensor(tokens), len(tokenizer(question, add_special_tokens=False)["input_ids"])


def measure_drift(
    recorder: Recorder,
    model: PlainLlama,
    case: str,
    prompts: Sequence[list[int]],
    all_blocks: Sequence[Blocks],
    until: float,
) -> None:
    """Rows of one length: over the last tokens of each prompt, given all before them.

    until: of time.monotonic(); no prompt but the first is begun after it.
    """
    drifts: dict[Blocks, list[float]] = {each: [] for each in all_blocks[1:]}
    dense_mean: list[float] = []
    for prompt in map(torch.tensor, prompts):
        if dense_mean and time.monotonic() > until:
            break
        # The first token of a query is given, not predicted.
        query_len = min(QUERY_LEN, len(prompt) // 2) + 1
        context, query = prompt[:-query_len], prompt[-query_len:]
        dense, *others = (
            log_probs(model, read_context(model, context, each), len(context), query) for each in all_blocks
        )
        dense_mean.append(float(dense.mean()))
        for blocks, found in zip(drifts, others, strict=True):
            # Neighbouring tokens drift together, so that an error is that of means over stretches.
            drifts[blocks] += [float(part.mean()) for part in (found - dense).split(BLOCK_TOKENS)]
    recorder.note(
        f"{case}: {len(dense_mean)} of {len(prompts)} prompts, dense {sum(dense_mean) / len(dense_mean):.4f} nats/token"
    )
    for blocks, samples in drifts.items():
        recorder.add(NAME, case, blocks.variant, "drift", "nats/token", samples)
