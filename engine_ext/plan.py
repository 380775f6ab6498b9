"""Messages from the scheduler to the workers: one immutable plan per step, without tensors."""

import msgspec


class Move(msgspec.Struct, frozen=True, array_like=True):
    """A page of all cold heads of all layers, and the slot in GPU memory that it leaves or enters."""

    block: int
    """vLLM's block id, which is also the page's place in the host pool."""
    slot: int


class ResidencyPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Where the cold pages of a step lie.

    Workers carry it out before the forward, in the order of the fields; the copies run beside it.
    """

    spills: tuple[Move, ...] = ()
    """Copied from their slots to the host; the slots are free after that."""
    drops: tuple[Move, ...] = ()
    """Leave their slots without a copy: the host has the same content, or nobody will read it."""
    loads: tuple[Move, ...] = ()
    """Copied from the host into free slots."""
    assignments: tuple[Move, ...] = ()
    """Get a free slot without a copy, as this step writes them from their first token on."""
    copies: tuple[Move, ...] = ()
    """Copied to the host beside the forward, and still in their slots: the next step may push them out. None of them is
    written."""
    written: tuple[int, ...] = ()
    """Blocks that this step writes to; all of them are in slots, and what the host has of them is out of date."""
    missing: frozenset[str] = frozenset()
    """Requests of this step with a page that is in no slot after the moves above."""
    view: int = 0
    """`view_of` of the scheduler's table after this step: workers hold theirs against it."""


class StepPlan(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What the scheduler extension decided for one step; it travels on vLLM's SchedulerOutput."""

    step: int
    """Number of the step, counted by the scheduler from 1."""
    residency: ResidencyPlan | None = None
    """None where no KV head is cold."""


class OffloadSizes(msgspec.Struct, frozen=True, kw_only=True):
    """How large the pools of an engine are: decided once at start-up, the same for all ranks."""

    num_blocks: int
    """vLLM's blocks, and pages of the host pool."""
    num_slots: int
    """Pages of cold heads that GPU memory holds. Slot 0 is that of block 0, which vLLM never gives to a request."""
    page_size: int
    """Tokens of a page, and of vLLM's block."""
    page_bytes: int
    """Of one block's pages of all cold heads of a rank."""
    group_size: int
    """KV heads whose missing pages are staged together for prefill."""
    staging_pages: int
    """Pages of each head of a group that one of the two staging buffers holds: of the longest request, or of a span of
    its context; 0 where every block has a slot."""
    is_selective: bool = False
    """Whether decode reads a choice of the pages in host memory, and the workers count what it reads."""
    larger_groups: tuple[tuple[int, int], ...] = ()
    """Groups that a step takes instead of `group_size` for requests with few pages: up to how many pages, ascending,
    and KV heads. They have room in a buffer."""

    short_chunk_early: bool = False
    """Whether a prompt that is read alone has its short chunk second, where least is to be fetched, and not last."""

    def group_for(self, num_pages: int) -> int:
        """KV heads to stage together for requests with so many pages in all."""
        return next((group for most, group in self.larger_groups if num_pages <= most), self.group_size)


class SelectionReport(msgspec.Struct, frozen=True, kw_only=True):
    """What selective decode of one rank read and kept since its start; from the worker to the scheduler."""

    rows: int
    """Audited: a query head of a request in one layer and step."""
    kept: float
    """Sum over the rows of the share of the attention mass that they kept."""
    certified: float
    """Sum over the rows of the share that was certain without reading the rest."""
    least_kept: float
    """Of the last audit."""
    least_certified: float
    """Of the last audit."""
    bytes_read: int
    """In host memory, by decode."""
    bytes_on_host: int
    """What exact decode would have read."""


OFFLOAD_STATS = "farspan_offload"
"""Under this name the scheduler's counts of cold pages travel to the front end."""
PREFILL_STATS = "farspan_prefill"
"""Under this name its counts of tokens that prefilled sparsely, and densely for one reason or another, do."""
SELECTION_STATS = "farspan_selection"
"""Under this name what a worker told of the blocks that flex chose does, in engines that collect it."""

VIEW_PRIME = (1 << 61) - 1


def view_term(block: int, slot: int) -> int:
    """What one block in one slot adds to a view of the table; views are sums modulo VIEW_PRIME."""
    return (block * 1_000_003 + slot * 7_919 + 1) * 2_654_435_761 % VIEW_PRIME
