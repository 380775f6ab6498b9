"""Block lists of static patterns against their definition, one (query block, KV block) pair at a time."""

import pytest
import torch
from farspan.kernels.block_patterns import (
    PATTERNS,
    check_block_mask,
    gather_rows,
    mask_rows,
    static_block_lists,
)
from farspan.kernels.tiles import BlockLists, make_prefill_tiles

CPU = torch.device("cpu")
SHAPES = [
    pytest.param([1], [1], id="one-token"),
    pytest.param([63, 1000], [63, 1000], id="whole-prompts"),
    pytest.param([200, 1, 129], [1000, 129, 2049], id="chunks"),
]


def sees(pattern: str, i: int, j: int, sink: int, local: int, stride: int, causal: bool) -> bool:
    """Whether query block i sees KV block j: the definition, one cell at a time."""
    if causal and j > i:
        return False
    distance = abs(i - j)
    return {
        "sink_local": j < sink or distance < local,
        "strided": distance < local or distance % stride == 0,
        "butterfly": (i ^ j).bit_count() <= 1,
        "dilated": distance % stride == 0 and distance // stride < local,
    }[pattern]


def assert_lists(lists: BlockLists, head: int, tile: int, expected: list[int]) -> None:
    """The list of one tile has the expected ids, in order, and the right dtype."""
    count = int(lists.block_counts[head, tile])
    assert lists.block_ids[head, tile, :count].tolist() == expected
    assert lists.block_ids.dtype == lists.block_counts.dtype == torch.int32


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("block_size", [64, 128], ids=["block64", "block128"])
@pytest.mark.parametrize(
    ("sink", "local", "stride"), [(1, 8, 8), (0, 1, 1), (2, 3, 4), (5, 40, 3), (50, 2, 50)], ids=str
)
@pytest.mark.parametrize(("query_lens", "seq_lens"), SHAPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lists_match_the_definition(pattern, query_lens, seq_lens, sink, local, stride, block_size, causal):
    starts = torch.tensor([0, *query_lens]).cumsum(0).tolist()
    tiles = make_prefill_tiles(starts, seq_lens, block_size, CPU)
    num_kv_blocks = torch.tensor([-(-n // block_size) for n in seq_lens], dtype=torch.int32)
    lists = static_block_lists(
        tiles,
        pattern,
        sink_blocks=sink,
        local_blocks=local,
        stride=stride,
        causal=causal,
        num_kv_blocks=None if causal else num_kv_blocks,
    )
    for tile in range(tiles.num_tiles):
        i, blocks = int(tiles.tile_block[tile]), int(num_kv_blocks[tiles.tile_request[tile]])
        expected = [j for j in range(blocks) if sees(pattern, i, j, sink, local, stride, causal)]
        assert i in expected
        assert_lists(lists, 0, tile, expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_lists_do_not_depend_on_chunks(pattern):
    whole = make_prefill_tiles([0, 1000], [1000], 64, CPU)
    expected = static_block_lists(whole, pattern, local_blocks=2, stride=3)
    for start, end in [(0, 300), (300, 301), (301, 1000)]:
        tiles = make_prefill_tiles([0, end - start], [end], 64, CPU)
        lists = static_block_lists(tiles, pattern, local_blocks=2, stride=3)
        for tile, block in enumerate(tiles.tile_block.tolist()):
            count = int(expected.block_counts[0, block])
            assert_lists(lists, 0, tile, expected.block_ids[0, block, :count].tolist())


@pytest.mark.parametrize(("pattern", "width"), [("sink_local", 9), ("dilated", 8), ("butterfly", 14)])
def test_memory_is_linear(pattern, width):
    tiles = make_prefill_tiles([0, 2**20], [2**20], 128, CPU)
    assert static_block_lists(tiles, pattern).block_ids.shape == (1, 2**13, width)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pattern": "spiral"}, "sink_local, strided, butterfly, dilated"),
        ({"pattern": "sink_local", "local_blocks": 0}, "local_blocks=0; it must be at least 1"),
        ({"pattern": "sink_local", "sink_blocks": -1}, "sink_blocks=-1"),
        ({"pattern": "strided", "stride": 0}, "stride=0"),
        ({"pattern": "strided", "causal": False}, "num_kv_blocks is needed"),
    ],
    ids=["unknown", "local", "sink", "stride", "bidirectional"],
)
def test_bad_options_are_refused(arguments, message):
    tiles = make_prefill_tiles([0, 10], [10], 64, CPU)
    with pytest.raises(ValueError, match=message):
        static_block_lists(tiles, **arguments)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("heads", [1, 3])
def test_masks_become_lists(heads, causal):
    blocks = 17
    mask = (torch.rand(heads, blocks, blocks) < 0.3) | torch.eye(blocks, dtype=torch.bool)
    check_block_mask(mask, causal=causal)
    seq_lens = [700, 1088]
    tiles = make_prefill_tiles([0, 700, 1000], seq_lens, 64, CPU)
    num_kv_blocks = torch.tensor([11, 17], dtype=torch.int32)
    lists = gather_rows(mask_rows(mask, causal=causal), tiles, None if causal else num_kv_blocks)
    for tile in range(tiles.num_tiles):
        i, end = int(tiles.tile_block[tile]), int(num_kv_blocks[tiles.tile_request[tile]])
        for head in range(heads):
            seen = mask[head, i, : i + 1 if causal else end]
            assert_lists(lists, head, tile, seen.nonzero()[:, 0].tolist())


def test_a_mask_must_show_every_query_its_own_block():
    mask = torch.eye(5, dtype=torch.bool).repeat(2, 1, 1)
    mask[1, 3, 3] = False
    with pytest.raises(ValueError, match="head 1, query block 3 does not see its own block"):
        check_block_mask(mask)
    with pytest.raises(ValueError, match="head 1, query block 3 does not see any block"):
        check_block_mask(mask, causal=False)
    mask[1, 3, 0] = True
    check_block_mask(mask, causal=False)


@pytest.mark.parametrize(
    "mask",
    [torch.ones(2, 2, dtype=torch.bool), torch.ones(1, 2, 2), torch.ones(1, 3, 2, dtype=torch.bool)],
    ids=["two-dims", "float", "tall"],
)
def test_malformed_masks_are_refused(mask):
    with pytest.raises(ValueError, match="block mask"):
        check_block_mask(mask)


def test_a_mask_must_cover_the_longest_request():
    rows = mask_rows(torch.ones(1, 4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"covers 4 blocks of 64 tokens \(256 tokens\), but a request has 5 blocks"):
        gather_rows(rows, make_prefill_tiles([0, 10], [257], 64, CPU))
