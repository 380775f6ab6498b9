"""What an error of a host's worker processes means to it, and to the coordinator; without any of them."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from farspan.engine_ext.errors import StarError
from farspan.engine_ext.star.exchange import Exchange, set_exchange
from farspan.engine_ext.star.mesh import Mesh
from farspan.engine_ext.star.team import HostMissing, StarAborted
from farspan.star import ranks
from farspan.star.coordinator import HostLost, Hosts
from farspan.star.host import StarHost
from farspan.star.protocol import Ask, EngineGone, HostSetup, RanksApart

SETUP = HostSetup(0, 2, "nowhere", "cpu", 1.0, 1.0, False, False, {}, {"tensor_parallel_size": 2})


def ranks_with(reply: Callable[..., Any], is_failed: bool = False) -> ranks.Ranks:
    """Ranks whose executor answers so."""
    asked = ranks.Ranks(SETUP)
    asked.executor = SimpleNamespace(collective_rpc=reply, is_failed=is_failed)
    return asked


def raising(error: Exception) -> Callable[..., Any]:
    def reply(*arguments: Any, **options: Any) -> Any:
        raise error

    return reply


def test_an_error_of_a_step_is_what_the_first_rank_says() -> None:
    error = RuntimeError("Worker failed with error '…'")
    for failure, kind in (
        (ranks.Failure("late", "HostMissing", False), HostMissing),
        (ranks.Failure("over", "StarAborted", False), StarAborted),
        (ranks.Failure("torn", "HostMissing", True), RanksApart),
    ):
        meaning = ranks_with(lambda *a, failure=failure, **o: failure).error_of_step(error)
        assert type(meaning) is kind
        assert str(meaning) == failure.sentence
    # Not an error of the exchange: memory, for example.
    assert ranks_with(lambda *a, **o: None).error_of_step(error) is error
    # The next reply would be that of the step.
    meaning = ranks_with(lambda *a, **o: "tokens").error_of_step(TimeoutError("RPC call timed out."))
    assert type(meaning) is EngineGone
    torn = ranks.Failure("torn", "HostMissing", True)
    for reply in (raising(RuntimeError("Executor failed.")), lambda *a, **o: torn):
        assert type(ranks_with(reply, is_failed=True).error_of_step(error)) is EngineGone


def test_an_error_of_a_rank_that_is_asked() -> None:
    assert ranks_with(lambda *a, **o: [1, 2]).ask(ranks.begin, "phase 1", 1.0) == [1, 2]
    with pytest.raises(StarAborted, match="over"):
        ranks_with(lambda *a, **o: [1, ranks.Refused("over", "StarAborted")]).ask(ranks.agree, b"", 0)
    with pytest.raises(EngineGone, match=r"did not answer within 0\.5 s"):
        ranks_with(raising(TimeoutError())).ask(ranks.end, timeout_s=0.5)
    with pytest.raises(EngineGone, match="the process of one of its GPUs ended"):
        ranks_with(raising(RuntimeError("Executor failed.")), is_failed=True).ask(ranks.end)


def test_a_collective_that_fails_leaves_ranks_apart_and_an_agreement_does_not() -> None:
    import torch

    exchange = Exchange(0, 2, None, Mesh({}), torch.device("cpu"), 1.0)
    set_exchange(exchange)
    try:
        assert ranks.last_failure() is None
        exchange.mesh.swap = lambda *arguments: ({}, [1], [])  # type: ignore[method-assign]
        assert isinstance(ranks.attempt(None, ranks.agree, (b"one", 0)), ranks.Refused)
        failure = ranks.last_failure()
        assert failure is not None
        assert "host 1 did not take part" in failure.sentence
        assert not failure.is_torn
        ranks.begin("phase 1", 1.0)
        assert ranks.last_failure() is None
        with pytest.raises(StarError), exchange.named_errors():
            raise RuntimeError("connection reset")
        failure = ranks.last_failure()
        assert failure is not None
        assert failure.is_torn
        # The next request's ranks are not apart by that.
        ranks.begin("phase 2", 1.0)
        ranks.attempt(None, ranks.agree, (b"one", 0))
        failure = ranks.last_failure()
        assert failure is not None
        assert not failure.is_torn
    finally:
        set_exchange(None)


def test_hosts_wait_for_each_other_as_long_as_the_request_says() -> None:
    import torch

    exchange = Exchange(0, 2, None, Mesh({}), torch.device("cpu"), 1.0)
    waited: list[float] = []
    exchange.mesh.swap = lambda message, timeout_s: (waited.append(timeout_s), ({}, [1], []))[1]  # type: ignore
    host = StarHost(HostSetup(0, 2, "nowhere", "cpu", 1.0, 90.0, False, False, {}))
    host.llm = SimpleNamespace(llm_engine=SimpleNamespace(has_unfinished_requests=lambda: False))
    set_exchange(exchange)
    try:
        for timeout_s in (90.0, None):
            ask = Ask("r", "phase 2", [1], None, None, timeout_s=timeout_s)
            host.llm.llm_engine.add_request = lambda *arguments: ranks.agree(b"one", 0)
            host.llm.llm_engine.abort_request = host.llm.llm_engine.reset_prefix_cache = lambda *names: None
            host.sampling_of = lambda ask: None  # type: ignore[method-assign]
            with pytest.raises(StarError, match="host 1 did not take part"):
                host.run(ask)
    finally:
        set_exchange(None)
    assert waited == [90.0, 1.0]


def test_a_host_whose_ranks_are_apart_is_ended_with_the_lost_one(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    ended: list[Any] = []
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: ended.append(actor.name))
    monkeypatch.setattr(ray, "wait", lambda refs, **options: (refs, []))
    hosts = object.__new__(Hosts)
    errors = {0: RanksApart("torn"), 1: HostLost(1, "host 1 is dead")}
    asked: list[Ask] = []
    run = SimpleNamespace(remote=asked.append)
    hosts.actors = [SimpleNamespace(name=rank, run=run) for rank in errors]
    hosts.killed, hosts.patience_s = set(), 90.0

    def result_of(rank: int, ref: Any, doing: str) -> Any:
        raise errors[rank]

    hosts.result_of = result_of  # type: ignore[method-assign]
    ask = Ask("r", "phase 1", [1], None, None)
    with pytest.raises(HostLost, match="host 1 is dead"):
        list(hosts.run({0: ask, 1: ask}, {}))
    assert ended == [0]
    assert hosts.killed == {0}
    # Hosts are as patient with each other as the coordinator is with them.
    assert [each.timeout_s for each in asked] == [90.0, 90.0]


def test_ranks_that_are_slow_to_leave_are_not_ended_where_the_host_goes_on() -> None:
    """A busy machine may take a second for what costs nothing."""
    ended: list[str] = []

    def reply(*arguments: Any, timeout: float, **options: Any) -> list[None]:
        if timeout < 5:
            raise TimeoutError
        return [None, None]

    host = StarHost(replace(SETUP, num_hosts=1))
    host.ranks = ranks_with(reply)
    host.ranks.executor.shutdown = lambda: ended.append("engine")
    host.rejoin("127.0.0.1", 1)
    assert ended == []
    host.ranks.leave()
    assert ended == ["engine"]


def test_hosts_that_do_not_end_an_aborted_request_are_replaced_together(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "kill", lambda actor, no_restart: None)
    monkeypatch.setattr(ray, "wait", lambda refs, **options: ([], refs))
    hosts = object.__new__(Hosts)
    told = SimpleNamespace(remote=lambda: "told")
    hosts.actors = [SimpleNamespace(abort=told) for _ in range(2)]
    hosts.killed = set()
    hosts.abort({0: "first", 1: "second"}, 1.0)
    assert hosts.killed == {0, 1}
