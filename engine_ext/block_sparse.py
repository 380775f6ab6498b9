"""The block_sparse method: static masks, from a named pattern or from a file, as block lists of each step."""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from farspan.engine_ext.config import ROOT, BlockSparsePrefill
from farspan.engine_ext.errors import ConfigError
from farspan.kernels.block_patterns import check_block_mask, gather_rows, mask_rows, static_block_lists
from farspan.kernels.tiles import BlockLists, PrefillTiles

if TYPE_CHECKING:
    from farspan.engine_ext.metadata import PrefillGroup


class PatternBlocks:
    """A named pattern, the same for every head and layer."""

    def __init__(self, options: BlockSparsePrefill) -> None:
        assert options.pattern != "file"
        self.options = options
        self._latest: tuple[PrefillTiles, BlockLists] | None = None

    def block_lists_for(self, query: torch.Tensor, kv_cache: torch.Tensor, group: "PrefillGroup") -> BlockLists:
        """See `SparsePrefill`. The layers of a step share its tiles, and so what the first layer has made of them."""
        assert group.tiles is not None
        if self._latest is None or self._latest[0] is not group.tiles:
            options = self.options
            lists = static_block_lists(
                group.tiles,
                options.pattern,
                sink_blocks=options.sink_blocks,
                local_blocks=options.local_blocks,
                stride=options.stride,
            )
            self._latest = group.tiles, lists
        return self._latest[1]


@lru_cache
def pattern_blocks(options: BlockSparsePrefill) -> PatternBlocks:
    """The one object that serves all layers."""
    return PatternBlocks(options)


class MaskBlocks:
    """The mask of one layer."""

    def __init__(self, rows: BlockLists) -> None:
        """rows: one list per block of queries, from `mask_rows`."""
        self.rows = rows

    def block_lists_for(self, query: torch.Tensor, kv_cache: torch.Tensor, group: "PrefillGroup") -> BlockLists:
        """See `SparsePrefill`."""
        assert group.tiles is not None
        device = group.tiles.tile_block.device
        if self.rows.block_ids.device != device:
            self.rows = BlockLists(self.rows.block_ids.to(device), self.rows.block_counts.to(device))
        return gather_rows(self.rows, group.tiles)


def load_mask_blocks(
    options: BlockSparsePrefill,
    *,
    layer_index: int,
    num_q_heads: int,
    num_kv_heads: int,
    tp_rank: int,
    tp_size: int,
    max_seq_len: int,
) -> MaskBlocks:
    """The mask of one layer and tensor-parallel rank, from `options.mask_file`.

    num_q_heads, num_kv_heads: of this rank. max_seq_len: the longest sequence that the engine admits, in tokens.
    Raises ConfigError where the file is no such mask, or does not cover the model.
    """
    path = f"{ROOT}.prefill.mask_file"
    assert options.mask_file is not None
    mask = read_mask(options.mask_file)
    layers, heads, blocks, _ = mask.shape
    if layers > 1 and layer_index >= layers:
        raise ConfigError(
            f"{path}={options.mask_file!r} holds {layers} layers, but the model has more; give one mask for all "
            "layers, or one for each."
        )
    allowed = sorted({1, num_kv_heads * tp_size, num_q_heads * tp_size})
    if heads not in allowed:
        raise ConfigError(
            f"{path}={options.mask_file!r} holds {heads} heads; allowed: {', '.join(map(str, allowed))} (one mask for "
            "all heads, one a KV head, one a query head)."
        )
    covered = blocks * options.block_size
    if covered < max_seq_len:
        raise ConfigError(
            f"{path}={options.mask_file!r} has {blocks} blocks of {options.block_size} tokens and covers prompts of "
            f"{covered} tokens, but max_model_len is {max_seq_len}. Give a larger mask, or set max_model_len to "
            f"{covered} at most."
        )
    layer = torch.from_numpy(np.array(mask[layer_index if layers > 1 else 0]))
    if heads > 1:
        layer = layer.chunk(tp_size)[tp_rank]
    try:
        check_block_mask(layer)
    except ValueError as error:
        raise ConfigError(f"{path}={options.mask_file!r}, layer {layer_index}: {error}.") from error
    return MaskBlocks(mask_rows(layer))


def read_mask(mask_file: str) -> np.ndarray:
    """Read a boolean array [layers, heads, blocks, blocks]; what is not asked for of an .npy file stays on disk.

    Raises ConfigError where the file is missing, unreadable, or of another shape or type.
    """
    path = f"{ROOT}.prefill.mask_file"
    if not Path(mask_file).is_file():
        raise ConfigError(
            f"{path}={mask_file!r}; there is no such file. Give the path as the engine's machine sees it."
        )
    try:
        mask = np.load(mask_file, mmap_mode="r") if mask_file.endswith(".npy") else read_safetensors(mask_file)
    except Exception as error:  # each format has its own kinds of broken files
        raise ConfigError(f"{path}={mask_file!r} cannot be read: {error}.") from error
    if mask.dtype != np.bool_ or mask.ndim != 4 or mask.shape[2] != mask.shape[3] or 0 in mask.shape:
        raise ConfigError(
            f"{path}={mask_file!r} holds {mask.dtype} {list(mask.shape)}; allowed: bool [layers or 1, heads or 1, "
            "blocks, blocks], True where a block of queries sees a block of keys."
        )
    return mask


def read_safetensors(mask_file: str) -> np.ndarray:
    """The only tensor of a file."""
    from safetensors.numpy import load_file

    tensors = load_file(mask_file)
    if len(tensors) != 1:
        raise ValueError(f"it holds {len(tensors)} tensors ({', '.join(tensors)}), not one")
    return next(iter(tensors.values()))
