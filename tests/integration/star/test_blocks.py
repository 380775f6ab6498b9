"""Who gets which blocks: everything once, in order, by cost."""

import itertools

import pytest
from farspan.engine_ext.errors import ConfigError
from farspan.star.blocks import (
    BlockSizes,
    assign_blocks,
    block_lens,
    cost_of,
    default_block_len,
    plan_shards,
    window_shards,
    windowed_len,
)
from farspan.star.work import host_context

PAGE = 128
NONE = BlockSizes()


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_pages", [7, 8, 9, 31, 100, 1001])
@pytest.mark.parametrize("block_pages", [None, 1, 3, 8], ids=lambda pages: f"block{pages}")
def test_hosts_have_all_of_the_context_once(num_hosts: int, num_pages: int, block_pages: int | None) -> None:
    context = list(range(num_pages * PAGE))
    sizes = BlockSizes(block_pages and block_pages * PAGE, None)
    shards = plan_shards("r", len(context), num_hosts, PAGE, sizes, 1000.0)
    if shards is None:
        assert (num_hosts == 1 and block_pages is None) or num_pages <= (block_pages or 0)
        return
    assert [shard.rank for shard in shards] == list(range(num_hosts))
    own: list[int] = []
    for shard in shards:
        shard.check(PAGE, shard.local_len)
        prompt = host_context(context, shard)
        assert len(prompt) == shard.local_len
        own += prompt[shard.copied_len :]
    assert own == context
    assert sum(shard.has_query for shard in shards) == 1
    used = [shard.num_blocks for shard in shards if shard.num_blocks]
    assert len(used) == min(num_hosts, -(-len(context) // shards[0].block_len))


def test_default_blocks_leave_no_host_without() -> None:
    for num_hosts, num_pages in itertools.product(range(1, 9), range(1, 200)):
        block = default_block_len(num_pages * PAGE, num_hosts, PAGE)
        assert block % PAGE == 0
        assert block <= max(-(-num_pages // max(4, num_hosts)), 1) * PAGE
        if num_pages >= num_hosts:
            assert -(-num_pages * PAGE // block) >= num_hosts
    assert default_block_len(131072, 2, PAGE) == 32768
    assert default_block_len(131072, 8, PAGE) == 16384


@pytest.mark.parametrize("num_hosts", [2, 3, 4])
@pytest.mark.parametrize("linear_pairs", [10.0, 26_000.0])
def test_the_busiest_host_has_as_little_as_can_be(num_hosts: int, linear_pairs: float) -> None:
    lens = block_lens(9 * 4096 + 512, 4096)
    counts = assign_blocks(lens, num_hosts, 2048, linear_pairs)

    def busiest(counts: tuple[int, ...]) -> float:
        first, costs = 0, []
        for host, count in enumerate(counts):
            cost = cost_of(2048, 0, linear_pairs) if host else 0.0
            for at in range(first, first + count):
                cost += cost_of(lens[at], 2048 if at else 0, linear_pairs)
            first += count
            costs.append(cost)
        return max(costs)

    every = (each for each in itertools.product(range(1, 11), repeat=num_hosts) if sum(each) == len(lens))
    assert busiest(tuple(counts)) == min(map(busiest, every))


def test_the_first_host_may_have_more_blocks_as_it_has_no_anchor_to_copy() -> None:
    assert assign_blocks([1024] * 5, 2, 1024, 1e6) == [3, 2]


def test_hosts_that_are_sent_the_anchor_wait_for_the_chunks_before_its_last() -> None:
    """The first host has more where the others compute an anchor, or wait for most of it."""
    counts = {}
    for chunk in (None, 128, 1024):
        plan = plan_shards("r", 8 * 1024, 2, PAGE, BlockSizes(1024), 1e6, sending_chunk_len=chunk)
        counts[chunk] = [shard.num_blocks for shard in plan or ()]
    assert counts == {None: [5, 3], 128: [4, 4], 1024: [4, 4]}
    assert assign_blocks([1024] * 4, 2, 8192, 1e6, waited_len=3072) == [3, 1]


def test_windows_have_every_token_once_and_the_same_work_everywhere() -> None:
    page, chunk = 16, 128
    for num_hosts, num_pages in itertools.product((2, 3, 4, 7), range(1, 150)):
        length = windowed_len(num_pages * page, num_hosts, page, chunk)
        assert 0 <= num_pages * page - length < 2 * num_hosts * page
        if length == 0:
            continue
        shards = window_shards("w", list(range(length)), num_hosts, page, chunk)
        steps = {-(-shard.own_len // chunk) for shard in shards}
        assert len(steps) == 1
        for shard in shards:
            shard.check(page, shard.local_len)
        own = [host_context(list(range(length)), shard) for shard in shards]
        assert sorted(itertools.chain(*own)) == list(range(length))
        if length % (num_hosts * chunk) == 0:
            # A token sees as many as its position says.
            assert len({sum(each) for each in own}) == 1
    with pytest.raises(
        ConfigError, match="max_num_batched_tokens=100 with visibility='all'; allowed: multiples of two"
    ):
        windowed_len(1000, 2, page, 100)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (BlockSizes(1000, None), "block_len=1000; allowed: a multiple of the page size, 128 tokens, of at least 128."),
        (BlockSizes(0, None), "Use 128."),
        (BlockSizes(None, 100), "anchor_len=100; allowed: a multiple of the page size, 128 tokens, of at least 0."),
        (BlockSizes(256, 512), "anchor_len=512; allowed: at most block_len, which is 256"),
    ],
    ids=["block", "zero", "anchor", "longer"],
)
def test_bad_sizes_are_refused(sizes: BlockSizes, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sizes.check(PAGE)
    assert sentence in str(caught.value)


def test_one_host_or_one_block_is_exact() -> None:
    assert plan_shards("r", 64 * PAGE, 1, PAGE, NONE, 1.0) is None
    assert plan_shards("r", 64 * PAGE, 4, PAGE, BlockSizes(64 * PAGE, None), 1.0) is None
    assert plan_shards("r", PAGE, 2, PAGE, NONE, 1.0) is None
    # On request, to measure what blocks cost in accuracy without more GPUs.
    assert plan_shards("r", 64 * PAGE, 1, PAGE, BlockSizes(16 * PAGE, None), 1.0) is not None
