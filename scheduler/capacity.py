"""What fits where: the bytes of KV pages, and from them blocks, slots, staging, group sizes and the longest context.

Pure functions of whole numbers, which size the engine's pools and which `farspan plan` predicts with. Bytes and heads
are those of one tensor-parallel rank; bytes are exact, times are predicted in `farspan.scheduler.rates`.

- vLLM's cache holds the pages of hot heads: `hot_block_bytes` for each block id, in HBM.
- The host pool holds the pages of cold heads: `cold_block_bytes` for each block id, in host memory.
- A slot is room in HBM for the cold pages of one block, in every layer: `cold_block_bytes` as well.
- Staging is two buffers that hold one head group of one layer over the longest context, or, where HBM has no room for
  that, over a span of it: while attention reads one, the other is filled from the host.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from farspan.scheduler.residency import most_pages_written

NULL_BLOCKS = 1
"""Block ids that vLLM keeps for itself: block 0 stands for padding."""
NUM_STAGING_BUFFERS = 2
STAGING_SHARE = 0.125
"""Of the HBM that the fewest slots leave: what groups of more than one head may take from the pages of a load that does
not lie in HBM as a whole."""
SPAN_SHARE = 0.5
"""Of the same: what buffers for spans of the context take; slots get the rest."""


@dataclass(frozen=True, kw_only=True)
class KVLayout:
    """Where the KV heads of every layer have their pages."""

    num_kv_heads: int
    """Of one layer."""
    head_dim: int
    element_bytes: int
    """Of one number of a key or value."""
    page_size: int
    """Tokens of a page."""
    hot_heads: tuple[int, ...]
    """For each layer, how many of its KV heads have their pages in vLLM's cache; the others are cold."""
    stub_bytes: int = 0
    """What vLLM's cache holds for each block of a layer without hot heads."""
    bounds_bytes: int = 0
    """HBM for each block id beside vLLM's cache: bounds of the keys of cold heads, where decode is selective."""

    def __post_init__(self) -> None:
        assert min(self.num_kv_heads, self.head_dim, self.element_bytes, self.page_size, len(self.hot_heads)) > 0
        assert all(0 <= hot <= self.num_kv_heads for hot in self.hot_heads), self.hot_heads
        assert min(self.stub_bytes, self.bounds_bytes) >= 0

    @property
    def page_bytes(self) -> int:
        """Keys and values of one head in one layer and block."""
        return self.page_size * 2 * self.head_dim * self.element_bytes

    @property
    def hot_block_bytes(self) -> int:
        """HBM for each block id of vLLM's cache."""
        return sum(hot * self.page_bytes or self.stub_bytes for hot in self.hot_heads)

    @property
    def fixed_block_bytes(self) -> int:
        """HBM for each block id, wherever its cold pages lie."""
        return self.hot_block_bytes + self.bounds_bytes

    @property
    def cold_block_bytes(self) -> int:
        """Host memory for each block id; also HBM for each slot."""
        return sum(self.num_kv_heads - hot for hot in self.hot_heads) * self.page_bytes

    @property
    def max_cold_heads(self) -> int:
        """Of the layer that has most."""
        return self.num_kv_heads - min(self.hot_heads)

    @property
    def hot_token_bytes(self) -> int:
        """HBM for each token's hot heads, stubs left out."""
        return sum(self.hot_heads) * self.page_bytes // self.page_size

    @property
    def cold_token_bytes(self) -> int:
        return self.cold_block_bytes // self.page_size

    def with_hot_heads(self, num_hot: int) -> "KVLayout":
        """The same model with `num_hot` hot heads in every layer."""
        return replace(self, hot_heads=(num_hot,) * len(self.hot_heads))


@dataclass(frozen=True, kw_only=True)
class Load:
    """What an engine must be able to hold."""

    context_len: int
    """Tokens of the longest request, its answer included."""
    num_requests: int
    """Requests of that length at once."""
    max_num_batched_tokens: int
    """Tokens of one step."""
    max_num_seqs: int
    """Requests in one step."""

    def __post_init__(self) -> None:
        assert min(self.context_len, self.num_requests, self.max_num_batched_tokens, self.max_num_seqs) > 0


@dataclass(frozen=True, kw_only=True)
class KVPlan:
    """Sizes of all pools."""

    num_blocks: int
    """Block ids of vLLM's cache, the null block included; the host pool has as many."""
    num_slots: int
    """Blocks whose cold pages can lie in HBM at the same time."""
    group_size: int
    """KV heads whose prefix is gathered at once in prefill; 0 where nothing is ever gathered."""
    staging_pages: int
    """Pages of each head that one of the two buffers holds; 0 where nothing is ever gathered."""
    staging_bytes: int
    hbm_bytes: int
    """vLLM's cache, slots and staging."""
    host_bytes: int


def stub_bytes_of(page_size: int, element_bytes: int) -> int:
    """What vLLM's cache holds for each block of a layer without hot heads: an element a token, as its planner divides
    by the bytes of a page.
    """
    return page_size * element_bytes


def bounds_bytes_of(num_cold_heads: int, page_size: int, head_dim: int, element_bytes: int) -> int:
    """Bounds of the keys of one block's pages in so many heads, over all layers: four bits of each number of a key, and
    the least and the largest of each channel.
    """
    return num_cold_heads * (page_size * head_dim // 2 + 2 * head_dim * element_bytes)


def min_slots(max_num_batched_tokens: int, page_size: int, max_num_seqs: int) -> int:
    """Fewest slots: the pages that a step writes lie in HBM, and so does the null block."""
    return most_pages_written(max_num_batched_tokens, max_num_seqs, page_size) + NULL_BLOCKS


def needed_blocks(context_len: int, page_size: int, num_requests: int = 1) -> int:
    """Block ids for requests that share nothing, the null block included."""
    return num_requests * -(-context_len // page_size) + NULL_BLOCKS


def max_blocks(layout: KVLayout, hbm_bytes: int, host_bytes: int, num_slots: int = 0, staging_bytes: int = 0) -> int:
    """Block ids that both memories hold.

    hbm_bytes: what weights, activations and the CUDA context leave. A layout without hot heads and stubs takes no HBM
    for a block, one without cold heads no host memory. Returns 0 where slots and staging alone do not fit.
    """
    hbm_left = hbm_bytes - num_slots * layout.cold_block_bytes - staging_bytes
    if hbm_left < 0:
        return 0
    bounds = []
    if layout.fixed_block_bytes:
        bounds.append(hbm_left // layout.fixed_block_bytes)
    if layout.cold_block_bytes:
        bounds.append(max(host_bytes, 0) // layout.cold_block_bytes)
    return min(bounds)


def max_slots(layout: KVLayout, hbm_bytes: int, num_blocks: int, staging_bytes: int) -> int:
    """Slots in what blocks and staging leave of HBM, at most one for each block; 0 where no head is cold."""
    if not layout.cold_block_bytes:
        return 0
    hbm_left = hbm_bytes - num_blocks * layout.fixed_block_bytes - staging_bytes
    return min(max(hbm_left, 0) // layout.cold_block_bytes, num_blocks)


def staging_bytes_of(layout: KVLayout, group_size: int, context_len: int) -> int:
    """HBM of the two buffers for one head group over a context, or over a span of it."""
    return NUM_STAGING_BUFFERS * group_size * -(-context_len // layout.page_size) * layout.page_bytes


def least_span_pages(context_len: int, max_num_batched_tokens: int, page_size: int) -> int:
    """Fewest pages of a buffer for spans: a request's chunk lies in its last span as a whole."""
    return min(most_pages_written(max_num_batched_tokens, 1, page_size), -(-context_len // page_size))


def group_sizes(layout: KVLayout) -> list[int]:
    """Possible group sizes, ascending: divisors of the KV heads, none beyond the cold heads of a layer."""
    divisors = [size for size in range(1, layout.num_kv_heads + 1) if layout.num_kv_heads % size == 0]
    return sorted({min(size, layout.max_cold_heads) for size in divisors} - {0})


def choose_group_size(layout: KVLayout, context_len: int, budget_bytes: int) -> int:
    """The largest group whose staging fits into the budget; 0 where none does or no head is cold."""
    fitting = [size for size in group_sizes(layout) if staging_bytes_of(layout, size, context_len) <= budget_bytes]
    return max(fitting, default=0)


def plan_kv(
    layout: KVLayout,
    load: Load,
    hbm_bytes: int,
    host_bytes: int,
    group_size: int | None = None,
    num_first: int | None = None,
    *,
    has_spans: bool = True,
) -> KVPlan | None:
    """Size all pools for a load, or None where it does not fit.

    Where HBM has a slot for every block that the host holds, nothing is ever gathered, and there is no staging.
    Otherwise the load comes first: blocks for it, then slots for it, then further blocks, and slots in what is left.
    hbm_bytes, host_bytes: for KV, staging included. group_size: None for the largest beside which HBM still holds the
    whole load; where none does, the largest that takes at most STAGING_SHARE; or else 1. num_first: blocks that come
    before slots, as far as they fit; None for those of the load. has_spans: whether attention may go over spans of the
    context, one after the other, where buffers for the whole context leave no room for the load.
    """
    wanted_blocks = needed_blocks(load.context_len, layout.page_size, load.num_requests)
    if not layout.cold_block_bytes:
        num_blocks = max_blocks(layout, hbm_bytes, host_bytes)
        return sized(layout, num_blocks, 0, 0, 0) if num_blocks >= wanted_blocks else None

    best = None
    for plan in cold_plans(layout, load, hbm_bytes, host_bytes, group_size, num_first, has_spans=has_spans):
        if plan.num_blocks >= (num_first or wanted_blocks):
            return plan
        best = best or plan
    return best


def cold_plans(
    layout: KVLayout,
    load: Load,
    hbm_bytes: int,
    host_bytes: int,
    group_size: int | None,
    num_first: int | None,
    *,
    has_spans: bool,
) -> Iterator[KVPlan]:
    """Plans with which a load with cold heads fits, the best first; see `plan_kv`."""
    wanted_blocks = needed_blocks(load.context_len, layout.page_size, load.num_requests)
    block_bytes = layout.fixed_block_bytes + layout.cold_block_bytes
    whole_pages = -(-load.context_len // layout.page_size)
    host_blocks = max(host_bytes, 0) // layout.cold_block_bytes
    resident_blocks = min(host_blocks, max(hbm_bytes, 0) // block_bytes)
    first_blocks = []
    if resident_blocks < host_blocks:
        first_blocks = [max(num_first or 0, wanted_blocks)]
        if num_first is None and not any(layout.hot_heads) and hbm_bytes < block_bytes * wanted_blocks:
            # The load takes all slots that there are: stubs are so small that no host memory should be idle for them.
            first_blocks.insert(0, max(host_blocks, wanted_blocks))
    for blocks in first_blocks:
        group = group_size or group_size_beside(layout, load, hbm_bytes, blocks)
        plan = plan_gathering(layout, load, hbm_bytes, host_bytes, blocks, group, whole_pages)
        if plan is not None:
            yield plan
    # A slot for every block: either for all that the host holds, or as HBM has no room to gather into.
    if resident_blocks >= wanted_blocks:
        yield sized(layout, resident_blocks, resident_blocks, 0, 0)
    for blocks in first_blocks if has_spans else ():
        span_pages = choose_span_pages(layout, load, hbm_bytes, blocks, group_size or 1)
        plan = plan_gathering(layout, load, hbm_bytes, host_bytes, blocks, group_size or 1, span_pages)
        if plan is not None:
            yield plan


def group_size_beside(layout: KVLayout, load: Load, hbm_bytes: int, num_first: int) -> int:
    """KV heads to gather at once over the whole context; see `plan_kv`."""
    wanted_blocks = needed_blocks(load.context_len, layout.page_size, load.num_requests)
    fewest = min_slots(load.max_num_batched_tokens, layout.page_size, load.max_num_seqs)
    hbm_left = hbm_bytes - num_first * layout.fixed_block_bytes
    beside_load = hbm_left - max(wanted_blocks, fewest) * layout.cold_block_bytes
    share = int(STAGING_SHARE * (hbm_left - fewest * layout.cold_block_bytes))
    fitting = (choose_group_size(layout, load.context_len, budget) for budget in (beside_load, share))
    return next(filter(None, fitting), 1)


def choose_span_pages(layout: KVLayout, load: Load, hbm_bytes: int, num_first: int, group_size: int) -> int:
    """Pages of a buffer for spans of the context: those of SPAN_SHARE, but at least those of a chunk."""
    fewest = min_slots(load.max_num_batched_tokens, layout.page_size, load.max_num_seqs)
    hbm_left = hbm_bytes - num_first * layout.fixed_block_bytes - fewest * layout.cold_block_bytes
    fitting = int(SPAN_SHARE * hbm_left) // staging_bytes_of(layout, group_size, layout.page_size)
    least = least_span_pages(load.context_len, load.max_num_batched_tokens, layout.page_size)
    return min(max(fitting, least), -(-load.context_len // layout.page_size))


def plan_gathering(
    layout: KVLayout,
    load: Load,
    hbm_bytes: int,
    host_bytes: int,
    num_first: int,
    group_size: int,
    staging_pages: int,
) -> KVPlan | None:
    """Size pools that do not hold everything in HBM; see `plan_kv`.

    num_first: blocks that come before slots. staging_pages: of each head, in one buffer.
    """
    wanted_blocks = needed_blocks(load.context_len, layout.page_size, load.num_requests)
    cold_bytes = layout.cold_block_bytes
    fewest = min_slots(load.max_num_batched_tokens, layout.page_size, load.max_num_seqs)
    hbm_left = hbm_bytes - num_first * layout.fixed_block_bytes
    staging_bytes = staging_bytes_of(layout, group_size, staging_pages * layout.page_size)
    least_slots = max(min((hbm_left - staging_bytes) // cold_bytes, wanted_blocks), fewest)
    num_blocks = max_blocks(layout, hbm_bytes, host_bytes, least_slots, staging_bytes)
    if num_blocks < wanted_blocks:
        return None
    num_slots = max_slots(layout, hbm_bytes, num_blocks, staging_bytes)
    return sized(layout, num_blocks, num_slots, group_size, staging_pages)


def sized(layout: KVLayout, num_blocks: int, num_slots: int, group_size: int, staging_pages: int) -> KVPlan:
    """The plan with what it takes of both memories."""
    staging_bytes = staging_bytes_of(layout, group_size, staging_pages * layout.page_size)
    return KVPlan(
        num_blocks=num_blocks,
        num_slots=num_slots,
        group_size=group_size,
        staging_pages=staging_pages,
        staging_bytes=staging_bytes,
        hbm_bytes=num_blocks * layout.fixed_block_bytes + num_slots * layout.cold_block_bytes + staging_bytes,
        host_bytes=num_blocks * layout.cold_block_bytes,
    )


def longest_context(
    layout: KVLayout,
    load: Load,
    hbm_bytes: int,
    host_bytes: int,
    most_len: int,
    group_size: int | None = None,
    *,
    has_spans: bool = True,
) -> int:
    """Tokens of the longest context, in whole pages or `most_len`, with which a load fits; 0 where none does.

    load: its own `context_len` does not count. The others: as in `plan_kv`.
    """

    def fits(context_len: int) -> bool:
        asked = replace(load, context_len=context_len)
        return plan_kv(layout, asked, hbm_bytes, host_bytes, group_size, has_spans=has_spans) is not None

    if fits(most_len):
        return most_len
    # [0, fitting] pages fit; [failing, ...) do not.
    fitting, failing = 0, -(-most_len // layout.page_size)
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        if fits(middle * layout.page_size):
            fitting = middle
        else:
            failing = middle
    return fitting * layout.page_size
