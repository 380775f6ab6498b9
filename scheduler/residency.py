"""Which pages of cold KV heads lie in slots of GPU memory, step by step; what has no slot lies in the host pool.

The slots are a write-back cache: a page being written is always in a slot, and goes to the host only when its slot is
needed for another, or probably will be in the next step. So requests that fit cost no copy at all. One page here is a
block of vLLM's in all layers and cold heads of a rank, and all ranks follow the same plan.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from farspan.engine_ext.plan import VIEW_PRIME, Move, OffloadSizes, ResidencyPlan, SelectionReport, view_term

RESERVED_SLOT = 0
"""Of block 0, which stands for padding in vLLM."""
PROMOTED_SHARE = 4
"""A step brings back at most one in so many of the pages that its decoding requests read from the host."""
MIN_PROMOTED = 4
"""Pages that a step may bring back however few it reads."""
RESERVE_SHARE = 16
"""One in so many slots is kept free of promoted pages, so that growing requests need not spill them again."""


def most_pages_written(num_tokens: int, num_reqs: int, page_size: int) -> int:
    """Pages, at most, that a step with so many tokens and requests writes to.

    A request of n tokens writes to one page if n is 1, else to at most (n - 2) // page_size + 2.
    """
    return num_tokens // page_size + 2 * min(num_reqs, num_tokens)


def most_requests(num_tokens: int, num_slots: int, page_size: int) -> int:
    """Requests, at most, whose step of up to `num_tokens` tokens can always be placed; below 1 if none can."""
    return (num_slots - 1 - num_tokens // page_size) // 2


NOTHING_SELECTED = SelectionReport(
    rows=0, kept=0, certified=0, least_kept=1, least_certified=1, bytes_read=0, bytes_on_host=0
)


@dataclass
class Scheduled:
    """One request's part of a step."""

    req_id: str
    start: int
    """Tokens computed before this step."""
    count: int
    """Tokens of this step, at least 1."""
    new_blocks: Sequence[int] = ()
    replaces: bool = False
    """Whether `new_blocks` are all blocks of the request, as after a preemption, and not those that come after its
    others."""


@dataclass
class Counters:
    """What happened since the start, in pages of `OffloadSizes.page_bytes`."""

    spilled: int = 0
    """Copied to the host."""
    loaded: int = 0
    """Copied back into slots."""
    read: int = 0
    """Read on the host by a step's attention, once for every request that sees them."""
    dropped: int = 0
    steps: int = 0
    """That computed any token."""
    steps_that_read: int = 0
    """That waited for the host's memory in attention."""


@dataclass
class Residency:
    """The scheduler's table of pages and slots; `plan` moves it on by one step."""

    sizes: OffloadSizes
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        num_blocks, num_slots = self.sizes.num_blocks, self.sizes.num_slots
        self.slot_of = [-1] * num_blocks
        """Per block: its slot, or -1."""
        self.block_in = [-1] * num_slots
        """Per slot: its block, or -1."""
        self.on_host = bytearray(num_blocks)
        """Per block: 1 where the host pool has its content."""
        self.num_host_only = 0
        """Blocks whose content is on the host alone."""
        self.free_slots = list(range(num_slots - 1, RESERVED_SLOT, -1))
        self.blocks_of: dict[str, list[int]] = {}
        """Per request that vLLM has scheduled and not let go of: its blocks in order."""
        self.view = 0
        self._told = Counters()
        self.selection = self._told_selection = NOTHING_SELECTED
        """What the workers told last of selective decode; and what `statistics` gave on."""
        self._version = 0
        """Counts the pages that went to the host alone or came back from there."""
        self._num_ended = 0
        """Requests that were let go of."""
        self._without_gain: tuple[int, int, tuple[str, ...]] | None = None
        """When `_promote` last found nothing to do: the version, the requests ended, and those that decoded."""
        self._missing_of: dict[str, tuple[int, int]] = {}
        """Per request: `_num_missing` when the version was that."""
        self._put(0, RESERVED_SLOT)

    def plan(
        self, scheduled: Sequence[Scheduled], ended: Iterable[str], is_live: Callable[[int], bool]
    ) -> ResidencyPlan:
        """Decide a step and take it as done.

        ended: requests that finished or were preempted since the last step.
        is_live: whether a block belongs to a request or to the prefix cache; the content of others is lost.
        """
        for req_id in ended:
            self.blocks_of.pop(req_id, None)
            self._missing_of.pop(req_id, None)
            self._num_ended += 1
        for each in scheduled:
            blocks = self.blocks_of.setdefault(each.req_id, [])
            if each.replaces:
                blocks.clear()
                self._missing_of.pop(each.req_id, None)
            blocks.extend(each.new_blocks)

        fresh, partial, written = self._written(scheduled)
        room = Room(self, written, is_live)
        if not room.make(len(fresh) + len(partial), self._victims(written, is_live)):
            raise AssertionError("fewer slots than one step writes pages: see most_requests")
        loads = [self._load(block) for block in partial]
        assignments = []
        for block in fresh:
            self.num_host_only -= self.on_host[block]
            self.on_host[block] = 0
            assignments.append(self._put(block, self.free_slots.pop()))
        for block in written:
            self.on_host[block] = 0
        loads += self._promote(scheduled, written, is_live, room)
        copies = self._copy_ahead(len(fresh) + len(partial), written, is_live)
        num_missing = {each.req_id: self._num_missing(each) for each in scheduled} if self.num_host_only > 0 else {}
        missing = frozenset(req_id for req_id, count in num_missing.items() if count > 0)
        self.counters.spilled += len(room.spills) + len(copies)
        self.counters.dropped += len(room.drops)
        self.counters.loaded += len(loads)
        # Of selective decode the workers tell what it read.
        skipped = {each.req_id for each in scheduled if each.count == 1} if self.sizes.is_selective else set()
        self.counters.read += sum(count for req_id, count in num_missing.items() if req_id not in skipped)
        self.counters.steps += bool(scheduled)
        self.counters.steps_that_read += bool(missing)
        return ResidencyPlan(
            spills=tuple(room.spills),
            drops=tuple(room.drops),
            loads=tuple(loads),
            assignments=tuple(assignments),
            copies=tuple(copies),
            written=tuple(written),
            missing=missing,
            view=self.view,
        )

    def statistics(self) -> dict[str, float]:
        """What happened since this was last asked, and what is used now."""
        counters, before, page_bytes = self.counters, self._told, self.sizes.page_bytes
        self._told = replace(counters)
        from_host = counters.loaded + counters.read - before.loaded - before.read
        selected, told = self.selection, self._told_selection
        self._told_selection = selected
        return {
            "bytes_to_host": (counters.spilled - before.spilled) * page_bytes,
            "bytes_from_host": from_host * page_bytes + selected.bytes_read - told.bytes_read,
            "steps": counters.steps - before.steps,
            "steps_that_read": counters.steps_that_read - before.steps_that_read,
            "slots": self.sizes.num_slots,
            "slots_used": self.sizes.num_slots - len(self.free_slots),
            "host_pages": self.sizes.num_blocks,
            "host_pages_used": self.num_host_only,
            "select_bytes_on_host": selected.bytes_on_host - told.bytes_on_host,
            "select_audited": selected.rows - told.rows,
            "select_kept": selected.kept - told.kept,
            "select_certified": selected.certified - told.certified,
            "select_least_kept": selected.least_kept,
            "select_least_certified": selected.least_certified,
        }

    def check_integrity(self) -> None:
        """Raise AssertionError where the table contradicts itself."""
        assert self.slot_of[0] == RESERVED_SLOT
        for block, slot in enumerate(self.slot_of):
            assert slot < 0 or self.block_in[slot] == block, (block, slot)
        for slot, block in enumerate(self.block_in):
            assert block < 0 or self.slot_of[block] == slot, (block, slot)
        free = [slot for slot, block in enumerate(self.block_in) if block < 0]
        assert sorted(self.free_slots) == free
        host_only = sum(1 for block, slot in enumerate(self.slot_of) if slot < 0 and self.on_host[block])
        assert self.num_host_only == host_only
        terms = (view_term(block, slot) for block, slot in enumerate(self.slot_of) if slot >= 0)
        assert self.view == sum(terms) % VIEW_PRIME

    def _written(self, scheduled: Sequence[Scheduled]) -> tuple[list[int], list[int], dict[int, None]]:
        """Blocks without a slot that the step writes from their first token on; those it goes on writing; all of it."""
        page_size = self.sizes.page_size
        fresh: list[int] = []
        partial: list[int] = []
        written: dict[int, None] = {}
        for each in scheduled:
            blocks = self.blocks_of[each.req_id]
            for page in range(each.start // page_size, (each.start + each.count - 1) // page_size + 1):
                block = blocks[page]
                assert block not in written, f"two requests write to block {block}"
                written[block] = None
                if self.slot_of[block] >= 0:
                    continue
                if page * page_size >= each.start:
                    fresh.append(block)
                else:
                    assert self.on_host[block], f"the content of block {block} is lost"
                    partial.append(block)
        return fresh, partial, written

    def _victims(self, kept: Mapping[int, None], is_live: Callable[[int], bool]) -> Iterator[int]:
        """Blocks in slots that may leave them, in the order in which they should."""
        yield from self._unowned(kept, is_live)
        # The longest request reads most from the host anyway; its oldest pages are full.
        seen = set(kept)
        for blocks in sorted(self.blocks_of.values(), key=len, reverse=True):
            for block in blocks:
                if self.slot_of[block] > RESERVED_SLOT and block not in seen:
                    seen.add(block)
                    yield block

    def _unowned(self, kept: Mapping[int, None], is_live: Callable[[int], bool]) -> Iterator[int]:
        """Blocks in slots that no request holds: lost ones first, then those that leave without a copy."""
        owned = {block for blocks in self.blocks_of.values() for block in blocks}
        cached = []
        for block in self.block_in[RESERVED_SLOT + 1 :]:
            if block < 0 or block in kept or block in owned:
                continue
            if is_live(block):
                cached.append(block)
            else:
                yield block
        yield from sorted(cached, key=lambda block: not self.on_host[block])

    def _promote(
        self,
        scheduled: Sequence[Scheduled],
        written: Mapping[int, None],
        is_live: Callable[[int], bool],
        room: "Room",
    ) -> list[Move]:
        """Bring pages of decoding requests back into slots that no request needs, shortest requests first."""
        names = tuple(each.req_id for each in scheduled if each.count == 1)
        situation = (self._version, self._num_ended, names)
        if self.num_host_only == 0 or situation == self._without_gain:
            return []
        decoding = sorted((self._pages(each) for each in scheduled if each.count == 1), key=len)
        pages = (block for blocks in decoding for block in reversed(blocks))
        wanted = list(dict.fromkeys(block for block in pages if self.slot_of[block] < 0))
        limit = min(max(len(wanted) // PROMOTED_SHARE, MIN_PROMOTED), len(wanted))
        reserve = self.sizes.num_slots // RESERVE_SHARE
        if limit > 0:
            room.make(limit + reserve, self._unowned({**written, **dict.fromkeys(wanted)}, is_live))
        loads = [self._load(block) for block in wanted[: max(min(limit, len(self.free_slots) - reserve), 0)]]
        if not loads:
            self._without_gain = situation
        return loads

    def _copy_ahead(self, num_wanted: int, written: Mapping[int, None], is_live: Callable[[int], bool]) -> list[Move]:
        """Pages that go to the host beside this step, as the next one will push them out if it needs as many slots."""
        copies: list[Move] = []
        if self.sizes.num_slots >= self.sizes.num_blocks:
            return copies
        for block in islice(self._victims(written, is_live), max(num_wanted - len(self.free_slots), 0)):
            if is_live(block) and not self.on_host[block]:
                self.on_host[block] = 1
                copies.append(Move(block, self.slot_of[block]))
        return copies

    def _num_missing(self, each: Scheduled) -> int:
        """Pages of a request that lie on the host alone; what it writes is in slots, so others than before are not."""
        version, count = self._missing_of.get(each.req_id, (-1, 0))
        if version != self._version:
            count = sum(self.slot_of[block] < 0 for block in self._pages(each))
            self._missing_of[each.req_id] = self._version, count
        return count

    def _pages(self, each: Scheduled) -> list[int]:
        """The blocks that hold a request's tokens up to the end of this step."""
        return self.blocks_of[each.req_id][: -(-(each.start + each.count) // self.sizes.page_size)]

    def _load(self, block: int) -> Move:
        self.num_host_only -= 1
        self._version += 1
        return self._put(block, self.free_slots.pop())

    def _put(self, block: int, slot: int) -> Move:
        self.slot_of[block] = slot
        self.block_in[slot] = block
        self.view = (self.view + view_term(block, slot)) % VIEW_PRIME
        return Move(block, slot)

    def take_out(self, block: int) -> None:
        slot = self.slot_of[block]
        self.slot_of[block] = -1
        self.block_in[slot] = -1
        self.free_slots.append(slot)
        self.num_host_only += self.on_host[block]
        self._version += 1
        self.view = (self.view - view_term(block, slot)) % VIEW_PRIME


@dataclass
class Room:
    """The slots that one step makes free."""

    table: Residency
    kept: Mapping[int, None]
    is_live: Callable[[int], bool]
    spills: list[Move] = field(default_factory=list)
    drops: list[Move] = field(default_factory=list)

    def make(self, num_wanted: int, victims: Iterator[int]) -> bool:
        """Take victims out until there are `num_wanted` free slots; returns whether there are."""
        table = self.table
        while len(table.free_slots) < num_wanted:
            block = next(victims, None)
            if block is None:
                return False
            assert block not in self.kept
            move, alive = Move(block, table.slot_of[block]), self.is_live(block)
            if alive and not table.on_host[block]:
                self.spills.append(move)
                table.on_host[block] = 1
            else:
                self.drops.append(move)
                table.on_host[block] = int(alive)
            table.take_out(block)
        return True
