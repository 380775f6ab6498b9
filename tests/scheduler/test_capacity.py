"""Pool sizes hold what was asked and stay inside both memories, for random models, loads and memories."""

import random
import subprocess
import sys
from dataclasses import replace

import pytest
from farspan.scheduler.capacity import (
    NUM_STAGING_BUFFERS,
    KVLayout,
    Load,
    choose_group_size,
    group_sizes,
    least_span_pages,
    longest_context,
    max_blocks,
    max_slots,
    min_slots,
    needed_blocks,
    plan_kv,
    staging_bytes_of,
)

GIB = 2**30
KV_8B = KVLayout(num_kv_heads=8, head_dim=128, element_bytes=2, page_size=128, hot_heads=(0,) * 32)
SEEDS = range(150)


def random_layout(rng: random.Random) -> KVLayout:
    num_kv_heads = rng.choice([1, 2, 3, 4, 6, 8])
    num_layers = rng.randint(1, 6)
    hot = [rng.randint(0, num_kv_heads) for _ in range(num_layers)]
    hot = rng.choice([hot, [0] * num_layers, [num_kv_heads] * num_layers, [hot[0]] * num_layers])
    return KVLayout(
        num_kv_heads=num_kv_heads,
        head_dim=rng.choice([64, 96, 128]),
        element_bytes=rng.choice([2, 4]),
        page_size=rng.choice([16, 64, 128]),
        hot_heads=tuple(hot),
        stub_bytes=rng.choice([0, 0, 64]),
    )


def random_load(rng: random.Random) -> Load:
    return Load(
        context_len=rng.randint(1, 5000),
        num_requests=rng.randint(1, 5),
        max_num_batched_tokens=rng.choice([1, 100, 512, 2048]),
        max_num_seqs=rng.randint(1, 8),
    )


def random_memories(rng: random.Random, layout: KVLayout) -> tuple[int, int]:
    """HBM and host memory about as large as what is asked of them."""
    whole = 150 * layout.num_kv_heads * len(layout.hot_heads) * layout.page_bytes
    return int(whole * rng.random() ** 2), int(whole * rng.random() ** 2)


@pytest.mark.parametrize("seed", SEEDS)
def test_pools_hold_the_load_and_stay_inside_both_memories(seed: int) -> None:
    rng = random.Random(seed)
    layout, load = random_layout(rng), random_load(rng)
    hbm_bytes, host_bytes = random_memories(rng, layout)
    plan = plan_kv(layout, load, hbm_bytes, host_bytes)
    wanted = needed_blocks(load.context_len, layout.page_size, load.num_requests)
    fewest = min_slots(load.max_num_batched_tokens, layout.page_size, load.max_num_seqs)
    cold = layout.cold_block_bytes
    least_hbm = wanted * layout.hot_block_bytes
    span = least_span_pages(load.context_len, load.max_num_batched_tokens, layout.page_size)
    if cold:
        least_hbm += fewest * cold + staging_bytes_of(layout, 1, span * layout.page_size)
    is_gathered = least_hbm <= hbm_bytes
    is_resident = bool(cold) and hbm_bytes >= wanted * (layout.hot_block_bytes + cold)
    assert (plan is not None) == ((is_gathered or is_resident) and wanted * cold <= host_bytes)
    if plan is None:
        return
    assert plan.num_blocks >= wanted
    assert plan.host_bytes == plan.num_blocks * cold <= host_bytes
    assert (
        plan.hbm_bytes
        == plan.num_blocks * layout.hot_block_bytes + plan.num_slots * cold + plan.staging_bytes
        <= hbm_bytes
    )
    assert plan.num_slots <= plan.num_blocks
    if not cold or plan.group_size == 0:
        assert plan.num_slots == (plan.num_blocks if cold else 0)
        assert plan.staging_bytes == 0
        return
    assert plan.num_slots >= min(fewest, plan.num_blocks)
    assert plan.group_size in group_sizes(layout)
    assert plan.staging_bytes == staging_bytes_of(layout, plan.group_size, plan.staging_pages * layout.page_size)
    whole = plan_kv(layout, load, hbm_bytes, host_bytes, has_spans=False)
    assert whole is None or whole == plan
    assert (whole is None) == (span <= plan.staging_pages < -(-load.context_len // layout.page_size))
    if whole is None:
        # Slots and buffers share what the fewest of both leave.
        assert plan.staging_pages == span or plan.staging_bytes <= hbm_bytes / 2
    # Neither another slot nor another block fits; room for the fewest slots stays even where blocks are fewer.
    room = hbm_bytes - plan.hbm_bytes - max(fewest - plan.num_blocks, 0) * cold
    assert plan.num_slots == plan.num_blocks or room < cold
    assert host_bytes - plan.host_bytes < cold or room < max(layout.hot_block_bytes, cold)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_load_that_lies_in_hbm_as_a_whole_keeps_all_its_slots(seed: int) -> None:
    rng = random.Random(seed)
    layout, load = random_layout(rng), random_load(rng)
    wanted = needed_blocks(load.context_len, layout.page_size, load.num_requests)
    fewest = min_slots(load.max_num_batched_tokens, layout.page_size, load.max_num_seqs)
    bytes_of_load = wanted * layout.hot_block_bytes + max(wanted, fewest) * layout.cold_block_bytes
    bytes_of_load += staging_bytes_of(layout, 1, load.context_len)
    plan = plan_kv(layout, load, bytes_of_load + rng.randint(0, 10 * layout.page_bytes), 10**15)
    assert plan is not None
    assert not layout.cold_block_bytes or plan.num_slots >= wanted


@pytest.mark.parametrize("seed", SEEDS)
def test_longest_context_is_what_a_search_through_all_pages_finds(seed: int) -> None:
    rng = random.Random(seed)
    layout, load = random_layout(rng), random_load(rng)
    hbm_bytes, host_bytes = random_memories(rng, layout)
    most_len = rng.randint(1, 30_000)
    group = rng.choice([None, *group_sizes(layout)])

    def fits(context_len: int) -> bool:
        return plan_kv(layout, replace(load, context_len=context_len), hbm_bytes, host_bytes, group) is not None

    lengths = [*range(layout.page_size, most_len, layout.page_size), most_len]
    expected = max((length for length in lengths if fits(length)), default=0)
    assert longest_context(layout, load, hbm_bytes, host_bytes, most_len, group) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_more_memory_never_holds_less(seed: int) -> None:
    rng = random.Random(seed)
    layout, load = random_layout(rng), random_load(rng)
    hbm_bytes, host_bytes = random_memories(rng, layout)
    before = longest_context(layout, load, hbm_bytes, host_bytes, 10**6)
    assert longest_context(layout, load, hbm_bytes + rng.randint(0, GIB), host_bytes, 10**6) >= before
    assert longest_context(layout, load, hbm_bytes, host_bytes + rng.randint(0, GIB), 10**6) >= before
    more_at_once = replace(load, num_requests=load.num_requests + 1)
    assert longest_context(layout, more_at_once, hbm_bytes, host_bytes, 10**6) <= before


@pytest.mark.parametrize("seed", SEEDS)
def test_hot_and_cold_pages_are_all_pages(seed: int) -> None:
    rng = random.Random(seed)
    layout = replace(random_layout(rng), stub_bytes=0)
    whole = len(layout.hot_heads) * layout.num_kv_heads * layout.page_bytes
    assert layout.hot_block_bytes + layout.cold_block_bytes == whole
    assert (layout.hot_token_bytes + layout.cold_token_bytes) * layout.page_size == whole
    stubbed = replace(layout, stub_bytes=10)
    assert stubbed.hot_block_bytes == layout.hot_block_bytes + 10 * layout.hot_heads.count(0)
    assert stubbed.hot_token_bytes == layout.hot_token_bytes


@pytest.mark.parametrize("seed", SEEDS)
def test_group_is_the_largest_that_fits(seed: int) -> None:
    rng = random.Random(seed)
    layout, context_len = random_layout(rng), rng.randint(1, 5000)
    budget = rng.randint(-1, 10 * staging_bytes_of(layout, 1, context_len))
    chosen = choose_group_size(layout, context_len, budget)
    sizes = group_sizes(layout)
    assert all(layout.num_kv_heads % size == 0 or size == layout.max_cold_heads for size in sizes)
    assert chosen == 0 or staging_bytes_of(layout, chosen, context_len) <= budget
    assert all(staging_bytes_of(layout, size, context_len) > budget for size in sizes if size > chosen)


def test_groups_of_known_heads() -> None:
    assert group_sizes(KV_8B) == [1, 2, 4, 8]
    assert group_sizes(KV_8B.with_hot_heads(3)) == [1, 2, 4, 5]
    assert group_sizes(KV_8B.with_hot_heads(8)) == []


def test_nothing_is_staged_where_every_block_has_a_slot() -> None:
    load = Load(context_len=4096, num_requests=1, max_num_batched_tokens=8192, max_num_seqs=1)
    exact = needed_blocks(4096, 128) * KV_8B.cold_block_bytes
    plan = plan_kv(KV_8B, load, exact, exact)
    assert plan is not None
    assert (plan.num_blocks, plan.num_slots, plan.staging_bytes) == (33, 33, 0)
    # With more host memory than that there is something to gather, if there is room for it.
    assert plan_kv(KV_8B, load, exact, 2 * exact) == plan
    gathering = plan_kv(KV_8B, load, 3 * exact, 4 * exact)
    assert gathering is not None
    assert (gathering.num_blocks, gathering.group_size) == (132, 8)
    assert plan_kv(KV_8B, load, exact - 1, exact) is None


def test_bytes_of_an_8b_model() -> None:
    assert KV_8B.page_bytes == 64 * 1024
    assert KV_8B.cold_token_bytes == 128 * 1024
    assert KV_8B.cold_block_bytes == 16 * 2**20
    assert KV_8B.hot_block_bytes == 0
    # One head group of one head over a million tokens, twice.
    assert staging_bytes_of(KV_8B, 1, 2**20) == NUM_STAGING_BUFFERS * 512 * 2**20 == GIB
    assert min_slots(8192, 128, 1) == 67
    assert min_slots(8193, 128, 4) == 73


def test_blocks_are_bounded_by_both_memories() -> None:
    half = KV_8B.with_hot_heads(4)
    assert half.hot_block_bytes == half.cold_block_bytes == 8 * 2**20
    assert max_blocks(half, 80 * 2**20, 10**15) == 10
    assert max_blocks(half, 80 * 2**20, 10**15, num_slots=3, staging_bytes=1) == 6
    assert max_blocks(half, 80 * 2**20, 33 * 2**20) == 4
    assert max_blocks(half, 80 * 2**20, 0) == 0
    assert max_blocks(half, 80 * 2**20, 10**15, num_slots=11) == 0
    assert max_blocks(KV_8B, 80 * 2**20, 33 * 2**20, num_slots=5) == 2
    assert max_slots(half, 80 * 2**20, 6, 9 * 2**20) == 2
    assert max_slots(half, 10**12, 6, 0) == 6
    assert max_slots(half, 0, 6, 0) == 0
    assert max_slots(KV_8B.with_hot_heads(8), 10**12, 6, 0) == 0


def test_a_given_group_is_taken_or_nothing() -> None:
    load = Load(context_len=2**20, num_requests=1, max_num_batched_tokens=1024, max_num_seqs=1)
    assert plan_kv(KV_8B, load, 2 * GIB, 200 * GIB, 8, has_spans=False) is None
    spans = plan_kv(KV_8B, load, 2 * GIB, 200 * GIB, 8)
    assert spans is not None
    assert (spans.group_size, spans.staging_pages) == (8, (2 * GIB - 11 * 16 * 2**20) // 2 // 2**20)
    plan = plan_kv(KV_8B, load, 2 * GIB, 200 * GIB, 1)
    assert plan is not None
    assert plan.staging_bytes == GIB


def test_sizing_needs_neither_torch_nor_vllm() -> None:
    check = (
        "import sys, farspan.scheduler.capacity, farspan.scheduler.footprint, farspan.scheduler.rates; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'vllm', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_spans_where_the_whole_context_has_no_room(seed: int) -> None:
    rng = random.Random(seed)
    layout = random_layout(rng)
    load = replace(random_load(rng), context_len=rng.randint(20_000, 90_000), num_requests=1)
    wanted, cold = needed_blocks(load.context_len, layout.page_size), layout.cold_block_bytes
    if not cold:
        return
    fewest = min_slots(load.max_num_batched_tokens, layout.page_size, load.max_num_seqs)
    span = least_span_pages(load.context_len, load.max_num_batched_tokens, layout.page_size)
    group = rng.choice(group_sizes(layout))
    least = wanted * layout.fixed_block_bytes + fewest * cold
    spare, whole = (staging_bytes_of(layout, group, pages) for pages in (span * layout.page_size, load.context_len))
    if span * layout.page_size >= load.context_len or wanted <= fewest:
        return
    assert plan_kv(layout, load, least + spare - 1, wanted * cold, group) is None
    before = 0
    for hbm_bytes in range(least + spare, least + whole, (whole - spare) // 7 + 1):
        plan = plan_kv(layout, load, hbm_bytes, wanted * cold, group)
        assert plan is not None
        if plan.staging_pages == 0:
            return
        assert span <= plan.staging_pages < -(-load.context_len // layout.page_size)
        assert plan.staging_pages >= before
        assert plan.num_slots >= fewest
        assert plan.hbm_bytes <= hbm_bytes
        before = plan.staging_pages
    plan = plan_kv(layout, load, least + whole, wanted * cold, group)
    assert plan is not None
    assert plan.staging_pages in (0, -(-load.context_len // layout.page_size))
