"""What Star Attention's blocks cost in answers, on the CPU too: retrieval and drift, against dense attention.

In plain PyTorch and float32, so that the paper's ablations of the anchor (its table 3) can be measured, which no engine
does. The bundled needle model answers questions; so does each `--checkpoint` in its stead, which also reads real text
(`drift`: log-probability of the last tokens of a prompt less dense attention's, in nats a token).
"""

import pydoc_data.topics
import sysconfig
from pathlib import Path
from typing import Any

import torch
from farspan.needle import model_dir
from farspan.needle.tasks import make_sample, score
from farspan.star.command import split_question

from benchmarks.plain_llama import PlainLlama
from benchmarks.record import BenchmarkError, Recorder
from benchmarks.star_blocks import Anchor, Blocks, generate, log_probs, read_context

NAME = "star"
NEEDS_GPU = False
GROUPS = {
    "niah": ("niah_single", "niah_multikey_2", "niah_multivalue", "niah_multiquery"),
    "variable_tracking": ("variable_tracking",),
}
SHARES = (Blocks(1), Blocks(2), Blocks(4), Blocks(8))
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
REAL_BLOCKS = (Blocks(1), Blocks(4), Blocks(8), ABLATIONS[0], ABLATIONS[-2])
"""Two blocks are dense attention: phase 1 sees the whole context."""
QUERY_LEN = 1024


def cases(dry_run: bool) -> list[tuple[int, int, tuple[Blocks, ...]]]:
    """List (prompt tokens, questions of each task, ways of cutting) of the needle model."""
    everything = (*SHARES, *ABLATIONS)
    return [(256, 1, everything)] if dry_run else [(2048, 25, everything), (4096, 4, (*SHARES, ABLATIONS[0]))]


def text_cases(dry_run: bool) -> list[tuple[int, int, tuple[Blocks, ...]]]:
    """List (prompt tokens, prompts of each text, ways of cutting) of real text, for checkpoints."""
    ablations = (Blocks(1), Blocks(4), *ABLATIONS)
    return [(128, 1, ablations)] if dry_run else [(2048, 1, ablations), (8192, 2, REAL_BLOCKS)]


def question_cases(dry_run: bool) -> list[tuple[int, int]]:
    """List (prompt tokens, number of questions), for checkpoints."""
    return [(256, 1)] if dry_run else [(2048, 8), (8000, 8)]


def run(recorder: Recorder) -> None:
    if not recorder.checkpoints:
        needle = PlainLlama.from_folder(model_dir())
        for length, count, all_blocks in cases(recorder.dry_run):
            ask(recorder, needle, model_dir(), "needle", length, count, GROUPS, all_blocks)
    for folder in recorder.checkpoints:
        model = PlainLlama.from_folder(folder)
        for length, num_windows, all_blocks in text_cases(recorder.dry_run):
            measure_drift(recorder, model, folder, length, num_windows, all_blocks)
        for length, count in question_cases(recorder.dry_run):
            ask(recorder, model, folder, folder.name, length, count, {"niah": GROUPS["niah"][:1]}, REAL_BLOCKS)


def ask(
    recorder: Recorder,
    model: PlainLlama,
    folder: Path,
    name: str,
    length: int,
    count: int,
    groups: dict[str, tuple[str, ...]],
    all_blocks: tuple[Blocks, ...],
) -> None:
    """Rows of the share of right answers; every way of cutting gets the same questions."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    stop = model.config.get("eos_token_id")
    for group, tasks in groups.items():
        scores: dict[str, list[float]] = {each.variant: [] for each in all_blocks}
        for task in tasks:
            for seed in range(count):
                bundled = None if name == "needle" else tokenizer
                sample = make_sample(task, length, seed=20_000 + seed, tokenizer=bundled)
                context, query = encode(tokenizer, sample.prompt)
                for blocks in all_blocks:
                    cache = read_context(model, context, blocks, seed)
                    answer = generate(model, cache, len(context), query, sample.max_new_tokens, stop)
                    scores[blocks.variant].append(score(tokenizer.decode(answer), sample))
        for variant, values in scores.items():
            mean = sum(values) / len(values)
            recorder.add(NAME, f"n{length}-{group}-{name}-q{len(values)}", variant, "accuracy", "fraction", [mean])


def encode(tokenizer: Any, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of context and query of a generated prompt, which together are the prompt's."""
    tokens = torch.tensor(tokenizer(prompt)["input_ids"])
    query_len = len(tokenizer(" " + split_question(prompt)[1], add_special_tokens=False)["input_ids"])
    return tokens[:-query_len], tokens[-query_len:]


def texts() -> dict[str, str]:
    """Real text that every Python has."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[30:120]
    code = "".join(file.read_text(errors="ignore") for file in files)
    return {"code": code, "prose": "\n".join(pydoc_data.topics.topics.values())}


def measure_drift(
    recorder: Recorder,
    model: PlainLlama,
    folder: Path,
    length: int,
    num_windows: int,
    all_blocks: tuple[Blocks, ...],
) -> None:
    """Rows of each text: over the last tokens of some windows, given all before them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    query_len = min(QUERY_LEN, length // 2)
    for name, text in texts().items():
        tokens = torch.tensor(tokenizer(text[: length * num_windows * 8])["input_ids"])
        if len(tokens) < length * num_windows:
            raise BenchmarkError(f"{name}: {len(tokens)} tokens; needs {length * num_windows}")
        drifts: dict[str, list[float]] = {}
        for window in tokens[: length * num_windows].split(length):
            context, query = window[:-query_len], window[-query_len:]
            dense: torch.Tensor | None = None
            for blocks in all_blocks:
                found = log_probs(model, read_context(model, context, blocks), len(context), query)
                if dense is None:
                    dense = found
                    recorder.note(f"{folder.name} {name}: dense {float(dense.mean()):.4f} nats/token")
                else:
                    drifts.setdefault(blocks.variant, []).extend((found - dense).tolist())
        for variant, samples in drifts.items():
            recorder.add(NAME, f"n{length}-{name}-{folder.name}", variant, "drift", "nats/token", samples)
