from dataclasses import replace
from typing import Any

import pytest
import torch
from farspan.kernels import cpu_attention as module
from farspan.kernels.batch import PagedBatch
from farspan.kernels.cpu_attention import cpu_attention, write_kv_cpu
from farspan.kernels.tiles import BlockLists, PrefillTiles
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.helpers import (
    Inputs,
    assert_attention_close,
    make_batch,
    poisoned_like,
    random_block_lists,
    reference_attention,
)
from tests.kernels.string_helpers import Shift, inverse_frequencies, make_shift, string_reference

MIXED = ([1, 63, 1, 300, 17, 1, 0, 40], [1, 63, 200, 300, 150, 65, 9, 333])


def attend(
    batch: Inputs,
    tiles: PrefillTiles | None = None,
    block_lists: BlockLists | None = None,
    turn: Shift | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out = poisoned_like(batch.query)
    lse = torch.full((batch.query.shape[1], len(batch.query)), float("nan"))
    cpu_attention(
        batch.query,
        batch.kv,
        batch.paged,
        batch.scale,
        out=out,
        lse=lse,
        tiles=tiles,
        block_lists=block_lists,
        turn=turn,
    )
    return out, lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("heads", "head_dim", "page_size", "layout"),
    [((4, 4), 64, 16, "lbhnc"), ((7, 1), 96, 32, "lbnhc"), ((16, 2), 128, 128, "lbhnc"), ((2, 1), 256, 64, "lbnhc")],
    ids=["gqa1-d64-page16", "gqa7-d96-page32-lbnhc", "gqa8-d128-page128", "gqa2-d256-page64-lbnhc"],
)
def test_mixed_batch(heads: tuple[int, int], head_dim: int, page_size: int, layout: str, dtype: torch.dtype) -> None:
    batch = make_batch(
        *MIXED, num_heads=heads[0], num_kv_heads=heads[1], head_dim=head_dim, page_size=page_size, dtype=dtype,
        layout=layout,
    )  # fmt: skip
    assert_attention_close(*attend(batch), *reference_attention(batch), dtype)


def chunk_of(inputs: Inputs, start: int, end: int) -> PagedBatch:
    """A batch of one request with the tokens [start, end) as its chunk."""
    starts, lens = torch.tensor([0, end - start], dtype=torch.int32), torch.tensor([end], dtype=torch.int32)
    return replace(inputs.paged, query_start_loc=starts, kv_lens=lens, max_query_len=end - start)


def test_chunks_give_the_rows_of_the_whole() -> None:
    whole = make_batch([1000], [1000], page_size=64)
    out, lse = attend(whole)
    start = 0
    for end in (1, 64, 577, 1000):
        part_out, part_lse = poisoned_like(whole.query[start:end]), torch.empty(4, end - start)
        cpu_attention(
            whole.query[start:end], whole.kv, chunk_of(whole, start, end), whole.scale,
            out=part_out, lse=part_lse,
        )  # fmt: skip
        torch.testing.assert_close(part_out, out[start:end], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(part_lse, lse[:, start:end], atol=2e-6, rtol=1e-6)
        start = end


def test_decode_batches_are_bounded_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    lens = [1, 500, 3, 17, 480, 16, 15, 260, 33, 32]
    batch = make_batch([1] * len(lens), lens)
    expected = reference_attention(batch)
    assert_attention_close(*attend(batch), *expected, torch.float32)
    monkeypatch.setattr(module, "MAX_BATCH_ELEMENTS", 600 * 2 * 128)
    assert_attention_close(*attend(batch), *expected, torch.float32)


def test_padding_rows() -> None:
    batch = make_batch([1, 1, 4], [20, 30, 40])
    lens = torch.tensor([20, 0, 40], dtype=torch.int32)
    out, lse = poisoned_like(batch.query), torch.full((4, 6), float("nan"))
    cpu_attention(batch.query, batch.kv, replace(batch.paged, kv_lens=lens), batch.scale, out=out, lse=lse)
    assert bool((out[1] == 0).all())
    assert bool(lse[:, 1].isneginf().all())
    expected_out, expected_lse = reference_attention(batch)
    keep = [0, 2, 3, 4, 5]
    torch.testing.assert_close(out[keep], expected_out[keep], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[:, keep], expected_lse[:, keep], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_list_heads", [1, 2, 4, 8])
def test_block_lists(num_list_heads: int) -> None:
    batch = make_batch([300, 1, 130, 63, 1], [300, 77, 500, 1000, 64], num_heads=8, num_kv_heads=2)
    tiles = batch.tiles(64)
    lists = random_block_lists(tiles, num_list_heads, 0.4)
    expected = reference_attention(batch, tiles=tiles, block_lists=lists)
    assert_attention_close(*attend(batch, tiles, lists), *expected, torch.float32)


def test_requests_without_tiles_are_dense() -> None:
    batch = make_batch([100, 1, 50], [100, 77, 200])
    tiles = batch.tiles(64, requests=[2])
    lists = random_block_lists(tiles, 4, 0.3)
    out, lse = attend(batch, tiles, lists)
    dense = reference_attention(batch)
    listed = reference_attention(batch, tiles=tiles, block_lists=lists)
    torch.testing.assert_close(out[:101], dense[0][:101], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out[101:], listed[0][101:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[:, 101:], listed[1][:, 101:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("is_neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("rotary_dim", [64, 32], ids=["full", "partial"])
@pytest.mark.parametrize("shift", [1, 50, 64, 149, 150, 151, 333, 10_000])
def test_string(shift: int, rotary_dim: int, is_neox: bool) -> None:
    batch = make_batch([150, 1, 70, 1, 1], [150, shift % 400 + 1, 290, 151, 40])
    inv_freq = inverse_frequencies(rotary_dim)
    turn = make_shift(inv_freq, shift, 7, is_neox, torch.device("cpu"))
    assert_attention_close(*attend(batch, turn=turn), *string_reference(batch, turn, inv_freq), torch.float32)


@pytest.mark.parametrize("tile", [16, 256])
def test_string_with_any_tile(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DENSE_TILE", tile)
    batch = make_batch([203], [411])
    inv_freq = inverse_frequencies(64)
    turn = make_shift(inv_freq, 100, 20, True, torch.device("cpu"))
    assert_attention_close(*attend(batch, turn=turn), *string_reference(batch, turn, inv_freq), torch.float32)


@pytest.mark.parametrize("shift", [20, 100, 130, 400])
def test_string_with_block_lists(shift: int) -> None:
    batch = make_batch([120, 63], [420, 63])
    tiles = batch.tiles(64)
    lists = random_block_lists(tiles, 4, 0.5)
    inv_freq = inverse_frequencies(64)
    turn = make_shift(inv_freq, shift, 7, True, torch.device("cpu"))
    expected = string_reference(batch, turn, inv_freq, tiles, lists)
    assert_attention_close(*attend(batch, tiles, lists, turn), *expected, torch.float32)


@pytest.mark.parametrize("layout", ["lbhnc", "lbnhc"])
def test_write_then_read(layout: str) -> None:
    batch = make_batch([5, 0, 33], [20, 7, 33], layout=layout)
    expected = batch.kv_cache.clone()
    page, offset = batch.slot_mapping // 16, batch.slot_mapping % 16
    batch.kv_cache[page, :, offset] = float("nan")
    slots = torch.cat([torch.tensor([-1]), batch.slot_mapping, torch.tensor([-1])])
    spare = torch.full((1, 2, 64), 5.0)
    key = torch.cat([spare, batch.key, spare, spare])
    value = torch.cat([spare, batch.value, spare, spare])
    write_kv_cpu(key, value, batch.kv_cache, slots)
    torch.testing.assert_close(batch.kv_cache, expected, equal_nan=True, atol=0, rtol=0)


class Copies(TorchDispatchMode):
    """The most elements of a tensor that an operation made and that lies outside `memory`."""

    def __init__(self, memory: torch.Tensor):
        super().__init__()
        self.memory, self.largest = memory.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at its result."""
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() != self.memory:
            self.largest = max(self.largest, result.numel())
        return result


# The last ones turn all keys of a page and no more, some of the first page, and none.
@pytest.mark.parametrize("shift", [None, 100, 936, 996, 1200])
@pytest.mark.parametrize(
    "ids",
    [[*range(2, 18)], [*range(17, 1, -1)], [*range(9, 5, -1), *range(10, 18), *range(2, 6)], [*range(2, 34, 2)]],
    ids=["up", "down", "runs", "apart"],
)
def test_pages_that_follow_each_other_are_read_in_place(
    monkeypatch: pytest.MonkeyPatch, shift: int | None, ids: list[int]
) -> None:
    """A long request alone, whose last page is not full; the pages around its own hold NaN."""
    monkeypatch.setattr(module, "MAX_RUNS", 8)
    shuffled = make_batch([1], [1000], page_size=64)
    own = shuffled.block_table[0, :16].long()
    pages = torch.full((36, *shuffled.kv_cache.shape[1:]), float("nan"))
    pages[ids] = shuffled.kv_cache[own]
    table = shuffled.block_table.clone()
    table[0, :16] = torch.tensor(ids, dtype=torch.int32)
    batch = replace(shuffled, kv_cache=pages, block_table=table)
    inv_freq = inverse_frequencies(64)
    turn = make_shift(inv_freq, shift, 16, True, torch.device("cpu")) if shift is not None else None
    expected = reference_attention(batch) if turn is None else string_reference(batch, turn, inv_freq)
    assert_attention_close(*attend(shuffled, turn=turn), *expected, torch.float32)
    with Copies(pages) as copies:
        found = attend(batch, turn=turn)
    assert_attention_close(*found, *expected, torch.float32)
    # The last page aside: weights of each head at most, never keys or values.
    if ids[0] + 2 != ids[1]:
        assert copies.largest < 1000 * batch.kv_cache.shape[1] * 64 / 4
