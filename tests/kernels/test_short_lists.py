"""The short-list kernel: what the copy engine can read, and every way to load and step against the reference."""

import dataclasses

import pytest
import torch
from farspan.kernels import attention_tiles, static_block_lists
from farspan.kernels.contiguous.short_lists import short_list_attention
from farspan.kernels.contiguous.token_rows import have_token_rows
from farspan.kernels.tuning import ShortListConfig, short_list_config

from tests.kernels.helpers import assert_attention_close
from tests.kernels.test_contiguous import by_position, draw, expected

POINTERS = ShortListConfig(64, num_warps=4, num_stages=2)
CONFIGS = {
    "pointers": POINTERS,
    "tma": dataclasses.replace(POINTERS, use_tma=True),
    "tma-128-keys": ShortListConfig(128, 8, 3, use_tma=True, add_by_hand=True, max_registers=128),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("has_lse", [True, False], ids=["lse", "no-lse"])
@pytest.mark.parametrize(
    ("query_len", "kv_len", "has_lengths", "head_dim"),
    [
        pytest.param(384, 384, False, 64, id="whole-d64"),
        pytest.param(128, 384, True, 128, id="q128-lengths-d128"),
        pytest.param(200, 384, False, 64, id="q200-d64"),
        pytest.param(300, 300, True, 64, id="n300-lengths-d64"),
    ],
)
def test_every_way_to_load_gives_the_same(query_len, kv_len, has_lengths, head_dim, has_lse, config, device):
    batch, heads = 2, 2
    q, k, v = draw(batch, query_len, kv_len, heads, 1, head_dim, torch.float16, device)
    lengths = torch.tensor([kv_len - 20, 130], device=device) if has_lengths else None
    tiles = attention_tiles(batch, query_len, kv_len, device=device)
    blocks = torch.full((2 * batch,), -(-kv_len // 128), dtype=torch.int32, device=device)
    lists = static_block_lists(tiles, "sink_local", causal=False, num_kv_blocks=blocks, sink_blocks=1, local_blocks=2)
    out = torch.full_like(q, float("nan"))
    lse = torch.full((heads, batch * query_len), float("nan"), device=device) if has_lse else None
    short_list_attention(
        q, k, v, tiles, lists, head_dim**-0.5, causal=False, lengths=lengths, out=out, lse=lse, config=config
    )
    mask = torch.zeros(1, -(-kv_len // 128), -(-kv_len // 128), dtype=torch.bool, device=device)
    for row, block in enumerate(tiles.tile_block[: tiles.num_tiles // batch].tolist()):
        mask[0, block, lists.block_ids[0, row, : lists.block_counts[0, row]].long()] = True
    visible = by_position(mask, 128, kv_len, heads).expand(batch, -1, -1, -1)
    expected_out, expected_lse = expected(q, k, v, visible=visible, lengths=lengths)
    if lse is None:
        result_lse = expected_lse
    else:
        result_lse = lse.view(heads, batch, query_len).transpose(0, 1)
    assert_attention_close(out, result_lse, expected_out, expected_lse, torch.float16)


def test_rows_that_the_copy_engine_can_read():
    tensor = torch.empty(2, 100, 4, 64, dtype=torch.float16)
    packed = torch.empty(2, 100, 3, 4, 64, dtype=torch.float16)
    assert have_token_rows(tensor, packed[:, :, 1])
    heads_first = torch.empty(2, 4, 100, 64, dtype=torch.float16).transpose(1, 2)
    part_of_longer = torch.empty(2, 120, 4, 64, dtype=torch.float16)[:, :100]
    shifted = torch.empty(2 * 100 * 4 * 64 + 1, dtype=torch.float16)[1:].view(2, 100, 4, 64)
    narrow = torch.empty(2, 100, 4, 96, dtype=torch.float16)
    broadcast = tensor[:1].expand(2, -1, -1, -1)
    for other in (heads_first, part_of_longer, shifted, narrow, broadcast):
        assert not have_token_rows(tensor, other)
    # One sequence may be a part of a longer one.
    assert have_token_rows(part_of_longer[:1])


@pytest.mark.parametrize("capability", [(0, 0), (8, 0), (9, 0), (12, 0)], ids=lambda pair: f"sm{pair[0]}{pair[1]}")
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block_size", [64, 128])
def test_only_hopper_uses_the_copy_engine(block_size, head_dim, capability):
    for has_rows, has_tail, causal in [(a, b, c) for a in (True, False) for b in (True, False) for c in (True, False)]:
        config = short_list_config(
            head_dim, block_size, capability, has_rows=has_rows, has_tail=has_tail, causal=causal
        )
        assert config.use_tma == (capability[0] == 9 and has_rows and not causal)
        assert block_size % config.block_n == 0
        # With a second loop for a tail, the kernel would spill under such a bound.
        assert config.max_registers is None or not has_tail
