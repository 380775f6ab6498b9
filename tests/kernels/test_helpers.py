import torch
from farspan.kernels import reference

from tests.kernels.helpers import GARBAGE_PAGE, make_batch, random_block_lists, reference_attention


def test_batch_is_hostile_outside_its_tokens() -> None:
    batch = make_batch([3, 0, 5], [20, 7, 5], page_size=16)
    assert int(batch.kv_cache[..., 0].isnan().all(dim=1).sum()) == batch.kv_cache[:, 0, :, 0].numel() - 32
    assert bool((batch.block_table[:, -1] == GARBAGE_PAGE).all())
    key, _ = reference.gather_kv(batch.kv_cache, batch.block_table[0], 20)
    torch.testing.assert_close(key[17:], batch.key[:3])


def test_layouts_hold_the_same_tokens() -> None:
    shapes = {}
    for layout in ("lbhnc", "lbnhc"):
        torch.manual_seed(1)
        batch = make_batch([4], [40], layout=layout)
        shapes[layout] = reference_attention(batch)[0]
    torch.testing.assert_close(shapes["lbhnc"], shapes["lbnhc"])


def test_random_lists_are_causal_and_keep_the_diagonal() -> None:
    batch = make_batch([100, 30], [300, 30])
    tiles = batch.tiles(64)
    lists = random_block_lists(tiles, 4, 0.3)
    for tile in range(tiles.num_tiles):
        for head in range(4):
            ids = lists.block_ids[head, tile, : lists.block_counts[head, tile]]
            assert ids[-1] == tiles.tile_block[tile]
            assert ids[0] == 0
            assert bool((ids.diff() > 0).all())
