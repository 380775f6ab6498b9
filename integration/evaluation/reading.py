"""What sparse methods read and kept in a cell, and how long the cells to come will take."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from farspan.engine_ext.config import BlockSparsePrefill, FlexPrefill, parse_config
from farspan.engine_ext.errors import UnsupportedModelError
from farspan.evaluation.results import RAN_DENSELY
from farspan.metrics import EXTENSION
from farspan.model_shape import read_model
from farspan.scheduler.footprint import ModelShape

DIGITS = 4


def reads_selection(options: dict[str, Any] | None, engine_args: dict[str, Any]) -> bool:
    """Whether an engine's workers are to add up what flex selects: not where the user has an extension there."""
    if options is None or "worker_extension_cls" in engine_args:
        return False
    return isinstance(parse_config(options).prefill, FlexPrefill)


def extension(options: dict[str, Any] | None, engine_args: dict[str, Any]) -> dict[str, Any]:
    """The engine argument for it."""
    return {"worker_extension_cls": EXTENSION} if reads_selection(options, engine_args) else {}


def selection_columns(
    options: dict[str, Any] | None, rows: Sequence[dict[str, Any]] | None, length: int
) -> dict[str, Any]:
    """Density, coverage and note of a cell with prompts of `length` tokens.

    rows: of `read_selection`, of the cell alone; None where the engine does not collect them.
    """
    prefill = parse_config(options).prefill if options is not None else None
    if isinstance(prefill, BlockSparsePrefill) and prefill.pattern != "file":
        return {"density": round(static_density(prefill, length), DIGITS)}
    if not isinstance(prefill, FlexPrefill) or rows is None:
        return {}
    if not rows:
        return {"note": RAN_DENSELY}
    columns = {"density": round(sum(row["density"] for row in rows) / len(rows), DIGITS)}
    kept = [row["coverage"] for row in rows if row["coverage"] is not None]
    if kept:
        columns |= {"coverage": round(sum(kept) / len(kept), DIGITS), "coverage_worst": round(min(kept), DIGITS)}
    return columns


def static_density(prefill: BlockSparsePrefill, length: int) -> float:
    """Blocks that a named pattern reads over those that dense attention reads, in a prompt of `length` tokens."""
    import torch
    from farspan.engine_ext.pass_maker import shared_lists
    from farspan.kernels.tiles import make_prefill_tiles

    tiles = make_prefill_tiles([0, length], [length], prefill.block_size, torch.device("cpu"))
    lists = shared_lists(prefill, tiles)
    assert lists is not None
    return float(lists.block_counts.double().mean() / (tiles.tile_block.double() + 1).mean())


def relative_work(model: str, length: int) -> float:
    """Arithmetic of a prompt, in units of a model's own: linear layers, and attention that grows with the square.

    A model whose shape is not on this machine counts as linear layers alone.
    """
    shape = shape_of(model)
    if shape is None:
        return float(length)
    # Scores and values of half of all pairs, beside two operations a weight.
    return length * (2.0 * shape.active_params + 2.0 * shape.num_layers * shape.num_heads * shape.head_dim * length)


@lru_cache
def shape_of(model: str) -> ModelShape | None:
    """As `farspan plan` counts it; None for a model that it cannot read, or does not plan for."""
    try:
        return read_model(model).shape
    except UnsupportedModelError:
        return None


def estimate_s(model: str, lengths: Sequence[int], count: int, first_s: float, first_length: int) -> float:
    """Seconds for cells of the given lengths with `count` questions each, one after the other.

    first_s: what one question of `first_length` tokens took.
    """
    unit = first_s / relative_work(model, first_length)
    return unit * count * sum(relative_work(model, length) for length in lengths)


def duration(seconds: float) -> str:
    """A time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} minutes"
    return f"{seconds / 3600:.1f} hours"


def by_layer_head(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `read_selection` of all ranks, with the heads numbered through the layer."""
    per_rank = 1 + max((row["head"] for row in rows), default=0)
    first_rank: dict[int, int] = {}
    for row in rows:
        first_rank[row["layer"]] = min(row["rank"], first_rank.get(row["layer"], row["rank"]))
    return [{**row, "head": row["head"] + per_rank * (row["rank"] - first_rank[row["layer"]])} for row in rows]
