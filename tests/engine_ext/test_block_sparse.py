"""Mask files: what is refused, and which part of a mask a layer and a rank take."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from farspan.engine_ext.block_sparse import load_mask_blocks, pattern_blocks
from farspan.engine_ext.config import BlockSparsePrefill
from farspan.engine_ext.errors import ConfigError
from farspan.kernels.block_patterns import static_block_lists
from farspan.kernels.tiles import make_prefill_tiles
from safetensors.numpy import save_file

CPU = torch.device("cpu")


def write(folder, mask, name="mask.npy"):
    """Save a mask and return the options that name it."""
    path = folder / name
    if name.endswith(".npy"):
        np.save(path, mask)
    else:
        save_file({"mask": mask}, path)
    return BlockSparsePrefill(pattern="file", mask_file=str(path), block_size=64)


def load(options, **changes):
    """One layer of a model with 4 query heads and 2 KV heads on each of 2 ranks, and 512 tokens at most."""
    shape = {"layer_index": 1, "num_q_heads": 4, "num_kv_heads": 2, "tp_rank": 1, "tp_size": 2, "max_seq_len": 512}
    return load_mask_blocks(options, **(shape | changes))


def random_mask(layers, heads, blocks=8):
    rng = np.random.default_rng(0)
    return (rng.random((layers, heads, blocks, blocks)) < 0.4) | np.eye(blocks, dtype=bool)


@pytest.mark.parametrize("name", ["mask.npy", "mask.safetensors"])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("heads", [1, 4, 8])
def test_layer_and_rank_take_their_part(tmp_path, layers, heads, name):
    mask = random_mask(layers, heads)
    blocks = load(write(tmp_path, mask, name))
    tiles = make_prefill_tiles([0, 200], [450], 64, CPU)
    lists = blocks.block_lists_for(torch.empty(0), torch.empty(0), SimpleNamespace(tiles=tiles))
    mine = mask[1 if layers > 1 else 0]
    mine = mine[len(mine) // 2 :] if heads > 1 else mine
    assert lists.block_ids.shape[0] == len(mine)
    for head in range(len(mine)):
        for tile, block in enumerate(tiles.tile_block.tolist()):
            count = int(lists.block_counts[head, tile])
            expected = mine[head, block, : block + 1].nonzero()[0].tolist()
            assert lists.block_ids[head, tile, :count].tolist() == expected


def test_layers_of_a_step_share_the_lists_of_a_pattern():
    options = BlockSparsePrefill(pattern="strided", local_blocks=2, stride=3)
    blocks = pattern_blocks(options)
    assert blocks is pattern_blocks(BlockSparsePrefill(pattern="strided", local_blocks=2, stride=3))
    for _ in range(2):
        group = SimpleNamespace(tiles=make_prefill_tiles([0, 1500], [1500], 128, CPU))
        lists = blocks.block_lists_for(torch.empty(0), torch.empty(0), group)
        assert blocks.block_lists_for(torch.empty(0), torch.empty(0), group) is lists
        expected = static_block_lists(group.tiles, "strided", local_blocks=2, stride=3)
        assert torch.equal(lists.block_ids, expected.block_ids)


@pytest.mark.parametrize(
    ("mask", "changes", "message"),
    [
        (random_mask(2, 1), {"layer_index": 2}, "holds 2 layers, but the model has more"),
        (random_mask(1, 3), {}, "holds 3 heads; allowed: 1, 4, 8"),
        (random_mask(1, 1), {"max_seq_len": 513}, "covers prompts of 512 tokens, but max_model_len is 513"),
        (random_mask(1, 1)[0], {}, "allowed: bool"),
        (random_mask(1, 1).astype(np.int64), {}, "holds int64"),
        (random_mask(1, 1)[..., :-1], {}, "blocks, blocks"),
        (np.zeros((1, 1, 8, 8), bool), {}, "layer 1: block mask: head 0, query block 0 does not see its own block"),
    ],
    ids=["layers", "heads", "short", "dims", "dtype", "square", "coverage"],
)
def test_masks_that_do_not_fit_are_refused(tmp_path, mask, changes, message):
    with pytest.raises(ConfigError, match=message):
        load(write(tmp_path, mask), **changes)


def test_unreadable_files_are_refused(tmp_path):
    options = BlockSparsePrefill(pattern="file", mask_file=str(tmp_path / "none.npy"))
    with pytest.raises(ConfigError, match="there is no such file"):
        load(options)
    for name in ("bad.npy", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        with pytest.raises(ConfigError, match="cannot be read"):
            load(BlockSparsePrefill(pattern="file", mask_file=str(tmp_path / name)))
    save_file({"a": random_mask(1, 1), "b": random_mask(1, 1)}, tmp_path / "two.safetensors")
    with pytest.raises(ConfigError, match=r"2 tensors \(a, b\), not one"):
        load(BlockSparsePrefill(pattern="file", mask_file=str(tmp_path / "two.safetensors")))
