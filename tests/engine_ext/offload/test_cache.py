"""Pools, table and staging follow plans: pages are where the plan says, and staged pages are those of the step."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from farspan.engine_ext.offload.cache import CacheStep, ColdCache
from farspan.engine_ext.offload.pool import make_host_pool
from farspan.engine_ext.passes import Dense, Pass, StagedPages
from farspan.engine_ext.plan import OffloadSizes, ResidencyPlan
from farspan.kernels.batch import PagedBatch
from farspan.kernels.cpu_attention import read_pages
from farspan.scheduler.residency import Residency, Scheduled

PAGE, HEAD_DIM, KV_HEADS, BLOCKS = 16, 64, 4, 40
HOT = {"layer.0": 1, "layer.1": 4, "layer.2": 1}
CPU = torch.device("cpu")


def make_cache(
    num_slots: int, group_size: int = 2, device: torch.device = CPU, larger_groups: tuple[tuple[int, int], ...] = ()
) -> tuple[ColdCache, Residency]:
    sizes = OffloadSizes(
        num_blocks=BLOCKS,
        num_slots=num_slots,
        page_size=PAGE,
        page_bytes=0,
        group_size=group_size,
        staging_pages=20,
        larger_groups=larger_groups,
    )
    cold = [KV_HEADS - hot for hot in HOT.values() if hot < KV_HEADS]
    host = make_host_pool(cold, (BLOCKS, PAGE, 2 * HEAD_DIM), torch.float32, register=device.type == "cuda")
    for layer in host.layers:
        layer.fill_(float("nan"))
    slots = torch.full((sum(cold), num_slots, PAGE, 2 * HEAD_DIM), float("nan"), device=device)
    return ColdCache(HOT, KV_HEADS, sizes, host, slots, 8, 256, BLOCKS * PAGE), Residency(sizes)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def keys_of(layer: int, positions: torch.Tensor) -> torch.Tensor:
    """[num_tokens, KV_HEADS, HEAD_DIM]: told apart by layer, position and head."""
    heads = torch.arange(KV_HEADS)[:, None].float()
    return (layer * 1000 + positions[:, None, None] + heads / 8).expand(-1, -1, HEAD_DIM).contiguous()


class Driver:
    """One request that grows chunk by chunk, another that takes its slots away."""

    def __init__(self, cache: ColdCache, residency: Residency) -> None:
        self.cache, self.residency = cache, residency
        self.device = cache.entries.device
        self.blocks: list[int] = []
        self.computed = 0

    def step(self, count: int) -> tuple[ResidencyPlan, CacheStep, Pass]:
        """Plan and map a chunk; returns its staged pass."""
        end = self.computed + count
        new = [BLOCKS - 1 - place for place in range(len(self.blocks), -(-end // PAGE))]
        self.blocks += new
        plan = self.residency.plan([Scheduled("a", self.computed, count, new)], [], lambda block: True)
        self.cache.follow(plan)
        table = torch.tensor([self.blocks], dtype=torch.int32, device=self.device)
        positions = torch.arange(self.computed, end)
        mapping = torch.tensor(self.blocks)[positions // PAGE] * PAGE + positions % PAGE
        kv_lens = torch.tensor([end], dtype=torch.int32, device=self.device)
        self.cache.map_step(table, kv_lens, mapping.to(self.device), end)
        pages, block_table = self.cache.stage(0, [len(self.blocks)])
        turn = self.cache.staged_turn(["layer.0", "layer.2"], [(pages,)], is_alone=True)
        starts = torch.tensor([0, count], dtype=torch.int32, device=self.device)
        batch = PagedBatch(starts, kv_lens, block_table, count, end)
        each = Pass(slice(0, count), slice(1, 3), batch, Dense("cpu", None), keys=pages)
        self.computed = end
        return plan, CacheStep(self.cache, count, turn), each

    def write(self, step: CacheStep, layer: int, count: int) -> None:
        keys = keys_of(layer, torch.arange(self.computed - count, self.computed)).to(self.device)
        name = f"layer.{layer}"
        keys = keys[:, step.kv_heads(name)]
        step.write(name, keys, -keys)

    def read(self, step: CacheStep, layer: int, each: Pass, kv_heads: slice) -> torch.Tensor:
        """[num_tokens, heads, 2 * HEAD_DIM]: what attention would read of some heads."""
        kv = step.view(f"layer.{layer}", replace(each, kv_heads=kv_heads)).of_heads(kv_heads)
        table = each.batch.block_table[0, : len(self.blocks)].long()
        found = kv.pages[table].transpose(1, 2).flatten(0, 1)[: self.computed]
        assert torch.equal(torch.cat(kv.tokens(self.computed), dim=-1), found), "the pages of one request are adjacent"
        return found.cpu()


def expected(layer: int, length: int, kv_heads: slice) -> torch.Tensor:
    keys = keys_of(layer, torch.arange(length))[:, kv_heads]
    return torch.cat([keys, -keys], dim=-1)


@pytest.mark.parametrize("num_slots", [6, 12])
def test_staged_pages_are_those_of_the_step(num_slots: int, device: torch.device) -> None:
    """Layer by layer, each group after the keys of its own layer are written, with pages fetched ahead."""
    cache, residency = make_cache(num_slots, device=device)
    driver = Driver(cache, residency)
    for count in (30, 40, 1, 33, 64, 20, 64):
        _, step, each = driver.step(count)
        for layer in (0, 2):
            driver.write(step, layer, count)
            for heads in (slice(1, 3), slice(3, 4)):
                found = driver.read(step, layer, each, heads)
                assert torch.equal(found, expected(layer, driver.computed, heads)), (count, layer, heads)
        cache.check_integrity()
    assert cache.num_spilled > 0
    assert cache.num_staged > 0


def test_short_requests_are_staged_in_larger_groups(device: torch.device) -> None:
    """Of all three cold heads up to 6 pages, of two up to 10, then one by one; each in the room of one head of 20."""
    cache, residency = make_cache(6, 1, device, ((6, 3), (10, 2)))
    driver, groups = Driver(cache, residency), []
    for count in (30, 40, 26, 1, 63, 20, 64):
        _, step, each = driver.step(count)
        assert isinstance(each.keys, StagedPages)
        for layer in (0, 2):
            driver.write(step, layer, count)
            staged = cache.groups_of(cache.layers[f"layer.{layer}"], each.keys.group_size)
            for heads in staged:
                assert torch.equal(driver.read(step, layer, each, heads), expected(layer, driver.computed, heads))
        groups.append(len(staged))
        cache.check_integrity()
    assert groups == [1, 1, 1, 2, 2, 3, 3]
    assert cache.num_spilled > 0


def test_the_first_group_is_fetched_before_its_attention() -> None:
    """Beside the layers before it, as soon as the step is known; the buffers are those of the step from then on."""
    cache, residency = make_cache(6)
    driver = Driver(cache, residency)
    for count in (60, 64, 64):
        _, step, each = driver.step(count)
        for layer in (0, 2):
            driver.write(step, layer, count)
        if count == 64:
            assert cache.staging is not None
            assert isinstance(each.keys, StagedPages)
            found = cache.staging.room(each.keys, 0).clone()
            entries = cache.entries[0, : len(driver.blocks)]
            on_host = (entries < 0).nonzero().flatten()
            assert len(on_host) > 0
            pages = found[:, on_host].flatten(1, 2)
            positions = (on_host[:, None] * PAGE + torch.arange(PAGE)).flatten()
            assert torch.equal(pages.transpose(0, 1), expected(0, driver.computed, slice(1, 3))[positions])
        for layer in (0, 2):
            for heads in (slice(1, 3), slice(3, 4)):
                found = driver.read(step, layer, each, heads)
                assert torch.equal(found, expected(layer, driver.computed, heads))


def test_pages_of_several_requests_are_not_adjacent() -> None:
    cache, residency = make_cache(6)
    _, step, each = Driver(cache, residency).step(60)
    pages, _ = cache.stage(0, [2, 1])
    turn = cache.staged_turn(["layer.0"], [(pages,)], is_alone=True)
    step, each = replace(step, turn=turn), replace(each, keys=pages)
    assert not step.view("layer.0", each).are_adjacent


def test_views_read_slots_and_host_memory() -> None:
    cache, residency = make_cache(6)
    driver = Driver(cache, residency)
    for count in (60, 64, 64):
        _, step, each = driver.step(count)
        for layer in (0, 2):
            driver.write(step, layer, count)
    entries = cache.entries[0, : len(driver.blocks)].long()
    assert (entries < 0).any()
    assert (entries >= 0).any()
    for layer in (0, 2):
        kv = step.view(f"layer.{layer}", replace(each, keys="both"))
        assert kv.first_kv_head == 1
        found = read_pages(kv, entries).flatten(1, 2)[:, :188].transpose(0, 1)
        assert torch.equal(found, expected(layer, 188, slice(1, 4)))


def test_a_turn_that_is_not_alone_can_be_interrupted() -> None:
    """Two groups of layers stage in turn in the same two buffers."""
    cache, residency = make_cache(6)
    driver = Driver(cache, residency)
    for count in (60, 64):
        _, step, each = driver.step(count)
        for layer in (0, 2):
            driver.write(step, layer, count)
    pages = each.keys
    turns: dict[int, Any] = {
        layer: cache.staged_turn([f"layer.{layer}"], [(pages,)], is_alone=False)  # type: ignore[list-item]
        for layer in (0, 2)
    }
    for layer in (0, 2, 0):
        for heads in (slice(1, 3), slice(3, 4)):
            found = driver.read(CacheStep(cache, 64, turns[layer]), layer, each, heads)
            assert torch.equal(found, expected(layer, driver.computed, heads))


@pytest.mark.faults
def test_another_view_of_the_table_is_an_error() -> None:
    cache, _ = make_cache(6)
    with pytest.raises(RuntimeError, match="do not agree"):
        cache.follow(ResidencyPlan(view=1))


@pytest.mark.faults
@pytest.mark.parametrize("where", ["slot", "host", "table"])
def test_integrity_is_checked(where: str) -> None:
    cache, residency = make_cache(6)
    driver = Driver(cache, residency)
    for count in (60, 64):
        _, step, _ = driver.step(count)
        for layer in (0, 2):
            driver.write(step, layer, count)
    cache.check_integrity()
    plan, _, _ = driver.step(30)
    assert plan.spills
    cache.check_integrity()
    if where == "host":
        cache.host.layers[0][0, plan.spills[0].block, 0, 0] += 1
    elif where == "slot":
        # A page in both pools, as after a load.
        block, slot = list(cache.table.known.items())[-1]
        cache.host.layers[0][:, block] = cache.pools.slots[:3, slot]
        cache.host.layers[1][:, block] = cache.pools.slots[3:, slot]
        cache.table.on_host.add(block)
        cache.check_integrity()
        cache.pools.slots[0, slot, 0, 0] = 7
    else:
        cache.table.slot_of[driver.blocks[-1]] = -1
    with pytest.raises(AssertionError):
        cache.check_integrity()


def test_until_the_first_plan_every_block_lies_in_slot_0() -> None:
    cache, _ = make_cache(6)
    table = torch.tensor([[7, 3]], dtype=torch.int32)
    cache.map_step(table, torch.tensor([20], dtype=torch.int32), torch.tensor([7 * PAGE + 5, -1]), 20)
    assert cache.entries[0, :2].tolist() == [0, 0]
    assert cache.slot_mapping[:2].tolist() == [5, -1]
