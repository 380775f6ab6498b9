"""What the coordinator decides without any host: the device, and which of several errors to tell."""

import importlib
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from farspan.engine_ext.errors import StarError, UnsupportedEngineError
from farspan.star import StarLLM
from farspan.star.blocks import BlockSizes, plan_shards
from farspan.star.coordinator import HostFailed, HostLost, Hosts, HostsSetup, Watch, choose_device, stuck_error, worst
from farspan.star.output import Progress
from farspan.star.protocol import Ask, HostFacts, HostRates, HostSetup
from farspan.star.work import Work


def test_a_gpu_for_every_host() -> None:
    assert choose_device(2, {"CPU": 4.0}) == "cpu"
    assert choose_device(2, {"CPU": 4.0, "GPU": 2.0}) == "cuda"
    with pytest.raises(StarError, match="hosts=3; the Ray cluster has 1 GPU, and every host needs one of its own"):
        choose_device(3, {"GPU": 1.0})
    assert choose_device(2, {"GPU": 4.0}, 2) == "cuda"
    with pytest.raises(StarError, match=r"3 GPUs, and every host needs 2 of its own \(tensor_parallel_size\)"):
        choose_device(2, {"GPU": 3.0}, 2)


@pytest.mark.parametrize("is_ours", [True, False])
def test_ray_is_left_as_it_was_where_there_are_too_few_gpus(is_ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, ended = pytest.importorskip("ray"), []
    monkeypatch.setattr(ray, "is_initialized", lambda: not is_ours)
    monkeypatch.setattr(ray, "init", lambda **arguments: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0})
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    with pytest.raises(StarError, match="the Ray cluster has 1 GPU"):
        Hosts(HostsSetup(2, "nowhere", 60.0, 60.0, False, False, {}, {}, None))
    assert ended == [True] * is_ours


def test_another_cluster_than_the_one_that_was_joined_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address="10.0.0.1:6379"))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    setup = HostsSetup(2, "nowhere", 60.0, 60.0, False, False, {}, {}, "head:6379")
    assert Hosts(setup).device_type == "cpu"
    with pytest.raises(StarError, match=r"address='head:6380'; this process is in the Ray cluster at 10\.0\.0\.1:6379"):
        Hosts(replace(setup, address="head:6380"))


def test_a_lost_host_is_told_before_those_that_waited_for_it() -> None:
    waited, lost, bad = StarError("waited"), HostLost(2, "lost"), ValueError("bad")
    assert worst({0: waited, 1: bad, 2: lost}) is lost
    assert worst({0: bad, 1: waited}) is waited
    failed = HostFailed("failed")
    assert worst({0: waited, 1: failed}) is failed
    assert worst({1: bad}) is bad


def test_a_host_that_ray_ended_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    # Ray's memory monitor ends the largest process of a machine whose memory is nearly full; no RayActorError.
    for error in (ray.exceptions.OutOfMemoryError("memory"), ray.exceptions.RayActorError()):

        def get(ref: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(ray, "get", get)
        with pytest.raises(HostLost, match="phase 1: host 3 is dead") as caught:
            Hosts.result_of(object.__new__(Hosts), 3, None, "phase 1")
        assert caught.value.rank == 3


def test_a_host_that_waits_for_a_dead_one_on_its_device_is_not_the_lost_one() -> None:
    first = stuck_error(0, "phase 2", 12, [StarError("waited")])
    assert isinstance(first, HostLost)
    assert str(first) == "phase 2: host 0 made no progress for 12 s; see its log."
    for error in (HostLost(1, "host 1 is dead"), HostFailed("host 1 failed")):
        waits = stuck_error(0, "phase 2", 12, [error])
        assert not isinstance(waits, HostLost)
        assert worst({0: waits, 1: error}) is error


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UnsupportedEngineError, match=r"pip install farspan\[ray\]"):
        StarLLM("nowhere", 2, skip_tokenizer_init=True)


@pytest.mark.parametrize(("start_timeout_s", "step_timeout_s"), [(900.0, "910"), (60.0, "300")])
def test_a_step_of_several_processes_may_take_as_long_as_a_start(
    start_timeout_s: float, step_timeout_s: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.util.scheduling_strategies")
    monkeypatch.delenv("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS", raising=False)
    given: dict[str, Any] = {}
    remote = SimpleNamespace(
        options=lambda **options: given.update(options) or SimpleNamespace(remote=lambda host: host)
    )
    monkeypatch.setattr(ray, "remote", lambda host_class: remote)
    hosts: Any = object.__new__(Hosts)
    engine = {"tensor_parallel_size": 2}
    hosts.setup = HostsSetup(2, "nowhere", 60.0, start_timeout_s, False, False, {}, engine, None)
    hosts.device_type, hosts.group, hosts.host_class = "cuda", None, object
    host = hosts.make_actor(1)
    assert given["runtime_env"]["env_vars"]["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] == step_timeout_s
    assert given["num_gpus"] == host.num_ranks == 2


@pytest.mark.parametrize(("patience_s", "is_stuck"), [(100.0, False), (1.0, True)], ids=["start", "later"])
def test_a_host_may_stand_still_for_so_long(patience_s: float, is_stuck: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "wait", lambda refs, **options: ([], refs))
    hosts: Any = object.__new__(Hosts)
    hosts.setup, hosts.patience_s = SimpleNamespace(timeout_s=1.0), patience_s
    hosts.actors = [SimpleNamespace(status=SimpleNamespace(remote=lambda: "asked"))]
    assert hosts.is_stuck(0, Watch(moved=time.monotonic() - 50), waits=False) == is_stuck


@pytest.mark.parametrize("way", ["stream", "generate"])
def test_a_request_that_is_left_is_over_at_once(way: str) -> None:
    """However long somebody keeps what was left: from Python 3.12 on an open loop keeps its generator, and the lock."""
    star = StarLLM.__new__(StarLLM)
    star.sizes, star.lock, star.has_offload, star.working_thread = BlockSizes(), threading.Lock(), False, None
    kept = []

    def work_alone(*arguments: Any) -> Iterator[Progress]:
        yield Progress("phase 2", 1, 1, [7])
        yield Progress("phase 2", 1, 1, [7, 8])

    stock = star.work
    star.work_alone = work_alone  # type: ignore[method-assign]
    star.work = lambda *arguments: kept.append(stock(*arguments)) or kept[-1]  # type: ignore[method-assign]
    if way == "stream":
        stream = star.stream([1, 2], [3])
        assert next(stream) == [7]
        stream.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            star.generate([1, 2], [3], on_progress=interrupted)
    assert not star.lock.locked()
    assert kept


def test_an_interrupt_while_hosts_work_ends_the_request_on_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the next request would step their engines beside the one that still runs."""
    ray = pytest.importorskip("ray")
    told: list[int] = []

    def wait(refs: list[str], **options: Any) -> tuple[list[str], list[str]]:
        if not told:
            raise KeyboardInterrupt
        return refs, []

    def actor(rank: int) -> SimpleNamespace:
        run = SimpleNamespace(remote=lambda ask: f"run {rank}")
        return SimpleNamespace(run=run, abort=SimpleNamespace(remote=lambda: told.append(rank) or f"abort {rank}"))

    monkeypatch.setattr(ray, "wait", wait)
    hosts: Any = object.__new__(Hosts)
    hosts.patience_s = 1.0
    hosts.actors = [actor(rank) for rank in range(2)]
    ask = Ask("request", "phase 1", [1], None, None)
    with pytest.raises(KeyboardInterrupt):
        list(hosts.run({0: ask, 1: ask}, {}))
    assert told == [0, 1]


class Waiting:
    """Ray as hosts see it that are started, replaced, measured or ended: the wait number `at` is interrupted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int = 0) -> None:
        ray = pytest.importorskip("ray")
        groups = importlib.import_module("ray.util.placement_group")
        self.killed: list[str] = []
        self.given: list[HostSetup] = []
        self.num_waits, self.at, self.num_groups = 0, at, 0
        monkeypatch.setattr(ray, "is_initialized", lambda: True)
        monkeypatch.setattr(ray, "kill", lambda actor, no_restart: self.killed.append(actor.name))
        monkeypatch.setattr(ray, "wait", self.wait)
        monkeypatch.setattr(ray, "get", self.get)
        monkeypatch.setattr(groups, "placement_group", self.place)
        monkeypatch.setattr(groups, "remove_placement_group", self.remove)
        monkeypatch.setattr(ray, "remote", lambda host_class: SimpleNamespace(options=lambda **o: self))

    def count(self) -> None:
        self.num_waits += 1
        if self.num_waits == self.at:
            raise KeyboardInterrupt

    def wait(self, refs: list[Any], **options: Any) -> tuple[list[Any], list[Any]]:
        self.count()
        return refs, []

    def get(self, ref: Any, timeout: float | None = None) -> Any:
        if timeout is not None:
            self.count()
        return ref() if callable(ref) else ref

    def place(self, bundles: list[Any], strategy: str) -> Any:
        self.num_groups += 1
        return SimpleNamespace(ready=lambda: None)

    def remove(self, group: Any) -> None:
        self.num_groups -= 1

    def remote(self, setup: HostSetup) -> Any:
        """An actor with the setup."""
        self.given.append(setup)
        facts = HostFacts(16, 64, 64, 512, 1.0, 16, 0.0, host_bytes=1000 + setup.rank)
        answers = {"listen": ("", 1), "start": facts, "rejoin": None, "measure": HostRates(1.0, 1.0), "stop": None}
        methods = {name: SimpleNamespace(remote=lambda *_, a=answer: lambda: a) for name, answer in answers.items()}
        return SimpleNamespace(name=f"{setup.rank}.{len(self.given)}", **methods)

    def hosts(self) -> Hosts:
        found: Any = object.__new__(Hosts)
        found.setup = HostsSetup(2, "nowhere", 60.0, 60.0, False, False, {}, {}, None)
        found.device_type, found.group, found.host_class = "cpu", None, object
        found.actors, found.facts, found.killed, found.owns_ray = [], [], set(), False
        return found


@pytest.mark.parametrize("work", ["start", "measure", "replace", "stop"])
def test_an_interrupt_while_all_hosts_do_something_leaves_none(work: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whichever of the waits it comes: a host that waits for the others would be in the next request's way."""
    for at in range(1, 9):
        ray = Waiting(monkeypatch)
        hosts = ray.hosts()
        if work != "start":
            hosts.start()
        ray.num_waits, ray.at = 0, at
        try:
            hosts.replace(1) if work == "replace" else getattr(hosts, work)()
        except KeyboardInterrupt:
            assert not hosts.actors
            assert ray.num_groups == 0
            assert len(set(ray.killed)) == len(ray.given)
        else:
            break
    # Placing, the first host's port, all hosts; the wait of a stop.
    assert at > {"start": 3, "measure": 1, "replace": 2, "stop": 1}[work]


def test_a_host_that_replaces_another_is_told_its_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Waiting(monkeypatch)
    hosts = ray.hosts()
    hosts.start()
    assert [setup.host_bytes for setup in ray.given] == [None, None]
    hosts.replace(1)
    assert [(setup.rank, setup.host_bytes) for setup in ray.given[2:]] == [(1, 1001)]


def test_an_interrupt_while_a_request_is_aborted_ends_its_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Waiting(monkeypatch, at=1)
    hosts = ray.hosts()
    abort = SimpleNamespace(remote=lambda: "told")
    hosts.actors = [SimpleNamespace(name=f"{rank}", abort=abort) for rank in range(2)]
    with pytest.raises(KeyboardInterrupt):
        hosts.abort({0: "run 0", 1: "run 1"}, 1.0)
    assert ray.killed == ["0", "1"]
    assert hosts.killed == {0, 1}


def test_a_replacement_with_less_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lost host's successor was not there when the request was checked."""
    star = StarLLM.__new__(StarLLM)
    star.num_hosts, star.has_offload, star.restart_s = 2, True, 0.0
    facts = [HostFacts(16, 4096, 4096, 512, 1000.0, 128, 0.0)] * 2

    def run(asks: dict[int, Ask], answers: Any) -> Iterator[dict[int, Any]]:
        raise HostLost(1, "phase 1: host 1 is dead.")
        yield {}

    def replace_host(rank: int) -> None:
        star.hosts.facts = [facts[0], replace(facts[1], cache_len=64)]

    star.hosts = SimpleNamespace(  # type: ignore[assignment]
        facts=facts, run=run, replace=replace_host, setup=SimpleNamespace(graphs=False)
    )
    context = list(range(256))
    shards = plan_shards("r", len(context), 2, 16, BlockSizes(64, None), 1000.0)
    work = Work("r", context, [1], SimpleNamespace(max_tokens=4, clone=SimpleNamespace), shards, False)
    monkeypatch.setattr(Work, "first_ask", lambda self, shard, attempt: Ask("r", "phase 1", [1], None, shard))
    with pytest.raises(StarError, match=r"host 1 is dead\. Its replacement has less room: host 1 needs \d+ tokens"):
        list(star.read_context(work))


def interrupted(progress: Progress) -> None:
    raise KeyboardInterrupt
