"""Pages between slots, host memory and staging: the kernels against PyTorch, and attention over both pools."""

from dataclasses import replace

import pytest
import torch
from farspan.kernels import kv_gather
from farspan.kernels.batch import KVView
from farspan.kernels.cpu_attention import cpu_attention
from farspan.kernels.decode import paged_decode
from farspan.kernels.kv_gather import (
    PagePools,
    host_offsets,
    map_step,
    move_pages,
    stage_pages,
)
from farspan.kernels.kv_gather_cpu import map_step_cpu, move_pages_cpu, stage_pages_cpu

from tests.kernels.helpers import GARBAGE_PAGE, Inputs, assert_attention_close, make_batch, reference_attention

LAYER_ROWS = (2, 1, 3)
NUM_SLOTS, NUM_BLOCKS = 7, 11


def make_pools(device: torch.device, page_size: int, head_dim: int, dtype: torch.dtype) -> PagePools:
    shape = (page_size, 2 * head_dim)
    host = tuple(torch.randn(rows, NUM_BLOCKS, *shape).to(dtype) for rows in LAYER_ROWS)
    if device.type == "cuda":
        host = tuple(each.pin_memory() for each in host)
    slots = torch.randn(sum(LAYER_ROWS), NUM_SLOTS, *shape).to(device, dtype)
    return PagePools(slots, host, host_offsets(slots, host))


def copy_of(pools: PagePools) -> PagePools:
    """The same pages elsewhere, on the CPU."""
    host = tuple(each.clone() for each in pools.host)
    slots = pools.slots.cpu().clone()
    return PagePools(slots, host, host_offsets(slots, host))


def ints(values: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


SHAPES = pytest.mark.parametrize(
    ("page_size", "head_dim", "dtype"),
    [(16, 64, torch.float32), (32, 96, torch.float16), (128, 128, torch.bfloat16)],
    ids=["page16-d64-float32", "page32-d96-float16", "page128-d128-bfloat16"],
)


@SHAPES
@pytest.mark.parametrize("to_host", [True, False], ids=["to-host", "from-host"])
def test_moves(page_size: int, head_dim: int, dtype: torch.dtype, to_host: bool, device: torch.device) -> None:
    pools = make_pools(device, page_size, head_dim, dtype)
    expected = copy_of(pools)
    blocks, slots = [3, 10, 0], [6, 1, 2]
    move_pages_cpu(expected, ints(blocks, torch.device("cpu")), ints(slots, torch.device("cpu")), to_host=to_host)
    before = copy_of(pools)
    move_pages(pools, ints(blocks, device), ints(slots, device), to_host=to_host)
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(pools.slots.cpu(), expected.slots)
    assert all(torch.equal(*pair) for pair in zip(pools.host, expected.host, strict=True))
    assert torch.equal(pools.slots.cpu(), before.slots) is to_host
    for row in range(sum(LAYER_ROWS)):
        assert torch.equal(host_page(pools, row, 10), pools.slots[row, 1].cpu())


def host_page(pools: PagePools, row: int, block: int) -> torch.Tensor:
    return torch.cat(list(pools.host))[row, block]


@SHAPES
def test_staging(page_size: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Rows of the middle layers, from both pools in turn; what is not named stays as it is."""
    pools = make_pools(device, page_size, head_dim, dtype)
    entries, rows = ints([2, -1 - 4, 0, -1 - 10, -1], device), slice(1, 3)
    staging = torch.full((2, 6, page_size, 2 * head_dim), float("nan"), dtype=dtype, device=device)
    expected = staging.cpu().clone()
    for from_host in (True, False):
        stage_pages(pools, entries, rows, staging, from_host=from_host)
        stage_pages_cpu(copy_of(pools), entries.cpu(), rows, expected, from_host=from_host)
    assert torch.equal(staging.cpu()[:, :5], expected[:, :5])
    assert expected[:, 5].isnan().all()
    assert torch.equal(expected[1, 1], host_page(pools, 2, 4))
    assert torch.equal(expected[0, 2], pools.slots[1, 0].cpu())


def test_tables(device: torch.device) -> None:
    slot_of = ints([0, -1, 3, -1, 1], device)
    block_table = ints([[4, 3, 2, GARBAGE_PAGE], [1, GARBAGE_PAGE, 5, 5], [GARBAGE_PAGE] * 4], device).view(3, 4)
    kv_lens = ints([33, 16, 0], device)
    slot_mapping = torch.tensor([4 * 16 + 5, -1, 16, 2 * 16 + 15, 0], device=device)
    for mapping, where in ((map_step, device), (map_step_cpu, torch.device("cpu"))):
        entries = torch.full((4, 6), 77, dtype=torch.int32, device=where)
        mapped = torch.full((6,), 77, device=where)
        inputs = [each.to(where) for each in (block_table, kv_lens, slot_mapping, slot_of)]
        mapping(*inputs, 16, 64, entries, mapped)
        assert entries[:3, :3].tolist() == [[1, -4, 3], [-2, 77, 77], [77, 77, 77]]
        assert (entries[:, 3:] == 77).all()
        assert (entries[3] == 77).all()
        assert mapped.tolist() == [16 + 5, -1, -1, 3 * 16 + 15, 0, 77]


def test_long_tables(device: torch.device) -> None:
    """More pages and tokens than one program takes."""
    generator = torch.Generator().manual_seed(0)
    slot_of = torch.randint(-1, 500, (3000,), generator=generator).int()
    block_table = torch.randint(0, 3000, (3, 2100), generator=generator).int()
    kv_lens = torch.tensor([2100 * 16 - 3, 5, 1025 * 16], dtype=torch.int32)
    slot_mapping = torch.randint(-2, 3000 * 16, (2500,), generator=generator)
    found = []
    for mapping, where in ((map_step, device), (map_step_cpu, torch.device("cpu"))):
        entries, mapped = torch.zeros(3, 2101, dtype=torch.int32, device=where), torch.zeros(2500, device=where).long()
        inputs = [each.to(where) for each in (block_table, kv_lens, slot_mapping, slot_of)]
        mapping(*inputs, 16, 2100 * 16, entries, mapped)
        found.append((entries.cpu(), mapped.cpu()))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_steps_that_are_alike_share_a_launch(device: torch.device) -> None:
    """And each writes its own tables."""
    kv_gather._map_launch.cache_clear()
    slot_of = ints([0, 2, 1, -1], device)
    for block_table, place in (([[1, 2]], 17), ([[3, 1]], 40), ([[2, 3]], 55)):
        blocks, found = ints(block_table, device).view(1, 2), []
        for mapping, where in ((map_step, device), (map_step_cpu, torch.device("cpu"))):
            entries = torch.zeros(1, 2, dtype=torch.int32, device=where)
            mapped = torch.zeros(1, dtype=torch.int64, device=where)
            inputs = [each.to(where) for each in (blocks, ints([20], device), torch.tensor([place]), slot_of)]
            mapping(*inputs, 16, 32, entries, mapped)
            found.append((entries.tolist(), mapped.tolist()))
        assert found[0] == found[1]
    assert kv_gather._map_launch.cache_info()[:2] == (2, 1)  # hits, misses


def half_on_the_host(batch: Inputs) -> tuple[KVView, torch.Tensor]:
    """The batch's pages in two pools, each page in one of them and garbage in the other; and the table of both."""
    num_pages = len(batch.kv_cache)
    on_host = torch.arange(num_pages) % 2 == 1
    pages, host = batch.kv_cache.clone(), batch.kv_cache.cpu().clone()
    pages[on_host.to(pages.device)] = float("nan")
    host[~on_host] = float("nan")
    # Heads apart, as in the pool.
    host = host.transpose(0, 1).contiguous()
    if pages.device.type == "cuda":
        host = host.pin_memory()
    blocks = batch.block_table
    is_page = blocks < num_pages
    on_host = torch.where(is_page, blocks % 2 == 1, False)
    return KVView(pages, 0, host.transpose(0, 1)), torch.where(on_host, -1 - blocks, blocks)


@pytest.mark.parametrize("num_splits", [1, 5])
@pytest.mark.parametrize(("page_size", "dtype"), [(16, torch.float32), (64, torch.float16)], ids=["page16", "page64"])
def test_decode_reads_both_pools(num_splits: int, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
    lens = [1, 63, 64, 65, 300, 129, 17]
    batch = make_batch([1] * len(lens), lens, page_size=page_size, dtype=dtype, device=device)
    expected = reference_attention(batch)
    kv, table = half_on_the_host(batch)
    paged = replace(batch.paged, block_table=table)
    found = paged_decode(batch.query, kv, paged, batch.scale, num_splits=num_splits, min_split_keys=64)
    assert_attention_close(*found, *expected, dtype)
    heads = slice(1, 2)
    query = batch.query[:, 2:]
    part = paged_decode(query, kv.of_heads(heads), paged, batch.scale, num_splits=num_splits, min_split_keys=64)
    assert_attention_close(*part, expected[0][:, 2:], expected[1][2:], dtype)


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 20, 40]], ids=["decode", "mixed"])
def test_the_cpu_path_reads_both_pools(query_lens: list[int]) -> None:
    batch = make_batch(query_lens, [70, 33, 40])
    kv, table = half_on_the_host(batch)
    out, lse = torch.empty_like(batch.query), torch.empty(batch.query.shape[1], len(batch.query))
    cpu_attention(batch.query, kv, replace(batch.paged, block_table=table), batch.scale, out=out, lse=lse)
    assert_attention_close(out, lse, *reference_attention(batch), torch.float32)
