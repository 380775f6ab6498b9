"""Ranks of one host under tensor parallelism: the first one agrees with the other hosts, for all."""

import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from farspan.engine_ext.errors import StarError
from farspan.engine_ext.star.exchange import Exchange, form_exchange
from farspan.engine_ext.star.team import Agreement, StarAborted
from farspan.star.rendezvous import bind_port

pytestmark = pytest.mark.filterwarnings("default")

TIMEOUT_S = 1.5
NUM_HOSTS = NUM_RANKS = 2


class Queues:
    """A team of threads."""

    def __init__(self, rank: int, queues: list["queue.Queue[Agreement]"]) -> None:
        self.queues, self.is_leader, self.rank = queues, rank == 0, rank

    def share(self, agreement: Agreement | None) -> Agreement:
        if not self.is_leader:
            return self.queues[self.rank].get(timeout=20)
        assert agreement is not None
        for other in self.queues[1:]:
            other.put(agreement)
        return agreement


def on_ranks(work: Callable[[Exchange, int], Any], ports_of: Callable[[int], int] = lambda port: port) -> list[Any]:
    """`work(exchange, rank)` on two ranks of two hosts, host by host; a StarError is that rank's result."""
    listening = [bind_port("127.0.0.1") for _ in range(NUM_RANKS)]
    teams = [[queue.Queue[Agreement]() for _ in range(NUM_RANKS)] for _ in range(NUM_HOSTS)]
    ports = [each.getsockname()[1] for each in listening]
    exchanges: list[Exchange] = []

    def run(place: tuple[int, int]) -> Any:
        host, rank = place
        try:
            exchange = form_exchange(
                host,
                NUM_HOSTS,
                "127.0.0.1",
                ports_of(ports[rank]) if (host, rank) == (1, 0) else ports[rank],
                listening=listening[rank] if host == 0 else None,
                device_type="cpu",
                timeout_s=TIMEOUT_S,
                start_timeout_s=4 if ports_of(1) != 1 else 30,
                team=Queues(rank, teams[host]),
            )
            exchanges.append(exchange)
            return work(exchange, rank)
        except StarError as error:
            return error

    places = [(host, rank) for host in range(NUM_HOSTS) for rank in range(NUM_RANKS)]
    with ThreadPoolExecutor(len(places)) as pool:
        results = list(pool.map(run, places))
    for exchange in exchanges:
        exchange.close()
    return results


def test_every_rank_exchanges_with_the_same_rank_of_other_hosts() -> None:
    def work(exchange: Exchange, rank: int) -> Any:
        numbers = exchange.agree(b"one", 10 * exchange.rank)
        pages = exchange.gather_pages(torch.full((1, 2), exchange.rank * 10 + rank))
        return numbers, pages[:, 0].tolist(), len(exchange.mesh.peers)

    assert on_ranks(work) == [
        ([0, 10], [0, 10], 1),
        ([0, 10], [1, 11], 0),
        ([0, 10], [0, 10], 1),
        ([0, 10], [1, 11], 0),
    ]


def test_all_ranks_end_a_request_at_the_same_step() -> None:
    """A rank that has not heard of it yet, or heard of it alone, does what the first one does."""
    barrier = threading.Barrier(NUM_HOSTS * NUM_RANKS)

    def work(exchange: Exchange, rank: int) -> Any:
        exchange.is_aborted = (exchange.rank, rank) == (1, 1)
        assert exchange.agree(b"one") == [0, 0]
        barrier.wait(20)
        exchange.is_aborted = (exchange.rank, rank) == (1, 0)
        with pytest.raises(StarAborted):
            exchange.agree(b"two")
        exchange.is_aborted = False
        return exchange.agree(b"three", rank)

    assert on_ranks(work) == [[0, 0]] * 4


@pytest.mark.faults
def test_all_ranks_name_a_late_host() -> None:
    def work(exchange: Exchange, rank: int) -> None:
        if exchange.rank == 0:
            exchange.agree(b"one")

    first, second, *others = on_ranks(work)
    assert others == [None, None]
    assert str(first) == str(second)
    assert "step 2: host 1 did not take part" in str(first) or "lost the connection to host 1" in str(first)


def test_ranks_about_to_compute_different_steps_say_so() -> None:
    def work(exchange: Exchange, rank: int) -> None:
        exchange.agree(b"other" if (exchange.rank, rank) == (0, 1) else b"one")

    results = on_ranks(work)
    assert [result is None for result in results] == [True, False, True, True]
    assert "ranks of host 0 are about to compute different steps" in str(results[1])


@pytest.mark.faults
def test_a_first_rank_that_meets_nobody_tells_the_others() -> None:
    """They have met the other host, and wait for the first agreement."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = unused.getsockname()[1]
    results = on_ranks(lambda exchange, rank: None, lambda port: nobody)
    assert all(isinstance(result, StarError) for result in results)
    assert "host 1 did not meet all 2 hosts" in str(results[3])


def test_whatever_ends_the_first_rank_is_told_to_the_others() -> None:
    def broken(*_: Any) -> list[int]:
        raise OverflowError("no room")

    def work(exchange: Exchange, rank: int) -> Any:
        if (exchange.rank, rank) != (0, 0):
            return exchange.agree(b"one")
        exchange.agree_with_hosts = broken  # type: ignore[method-assign]
        with pytest.raises(OverflowError):
            exchange.agree(b"one")
        return None

    _, told, *_ = on_ranks(work)
    assert isinstance(told, StarError)
    assert "step 2: host 0: OverflowError('no room')" in str(told)
