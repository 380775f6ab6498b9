"""What the needle model makes of questions under one combination of options: answers, densities, coverage.

It is computed as an engine would, by `farspan.needle.paged`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from farspan.engine_ext.config import FlexPrefill, Prefill
from farspan.kernels.tiles import BlockLists, PrefillTiles
from farspan.needle.paged import PagedNeedle

HEAD_COLUMNS = (
    "method", "length", "seed", "layer", "head", "density", "density_min", "query_aware", "divergence", "coverage",
    "coverage_min", "selection_ms", "chunks", "measured_rows",
)  # fmt: skip
SWEEP_COLUMNS = (
    "method", "gamma", "tau", "min_budget", "chunk", "length", "seed", "count", "accuracy", "dense_accuracy",
    "density", "query_aware", "coverage", "coverage_worst_head", "logprob_change", "overlap",
)  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One combination of options; `prefill` is dense for the baseline."""

    prefill: Prefill
    chunk: int
    """Prompt tokens per step; 0 for the whole prompt."""

    @property
    def name(self) -> str:
        """The method's name in the tables."""
        p = self.prefill
        if not isinstance(p, FlexPrefill):
            return "dense"
        return f"flex-g{p.gamma:g}-t{p.tau:g}-m{p.min_budget}-c{self.chunk}"


@dataclass(frozen=True)
class Question:
    """Token ids of one sample, on the device."""

    task: str
    prompt: torch.Tensor
    completion: torch.Tensor


@dataclass
class Answers:
    """What one variant made of the questions of one length."""

    right: list[bool]
    logprobs: list[torch.Tensor]
    """Per question, of the completion's tokens."""
    heads: list[dict[str, Any]]
    listed: list[torch.Tensor]
    """Of the first question, per layer: [heads, blocks, blocks] bool, on the host."""


def ask(
    model: PagedNeedle, variant: Variant, questions: list[Question], rows: int, keep_lists: bool = False
) -> Answers:
    """Answer the questions. rows: query rows per prompt on which coverage is measured, 0 for none."""
    answers = Answers([], [], [], [])
    selectors = model.selectors(variant.prefill)
    for index, question in enumerate(questions):
        grids = BlockGrids(model, len(question.prompt)) if keep_lists and index == 0 else None
        logprobs, right = model.answer_logprobs(
            question.prompt, question.completion, variant.chunk or None, variant.prefill, selectors, grids, rows
        )
        answers.logprobs.append(logprobs)
        answers.right.append(bool(right.all()))
        if grids is not None:
            answers.listed = [grid.cpu() for grid in grids.grids]
    for layer, selector in enumerate(selectors or ()):
        assert selector.stats is not None
        answers.heads += [{"layer": layer, **row} for row in selector.stats.rows()]
    return answers


class BlockGrids:
    """Collects the block lists of one prompt as masks: an `on_lists` of `PagedNeedle.answer_logprobs`."""

    def __init__(self, model: PagedNeedle, num_tokens: int) -> None:
        blocks = -(-num_tokens // 128)
        shape = (model.shape.num_attention_heads, blocks, blocks)
        self.grids = [torch.zeros(shape, dtype=torch.bool, device=model.device) for _ in model.net.layers]

    def __call__(self, layer: int, all_tiles: PrefillTiles, lists: BlockLists) -> None:
        """Mark the blocks of one launch."""
        grid = self.grids[layer]
        width = lists.block_ids.shape[-1]
        listed = torch.arange(width, device=grid.device) < lists.block_counts[..., None]
        heads, tiles, places = listed.nonzero(as_tuple=True)
        grid[heads, all_tiles.tile_block[tiles].long(), lists.block_ids[heads, tiles, places].long()] = True


def overlap(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    """Blocks in both over blocks in either, mean over layers and heads, of two `Answers.listed`."""
    shares = [(a & b).sum((1, 2)) / (a | b).sum((1, 2)) for a, b in zip(first, second, strict=True)]
    return float(torch.stack(shares).mean())


def sweep_row(
    variant: Variant, length: int, seed: int, answers: Answers, dense: Answers, whole: Answers | None
) -> dict[str, Any]:
    """A row of `SWEEP_COLUMNS`. whole: the answers of the same options with the whole prompt in one chunk."""
    prefill = variant.prefill
    assert isinstance(prefill, FlexPrefill)

    def mean(column: str) -> float:
        return sum(row[column] for row in answers.heads) / len(answers.heads)

    measured = answers.heads[0]["coverage"] is not None
    changes = [(a - b).abs().mean() for a, b in zip(answers.logprobs, dense.logprobs, strict=True)]
    return {
        "method": variant.name,
        "gamma": prefill.gamma,
        "tau": prefill.tau,
        "min_budget": prefill.min_budget,
        "chunk": variant.chunk,
        "length": length,
        "seed": seed,
        "count": len(answers.right),
        "accuracy": sum(answers.right) / len(answers.right),
        "dense_accuracy": sum(dense.right) / len(dense.right),
        "density": mean("density"),
        "query_aware": mean("query_aware"),
        "coverage": mean("coverage") if measured else "",
        "coverage_worst_head": min(row["coverage"] for row in answers.heads) if measured else "",
        "logprob_change": float(torch.stack(changes).mean()),
        "overlap": overlap(answers.listed, whole.listed) if whole is not None else "",
    }


def to_question(task: str, raw: bytes, num_completion: int, device: str) -> Question:
    """From `encode_sample`'s result."""
    ids = torch.from_numpy(np.frombuffer(raw, dtype=np.int16).astype(np.int64)).to(device)
    return Question(task, ids[:-num_completion], ids[-num_completion:])
