"""Random operations of a scheduler against a model of both pools: what a step reads is what was written."""

import random
from collections import deque

import msgspec
import pytest
from farspan.engine_ext.plan import OffloadSizes, ResidencyPlan, view_term
from farspan.scheduler.residency import NOTHING_SELECTED, Residency, Scheduled, most_pages_written, most_requests

PAGE = 4


def make_residency(num_blocks: int, num_slots: int) -> Residency:
    sizes = OffloadSizes(
        num_blocks=num_blocks, num_slots=num_slots, page_size=PAGE, page_bytes=100, group_size=1, staging_pages=8
    )
    return Residency(sizes)


class Pools:
    """What the workers hold: a page is the list of stamps of its tokens."""

    def __init__(self, sizes: OffloadSizes) -> None:
        self.slots: list[list[int]] = [[] for _ in range(sizes.num_slots)]
        self.host: list[list[int] | None] = [None] * sizes.num_blocks
        self.table = {0: 0}

    def apply(self, plan: ResidencyPlan) -> None:
        for move in plan.spills:
            assert self.table[move.block] == move.slot
            self.host[move.block] = list(self.slots[move.slot])
        for move in (*plan.spills, *plan.drops):
            assert self.table.pop(move.block) == move.slot
        for move in (*plan.loads, *plan.assignments):
            assert move.slot not in self.table.values()
            assert move.block not in self.table
            self.table[move.block] = move.slot
        for move in plan.loads:
            found = self.host[move.block]
            assert found is not None
            self.slots[move.slot] = list(found)
        assert sum(view_term(*pair) for pair in self.table.items()) % ((1 << 61) - 1) == plan.view

    def write(self, block: int, offset: int, stamp: int) -> None:
        page = self.slots[self.table[block]]
        del page[offset:]
        page.extend([None] * (offset - len(page)))  # type: ignore[list-item]
        page.append(stamp)
        # Whoever reads the host's copy from now on reads garbage.
        self.host[block] = None

    def read(self, block: int) -> list[int]:
        if block in self.table:
            return self.slots[self.table[block]]
        found = self.host[block]
        assert found is not None, f"block {block} is nowhere"
        return found


class Engine:
    """Blocks, prefix cache and requests as vLLM has them; steps reach the pools some steps after they are planned."""

    def __init__(self, num_blocks: int, num_slots: int, in_flight: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.residency = make_residency(num_blocks, num_slots)
        self.pools = Pools(self.residency.sizes)
        self.free = deque(range(1, num_blocks))
        self.refs = [0] * num_blocks
        self.hashed: dict[int, tuple[int, ...]] = {}
        self.running: dict[str, tuple[list[int], list[int], int]] = {}
        """Request: its stamps (all tokens it will have), its blocks, tokens computed."""
        self.ended: list[str] = []
        self.queue: deque[tuple[ResidencyPlan, list[tuple[Scheduled, list[int], list[int]]]]] = deque()
        self.in_flight = in_flight
        self.names = iter(range(10**9))

    def is_live(self, block: int) -> bool:
        return self.refs[block] > 0 or block in self.hashed

    def take(self) -> int:
        block = self.free.popleft()
        self.hashed.pop(block, None)
        self.refs[block] = 1
        return block

    def let_go(self, req_id: str) -> None:
        _, blocks, _ = self.running.pop(req_id)
        for block in reversed(blocks):
            self.refs[block] -= 1
            if self.refs[block] == 0:
                (self.free.append if block in self.hashed else self.free.appendleft)(block)
        self.ended.append(req_id)

    def start(self) -> None:
        """A request, half of the time with the prefix of an earlier one."""
        stamps = [self.random.randrange(10**9) for _ in range(self.random.randrange(2, 40))]
        blocks: list[int] = []
        if self.hashed and self.random.random() < 0.5:
            chain = self.random.choice(list(self.hashed.values()))
            stamps = [*chain, *stamps]
            known = {content: block for block, content in self.hashed.items()}
            for end in range(PAGE, len(chain) + 1, PAGE):
                block = known.get(chain[:end])
                if block is None:
                    break
                if self.refs[block] == 0:
                    self.free.remove(block)
                self.refs[block] += 1
                blocks.append(block)
        self.running[f"r{next(self.names)}"] = (stamps, blocks, len(blocks) * PAGE)

    def step(self, budget: int, max_reqs: int) -> None:
        choice = self.random.random()
        if self.running and choice < 0.05:
            self.let_go(self.random.choice(list(self.running)))
        if len(self.running) < max_reqs and choice < 0.6:
            self.start()
        scheduled = []
        for req_id in list(self.running):
            stamps, blocks, computed = self.running[req_id]
            count = min(len(stamps) - computed, self.random.choice((1, 1, 3, 9)), budget)
            if computed == len(stamps):
                self.let_go(req_id)
                continue
            if count <= 0 or self.random.random() < 0.1:
                continue
            known = len(self.residency.blocks_of.get(req_id, ())) if req_id in self.residency.blocks_of else 0
            needed = -(-(computed + count) // PAGE) - len(blocks)
            if needed > len(self.free):
                self.let_go(req_id)
                continue
            blocks += [self.take() for _ in range(needed)]
            new = req_id not in self.residency.blocks_of
            scheduled.append((Scheduled(req_id, computed, count, blocks[0 if new else known :], new), stamps, blocks))
            budget -= count
            self.running[req_id] = (stamps, blocks, computed + count)
            for page in range((computed + count) // PAGE):
                self.hashed.setdefault(blocks[page], tuple(stamps[: (page + 1) * PAGE]))
        scheduled = [each for each in scheduled if each[0].req_id in self.running]
        plan = self.residency.plan([each for each, _, _ in scheduled], self.ended, self.is_live)
        self.ended = []
        self.residency.check_integrity()
        self.queue.append((plan, [(each, stamps, list(blocks)) for each, stamps, blocks in scheduled]))
        while len(self.queue) > self.in_flight:
            self.run(*self.queue.popleft())

    def run(self, plan: ResidencyPlan, scheduled: list[tuple[Scheduled, list[int], list[int]]]) -> None:
        """The worker's side: moves, then writes, then reads of everything that the queries see."""
        self.pools.apply(plan)
        for each, stamps, blocks in scheduled:
            for place in range(each.start, each.start + each.count):
                assert blocks[place // PAGE] in plan.written
                self.pools.write(blocks[place // PAGE], place % PAGE, stamps[place])
        for move in plan.copies:
            # Whenever it happens beside the step.
            assert move.block not in plan.written
            assert self.pools.table[move.block] == move.slot
            self.pools.host[move.block] = list(self.pools.slots[move.slot])
        for each, stamps, blocks in scheduled:
            end = each.start + each.count
            found = [stamp for block in blocks[: -(-end // PAGE)] for stamp in self.pools.read(block)]
            assert found[:end] == stamps[:end]
            resident = all(block in self.pools.table for block in blocks[: -(-end // PAGE)])
            assert resident == (each.req_id not in plan.missing)


@pytest.mark.parametrize("in_flight", [0, 1, 2])
@pytest.mark.parametrize(("num_blocks", "num_slots"), [(40, 15), (40, 22), (40, 40), (120, 15)])
def test_steps_read_what_was_written(num_blocks: int, num_slots: int, in_flight: int) -> None:
    budget = 12
    max_reqs = most_requests(budget, num_slots, PAGE)
    assert max_reqs >= 5
    engine = Engine(num_blocks, num_slots, in_flight, seed=num_slots + in_flight)
    for _ in range(1500):
        engine.step(budget, min(max_reqs, 8))
    counters = engine.residency.counters
    if num_slots < num_blocks:
        assert min(counters.spilled, counters.loaded, counters.steps_that_read) > 20
    else:
        assert counters.spilled == counters.loaded == counters.steps_that_read == 0


@pytest.mark.parametrize(("num_tokens", "num_reqs"), [(1, 1), (2, 1), (9, 1), (9, 4), (12, 8), (64, 3)])
def test_bound_on_written_pages(num_tokens: int, num_reqs: int) -> None:
    """Over all ways to share the tokens that begin on a page's last token."""

    def most(tokens: int, reqs: int) -> int:
        if reqs == 0 or tokens == 0:
            return 0
        counts = range(1, tokens + 1)
        return max((PAGE - 1 + count - 1) // PAGE + 1 + most(tokens - count, reqs - 1) for count in counts)

    worst = most(num_tokens, min(num_reqs, 4))
    assert worst <= most_pages_written(num_tokens, num_reqs, PAGE)
    num_slots = most_pages_written(num_tokens, num_reqs, PAGE) + 1
    assert most_requests(num_tokens, num_slots, PAGE) >= min(num_reqs, num_tokens)


def test_what_fits_costs_no_copy() -> None:
    residency = make_residency(num_blocks=30, num_slots=30)
    moves = 0
    for start in range(0, 100, 10):
        new = list(range(1 + -(-start // PAGE), 1 + -(-(start + 10) // PAGE)))
        plan = residency.plan([Scheduled("a", start, 10, new)], [], lambda block: True)
        moves += len(plan.spills) + len(plan.loads) + len(plan.drops)
        assert not plan.missing
    assert moves == 0


def test_spills_the_oldest_pages_of_the_longest_request_and_none_that_is_written() -> None:
    residency = make_residency(num_blocks=40, num_slots=11)
    residency.plan([Scheduled("long", 0, 24, range(1, 7)), Scheduled("short", 0, 8, (7, 8))], [], lambda block: True)
    assert not residency.plan([Scheduled("long", 24, 1, (9,))], [], lambda block: True).spills
    plan = residency.plan([Scheduled("new", 0, 12, (10, 11, 12))], [], lambda block: True)
    assert [move.block for move in plan.spills] == [1, 2]
    # Three more may be wanted next.
    assert [move.block for move in plan.copies] == [3, 4, 5]
    plan = residency.plan([Scheduled("new", 12, 12, (13, 14, 15))], [], lambda block: True)
    assert not plan.spills
    assert [move.block for move in plan.drops] == [3, 4, 5]
    plan = residency.plan([Scheduled("long", 25, 1)], [], lambda block: True)
    assert plan.missing == {"long"}
    assert plan.written == (9,)
    assert residency.counters.read == 5


def test_lost_pages_go_first_and_without_a_copy() -> None:
    residency = make_residency(num_blocks=40, num_slots=5)
    residency.plan([Scheduled("a", 0, 8, (1, 2)), Scheduled("b", 0, 8, (3, 4))], [], lambda block: True)
    plan = residency.plan([Scheduled("c", 0, 8, (5, 6))], ["b"], lambda block: block not in (3, 4))
    assert not plan.spills
    assert {move.block for move in plan.drops} == {3, 4}


def test_pages_come_back_when_their_request_decodes() -> None:
    residency = make_residency(num_blocks=40, num_slots=20)
    residency.plan([Scheduled("a", 0, 40, range(1, 11))], [], lambda block: True)
    residency.plan([Scheduled("b", 0, 64, range(11, 27))], [], lambda block: True)
    plan = residency.plan([Scheduled("a", 40, 1, (27,))], ["b"], lambda block: not 11 <= block < 27)
    assert plan.missing == {"a"}
    start = 41
    for _ in range(6):
        plan = residency.plan([Scheduled("a", start, 1)], [], lambda block: True)
        start += 1 if start < 43 else 0
    assert not plan.missing
    assert residency.counters.loaded == 7


def test_statistics_tell_what_happened_since_they_were_asked() -> None:
    residency = make_residency(num_blocks=40, num_slots=11)
    residency.plan([Scheduled("long", 0, 24, range(1, 7)), Scheduled("short", 0, 8, (7, 8))], [], lambda block: True)
    assert residency.statistics()["bytes_to_host"] == 0
    residency.plan([Scheduled("new", 0, 16, (10, 11, 12, 13))], [], lambda block: True)
    residency.plan([Scheduled("long", 24, 1, (9,))], [], lambda block: True)
    told = residency.statistics()
    # Two pages pushed out, and four copied as they may be next, of which one was.
    assert told["bytes_to_host"] == 600
    assert told["bytes_from_host"] == 300
    assert told["host_pages_used"] == 3
    assert (told["slots"], told["slots_used"], told["host_pages"]) == (11, 11, 40)
    assert (told["steps"], told["steps_that_read"]) == (2, 1)
    again = residency.statistics()
    assert again["steps"] == again["bytes_to_host"] == again["bytes_from_host"] == 0


def test_workers_tell_what_selective_decode_read() -> None:
    """Of decoding requests in their report alone; of prefill as before."""
    residency = make_residency(num_blocks=40, num_slots=11)
    residency.sizes = msgspec.structs.replace(residency.sizes, is_selective=True)
    residency.plan([Scheduled("long", 0, 24, range(1, 7)), Scheduled("short", 0, 8, (7, 8))], [], lambda block: True)
    residency.plan([Scheduled("new", 0, 16, (10, 11, 12, 13))], [], lambda block: True)
    residency.plan([Scheduled("long", 24, 1, (9,))], [], lambda block: True)
    assert residency.statistics()["bytes_from_host"] == 0
    report = msgspec.structs.replace(NOTHING_SELECTED, rows=4, kept=3.8, certified=3.0, least_kept=0.9, bytes_read=70)
    residency.selection = report
    told = residency.statistics()
    assert (told["bytes_from_host"], told["select_audited"], told["select_kept"]) == (70, 4, 3.8)
    assert (told["select_certified"], told["select_least_kept"]) == (3.0, 0.9)
    again = residency.statistics()
    assert again["bytes_from_host"] == again["select_audited"] == again["select_kept"] == 0
    assert again["select_least_kept"] == 0.9
