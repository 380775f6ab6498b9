"""Passes of Star Attention: which kernel computes a query on a host that has no keys for it."""

import pytest
import torch
from farspan.engine_ext.config import DensePrefill
from farspan.engine_ext.pass_maker import PassMaker
from farspan.engine_ext.passes import Dense
from farspan.engine_ext.star.pieces import batch_of, cut_chunk
from farspan.engine_ext.star.shard import StarShard

PAGE = 16


def shard_of(rank: int, num_blocks: int) -> StarShard:
    """Of a context of one block, on two hosts."""
    return StarShard(
        name="r",
        context_len=2 * PAGE,
        block_len=2 * PAGE,
        anchor_len=0,
        first_block=rank,
        num_blocks=num_blocks,
        num_hosts=2,
        query_host=0,
        rank=rank,
    )


@pytest.mark.parametrize(("rank", "num_blocks", "kernel"), [(0, 1, "fa3"), (1, 0, "triton")], ids=["keys", "none"])
def test_flash_attention_3_gets_no_query_without_keys(rank: int, num_blocks: int, kernel: str) -> None:
    """What it gives for one is undefined; ours gives zeros and minus infinity, which the combination leaves out."""
    shard = shard_of(rank, num_blocks)
    pieces = cut_chunk(0, 0, shard, shard.local_len, shard.local_len + 5)
    assert [piece.kv_len for piece in pieces] == [shard.local_len + 5 if num_blocks else 0]
    maker = PassMaker(2, "fa3", 1, None, True, torch.device("cpu"))
    made = maker.star(DensePrefill(), pieces, batch_of(pieces, torch.zeros(1, 4, dtype=torch.int32), PAGE))
    assert isinstance(made.work, Dense)
    assert made.work.kernel == kernel
    assert (made.work.tiles is not None) == (kernel == "triton")
