"""The group of hosts, as threads with gloo: what it gathers, and whom it names when a step goes wrong."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from farspan.engine_ext.errors import StarError
from farspan.engine_ext.star.exchange import (
    TELLING_S,
    Exchange,
    PartialResult,
    exchange_of,
    form_exchange,
    set_exchange,
)
from farspan.engine_ext.star.mesh import Mesh
from farspan.engine_ext.star.team import HostMissing, StarAborted
from farspan.star.rendezvous import bind_port

pytestmark = pytest.mark.filterwarnings("default")

TIMEOUT_S = 1.5


def on_hosts(num_hosts: int, work: Callable[[Exchange], Any], machines: Sequence[int] = (0, 0, 0)) -> list[Any]:
    """`work(exchange)` on every host at the same time; an exception is that host's result. machines: by host."""
    listening = bind_port("127.0.0.1")
    port = listening.getsockname()[1]

    exchanges: list[Exchange] = []

    def host(rank: int) -> Any:
        exchange = form_exchange(
            rank,
            num_hosts,
            "127.0.0.1",
            port,
            listening=listening if rank == 0 else None,
            device_type="cpu",
            timeout_s=TIMEOUT_S,
            start_timeout_s=30,
            machine=machines[rank],
        )
        exchanges.append(exchange)
        try:
            return work(exchange)
        except StarError as error:
            return error

    with ThreadPoolExecutor(num_hosts) as pool:
        results = list(pool.map(host, range(num_hosts)))
    for exchange in exchanges:
        exchange.close()
    return results


def test_hosts_know_how_many_share_their_machine() -> None:
    assert on_hosts(3, lambda exchange: exchange.num_on_machine, (7, 2**55, 7)) == [2, 1, 2]


@pytest.mark.parametrize("num_hosts", [2, 3])
@pytest.mark.parametrize("num_heads", [6, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_partial_results_of_all_hosts_in_the_order_of_ranks(num_hosts: int, num_heads: int, dtype: torch.dtype) -> None:
    def result(rank: int) -> PartialResult:
        generator = torch.Generator().manual_seed(rank)
        mine = PartialResult.empty(torch.empty(5, num_heads, 64, dtype=dtype))
        mine.out.copy_(torch.randn(5, num_heads, 64, generator=generator))
        mine.lse.copy_(torch.randn(num_heads, 5, generator=generator))
        return mine

    results = on_hosts(num_hosts, lambda exchange: exchange.gather(result(exchange.rank)))
    for part_out, part_lse in results:
        # Whatever the number of heads and tokens, the combination is one compiled kernel.
        assert part_out.stride(0) % 16 == part_lse.storage_offset() * 4 % 16 == 0
        for rank in range(num_hosts):
            expected = result(rank)
            assert torch.equal(part_out[rank], expected.out)
            assert torch.equal(part_lse[rank], expected.lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_come_from_all_hosts_or_from_host_0(dtype: torch.dtype) -> None:
    def pages(rank: int) -> torch.Tensor:
        return (torch.arange(48).view(3, 2, 8) + 100 * rank).to(dtype)

    def work(exchange: Exchange) -> tuple[torch.Tensor, torch.Tensor, float]:
        gathered, sent = exchange.gather_pages(pages(exchange.rank)), pages(exchange.rank)
        exchange.send_pages(sent)
        return gathered, sent, exchange.take_waited_s()

    for gathered, sent, waited_s in on_hosts(3, work):
        assert torch.equal(gathered, torch.cat([pages(rank) for rank in range(3)]))
        assert torch.equal(sent, pages(0))
        assert waited_s > 0


@pytest.mark.parametrize(
    ("waited_s", "told"), [(1.5, "1.5 s"), (0.123, "0.12 s"), (60.0321, "60.03 s"), (3600, "3600 s")]
)
def test_how_long_a_host_waited_is_told_in_plain_digits(waited_s: float, told: str) -> None:
    exchange = Exchange(0, 2, None, Mesh({}), torch.device("cpu"), waited_s)
    assert f"host 1 did not take part within {told} (host 0" in exchange.sentence_of_missing([1], [], waited_s)


@pytest.mark.faults
def test_a_late_host_is_named() -> None:
    def work(exchange: Exchange) -> None:
        exchange.agree(b"one")
        if exchange.rank == 1:
            time.sleep(TIMEOUT_S + 1)
            return
        exchange.agree(b"two")

    started = time.monotonic()
    first, second, third = on_hosts(3, work)
    assert second is None
    assert time.monotonic() - started < 15
    for error in (first, third):
        assert "step 3: host 1 did not take part" in str(error) or "lost the connection" in str(error)
    assert any("host 1 did not take part within 1.5 s" in str(error) for error in (first, third))


@pytest.mark.faults
def test_a_host_that_is_gone_is_named_at_once() -> None:
    def work(exchange: Exchange) -> None:
        if exchange.rank == 1:
            exchange.mesh.close()
            return
        exchange.agree(b"one")

    started = time.monotonic()
    first, second, third = on_hosts(3, work)
    assert second is None
    for error in (first, third):
        assert isinstance(error, HostMissing)
        assert "lost the connection to host 1" in str(error)
    assert time.monotonic() - started < 10


@pytest.mark.faults
@pytest.mark.parametrize("is_gone", [True, False], ids=["gone", "late"])
def test_hosts_that_wait_in_a_collective_name_the_one_that_does_not(is_gone: bool) -> None:
    """Not each other, who wait for it as well."""

    def work(exchange: Exchange) -> None:
        if exchange.rank == 1 and is_gone:
            exchange.close()
        elif exchange.rank == 1:
            time.sleep(TIMEOUT_S + 2 * TELLING_S)
        else:
            # One notices well before the other: its time-out is shorter.
            exchange.timeout_s = TIMEOUT_S - 0.2 * exchange.rank
            exchange.gather(PartialResult.empty(torch.zeros(1, 1, 8)))

    first, second, third = on_hosts(3, work)
    assert second is None
    for error in (first, third):
        assert isinstance(error, HostMissing)
        assert ("lost the connection to host 1;" if is_gone else ": host 1 did not take part within") in str(error)


@pytest.mark.faults
def test_hosts_that_would_compute_different_steps_say_so() -> None:
    results = on_hosts(2, lambda exchange: exchange.agree(b"one" if exchange.rank == 0 else b"two"))
    assert "host 0 and host 1 are about to compute different steps" in str(results[0])
    assert "host 1 and host 0 are about to compute different steps" in str(results[1])


@pytest.mark.faults
def test_a_host_that_lost_a_collective_is_no_host_with_other_requests() -> None:
    """Its message comes where another host, whose part of the collective ended, is at the next step."""

    def work(exchange: Exchange) -> Any:
        if exchange.rank == 0:
            return exchange.agree(b"next")
        return exchange.sentence_of(RuntimeError("reset"), time.perf_counter())

    results = on_hosts(2, work)
    assert "host 1 gave up waiting for a collective that is over on host 0" in str(results[0])
    assert "lost the connection to another host (reset)" in results[1]


@pytest.mark.faults
def test_all_hosts_abort_at_the_same_step() -> None:
    def work(exchange: Exchange) -> int:
        for step in range(100):
            if exchange.rank == 1 and step == 5:
                exchange.is_aborted = True
            try:
                exchange.agree(b"step")
            except StarAborted:
                exchange.agree(b"next")
                return step
        raise AssertionError("not aborted")

    assert on_hosts(2, work) == [5, 5]


def test_a_request_of_another_group_is_refused() -> None:
    set_exchange(None)
    assert exchange_of(1, 0) is None
    with pytest.raises(StarError, match="a request for host 1 of 2; this process is none"):
        exchange_of(2, 1)


@pytest.mark.faults
def test_hosts_that_do_not_all_come_are_told() -> None:
    listening = bind_port("127.0.0.1")
    port = listening.getsockname()[1]
    with pytest.raises(StarError, match=r"host 0 did not meet all 2 hosts at 127\.0\.0\.1"):
        form_exchange(0, 2, "127.0.0.1", port, listening=listening, device_type="cpu", timeout_s=1, start_timeout_s=1)
