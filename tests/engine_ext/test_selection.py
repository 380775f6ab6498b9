"""The selectors of the sparse methods, and the mask files that are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from farspan.engine_ext.config import BlockSparsePrefill, DensePrefill, FlexPrefill
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.selection.methods import (
    FlexSelector,
    LayerShape,
    MaskSelector,
    PatternSelector,
    load_mask,
    make_sparse_prefill,
)


def layer(**changes: Any) -> LayerShape:
    defaults: dict[str, Any] = {
        "layer_index": 1,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "scale": 0.125,
        "max_model_len": 512,
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


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (full().astype(np.int8), "holds int8 [1, 1, 4, 4]; allowed: bool"),
        (full()[0], "holds bool [1, 4, 4]; allowed: bool"),
        (full()[:, :, :3], "holds bool [1, 1, 3, 4]; allowed: bool"),
        (full(layers=1, heads=3), "has masks for 3 heads; allowed: 1 or [2, 4]"),
        (full(blocks=3), "covers prompts of 384 tokens, but max_model_len is 512"),
        (np.zeros((1, 1, 4, 4), dtype=bool), "does not see its own block"),
    ],
    ids=["dtype", "axes", "not-square", "heads", "too-small", "blind-query"],
)
def test_masks_are_refused(tmp_path: Path, mask: np.ndarray, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        selector(tmp_path, mask)
    assert sentence in str(caught.value)


def test_too_few_layers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has masks for 2 layers, the model has more"):
        selector(tmp_path, full(layers=2), layer_index=2)


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match=r"mask_file='nowhere\.npy' is not there"):
        load_mask("nowhere.npy")
