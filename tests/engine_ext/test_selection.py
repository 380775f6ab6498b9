"""The selectors of the sparse methods."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from farspan.engine_ext.config import BlockSparsePrefill, DensePrefill, FlexPrefill
from farspan.engine_ext.selection.methods import (
    FlexSelector,
    LayerShape,
    MaskSelector,
    PatternSelector,
    make_sparse_prefill,
)


def layer(**changes: Any) -> LayerShape:
    defaults: dict[str, Any] = {
        "layer_index": 1,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "total_num_kv_heads": 2,
        "scale": 0.125,
        "tp_rank": 0,
        "tp_size": 1,
        "device": torch.device("cpu"),
    }
    return LayerShape(**(defaults | changes))


def selector(folder: Path, mask: np.ndarray, **changes: Any) -> MaskSelector:
    np.save(folder / "mask.npy", mask)
    options = BlockSparsePrefill(pattern="file", mask_file=str(folder / "mask.npy"), block_size=128)
    made = make_sparse_prefill(options, layer(**changes))
    assert isinstance(made, MaskSelector)
    return made


def full(layers: int = 1, heads: int = 1, blocks: int = 4) -> np.ndarray:
    return np.ones((layers, heads, blocks, blocks), dtype=bool)


def test_one_selector_a_method() -> None:
    assert make_sparse_prefill(DensePrefill(), layer()) is None
    assert isinstance(make_sparse_prefill(FlexPrefill(), layer()), FlexSelector)
    assert isinstance(make_sparse_prefill(BlockSparsePrefill(), layer()), PatternSelector)


def test_mask_of_the_layer_and_rank(tmp_path: Path) -> None:
    mask = full(layers=2, heads=8)
    mask[1, 5:, :, 0] = False
    mask[1, 5:, 0, 0] = True
    counts = selector(tmp_path, mask, tp_rank=1, tp_size=2).rows.block_counts
    assert counts.tolist() == [[1, 2, 3, 4], [1, 1, 2, 3], [1, 1, 2, 3], [1, 1, 2, 3]]
