"""The hosts as Ray actors: where they run, when they are late, and what replaces them.

Only the coordinator decides that a host is lost. It asks every working host how far it is, on a thread that the work
does not hold up, so that it can name the one that does not move.
"""

import contextlib
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from farspan.engine_ext.errors import StarError, UnsupportedEngineError
from farspan.star.host import StarHost
from farspan.star.protocol import (
    Answer,
    Ask,
    EngineGone,
    HostFacts,
    HostRates,
    HostSetup,
    HostStatus,
    OfRanks,
    RanksApart,
)

POLL_S = 0.05
"""Between two looks at working hosts."""
GRACE_S = 5.0
"""How much longer than the hosts' own time-out the coordinator waits, so that their errors arrive."""
REACH_S = 10.0
"""For a connection to the head of a cluster."""
ACTOR_THREADS = 4
ACTOR_ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
CPU_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""For hosts without a GPU, where the user sets nothing: each would take nearly all of the machine's memory, and the
same cores as the others."""


@dataclass(frozen=True)
class HostsSetup(OfRanks):
    """What all hosts have in common."""

    num_hosts: int
    model: str
    timeout_s: float
    start_timeout_s: float
    graphs: bool
    gathers_keys: bool
    options: dict[str, Any]
    engine: dict[str, Any]
    address: str | None
    """Of a Ray cluster; None for the one that this process is in, or else a new one on this machine."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray places the hosts over machines."""
    env: dict[str, str] = field(default_factory=dict)


class HostLost(StarError):
    """A host is dead or makes no progress."""

    def __init__(self, rank: int, sentence: str) -> None:
        super().__init__(sentence)
        self.rank = rank


class HostFailed(StarError):
    """A host raised something of its own; others may have waited for it in vain."""


@dataclass
class Watch:
    """When a host was last seen to move."""

    num_steps: int = -1
    moved: float = field(default_factory=time.monotonic)
    asked: Any = None
    """The status that it has been asked for."""
    status: HostStatus | None = None


class Hosts:
    """All hosts of one StarLLM."""

    def __init__(self, setup: HostsSetup, host_class: type[StarHost] = StarHost) -> None:
        """host_class: of the actors; a subclass can prepare its process in `start`."""
        try:
            import ray
        except ModuleNotFoundError as error:
            raise UnsupportedEngineError(
                "Star Attention needs Ray to start its hosts. pip install farspan[ray]."
            ) from error

        self.setup, self.host_class = setup, host_class
        self.owns_ray = False
        self.actors: list[Any] = []
        self.group: Any = None
        self.facts: list[HostFacts] = []
        self.patience_s = setup.timeout_s
        """How long a working host may make no progress."""
        self.killed: set[int] = set()
        """Hosts that were ended because they could not go on, and that have no successor yet."""
        if not ray.is_initialized():
            # A cluster that exists is joined if its address is given or in RAY_ADDRESS.
            address = setup.address or os.environ.get("RAY_ADDRESS")
            size = {} if address else {"num_cpus": max(os.cpu_count() or 1, setup.num_hosts)}
            is_ours = False if not address else None
            try:
                if address:
                    check_reachable(address)
                ray.init(address=address, include_dashboard=is_ours, log_to_driver=False, **size)
            except (OSError, RuntimeError, ValueError) as error:
                cluster = f"the Ray cluster at {address!r}" if address else "a Ray cluster on this machine"
                raise StarError(
                    f"{cluster} cannot be used ({error}). Give as address, or in RAY_ADDRESS, HOST:PORT of a head that "
                    "runs, or leave both out to start Ray on this machine."
                ) from error
            self.owns_ray = True
        elif setup.address not in (None, "auto") and not setup.address.startswith("ray://"):
            joined = ray.get_runtime_context().gcs_address
            if joined.rpartition(":")[2] != setup.address.rpartition(":")[2]:
                raise StarError(
                    f"address={setup.address!r}; this process is in the Ray cluster at {joined} already. Leave address "
                    "out, or call ray.shutdown() first."
                )
        try:
            self.device_type = choose_device(setup.num_hosts, ray.cluster_resources(), setup.num_ranks)
        except BaseException:
            self.close()
            raise

    def start(self) -> None:
        """Place and start all hosts. Raises StarError, and leaves nothing behind, where one does not start."""
        import ray

        with self.all_or_none():
            self.group = self.place()
            for rank in range(self.setup.num_hosts):
                self.actors.append(self.make_actor(rank))
            address, port = self.wait_for({0: self.actors[0].listen.remote()}, "start", self.setup.start_timeout_s)[0]
            refs = {rank: actor.start.remote(address, port) for rank, actor in enumerate(self.actors)}
            self.facts = [each for _, each in sorted(self.wait_for(refs, "start", self.setup.start_timeout_s).items())]
            page_sizes = {facts.page_size for facts in self.facts}
            if len(page_sizes) > 1:
                raise UnsupportedEngineError(
                    f"hosts with pages of {sorted(page_sizes)} tokens; farspan needs the same on all. Set block_size."
                )
        assert ray.is_initialized()

    def measure(self) -> list[HostRates]:
        """What sending and computing an anchor take, of all hosts."""
        with self.all_or_none():
            refs = {rank: actor.measure.remote() for rank, actor in enumerate(self.actors)}
            return [each for _, each in sorted(self.wait_for(refs, "start", self.setup.start_timeout_s).items())]

    @contextlib.contextmanager
    def all_or_none(self) -> Iterator[None]:
        """While all hosts do something together: where that ends early, by Ctrl-C too, all of them are stopped.

        One that still waits for the others would be in the way of whatever is asked next.
        """
        try:
            yield
        except BaseException:
            self.stop()
            raise

    def place(self) -> Any:
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group

        bundle = {"CPU": 1.0, **({"GPU": float(self.setup.num_ranks)} if self.device_type == "cuda" else {})}
        group = placement_group([bundle] * self.setup.num_hosts, strategy=self.setup.strategy)
        try:
            ray.get(group.ready(), timeout=self.setup.start_timeout_s)
        except BaseException as error:
            remove_placement_group(group)
            if not isinstance(error, ray.exceptions.GetTimeoutError):
                raise
            raise StarError(
                f"hosts={self.setup.num_hosts}; each needs {bundle} (placement {self.setup.strategy}), and "
                f"within {self.setup.start_timeout_s:g} s the cluster had no room. It has {ray.available_resources()} "
                "free. Use fewer hosts, or free or add machines."
            ) from error
        return group

    def make_actor(self, rank: int, host_bytes: int | None = None) -> Any:
        """The actor of a host. host_bytes: see `HostSetup`."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        setup = self.setup
        host = HostSetup(
            rank=rank,
            num_hosts=setup.num_hosts,
            model=setup.model,
            device_type=self.device_type,
            timeout_s=setup.timeout_s,
            start_timeout_s=setup.start_timeout_s,
            graphs=setup.graphs,
            gathers_keys=setup.gathers_keys,
            options=setup.options,
            engine=setup.engine,
            host_bytes=host_bytes,
        )
        defaults = dict(CPU_ENV if self.device_type == "cpu" else {})
        # Where a step is one of several processes, the hosts' own time-outs come first, those of a start too.
        longest_s = max(setup.timeout_s, setup.start_timeout_s) + 2 * GRACE_S
        defaults["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = str(max(300, math.ceil(longest_s)))
        env = {**ACTOR_ENV, **{name: os.environ.get(name, value) for name, value in defaults.items()}, **setup.env}
        return (
            ray.remote(self.host_class)
            .options(
                num_cpus=1,
                num_gpus=setup.num_ranks if self.device_type == "cuda" else 0,
                max_concurrency=ACTOR_THREADS,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank),
                runtime_env={"env_vars": env},
            )
            .remote(host)
        )

    def wait_for(self, refs: dict[int, Any], doing: str, timeout_s: float) -> dict[int, Any]:
        """Results by rank. Raises HostLost naming a dead or late host, or what a host raised."""
        import ray

        deadline = time.monotonic() + timeout_s
        results: dict[int, Any] = {}
        pending = dict(refs)
        while pending:
            done, _ = ray.wait(list(pending.values()), timeout=max(0.0, min(1.0, deadline - time.monotonic())))
            for rank in [rank for rank, ref in pending.items() if ref in done]:
                results[rank] = self.result_of(rank, pending.pop(rank), doing)
            if pending and time.monotonic() >= deadline:
                rank = min(pending)
                raise HostLost(rank, f"{doing}: host {rank} did not finish within {timeout_s:g} s; see its log.")
        return results

    def result_of(self, rank: int, ref: Any, doing: str) -> Any:
        import ray
        from vllm.exceptions import VLLMValidationError

        try:
            return ray.get(ref)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, EngineGone):
                raise HostLost(rank, f"{doing}: host {rank} is dead ({cause}); see its log.") from error
            if isinstance(cause, StarError | ValueError | VLLMValidationError):
                raise cause from None
            raise HostFailed(f"{doing}: host {rank} failed: {type(cause).__name__}: {cause}") from error
        except ray.exceptions.RayError as error:
            # Its process or its machine is gone, or Ray has ended it as its machine's memory was nearly full.
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise HostLost(rank, f"{doing}: host {rank} is dead ({first}); see its log.") from error

    def run(self, asks: dict[int, Ask], answers: dict[int, Answer]) -> Iterator[dict[int, HostStatus]]:
        """Let hosts work, and yield how far they are until all have put their answers into `answers`.

        Where several fail, a lost host is named before those that only waited for it: raises HostLost, StarError, or
        what the engines say of a bad request. No host is left at work, but for one that is lost.
        """
        import ray

        doing = next(iter(asks.values())).phase
        # Hosts that wait for each other have as much patience as this process has with them.
        timed = {rank: replace(ask, timeout_s=self.patience_s) for rank, ask in asks.items()}
        pending: dict[int, Any] = {}
        watches = {rank: Watch() for rank in asks}
        errors: dict[int, BaseException] = {}
        try:
            for rank, ask in timed.items():
                pending[rank] = self.actors[rank].run.remote(ask)
            while pending:
                done, _ = ray.wait(list(pending.values()), num_returns=len(pending), timeout=POLL_S)
                for rank in [rank for rank, ref in pending.items() if ref in done]:
                    try:
                        answers[rank] = self.result_of(rank, pending.pop(rank), doing)
                    except Exception as error:
                        errors[rank] = error
                        if isinstance(error, RanksApart):
                            self.end(rank)
                for rank in list(pending):
                    if self.is_stuck(rank, watches[rank], waits=bool(errors)):
                        errors[rank] = stuck_error(rank, doing, self.patience_s, errors.values())
                        self.end(rank)
                        del pending[rank]
                if pending:
                    yield {rank: watch.status for rank, watch in watches.items() if watch.status is not None}
        except GeneratorExit:
            self.abort(pending, self.setup.timeout_s + GRACE_S)
            raise
        except KeyboardInterrupt:
            # Who presses Ctrl-C does not want to wait.
            self.abort(pending, GRACE_S)
            raise
        if errors:
            raise worst(errors)

    def end(self, rank: int) -> None:
        """Kill a host that cannot go on; `replace` makes a new one."""
        import ray

        ray.kill(self.actors[rank], no_restart=True)
        self.killed.add(rank)

    def is_stuck(self, rank: int, watch: Watch, waits: bool) -> bool:
        """Whether a working host has not moved for too long; asks it again how far it is.

        waits: other hosts have failed, so that this one may wait for them until its own time-out.
        """
        import ray

        if watch.asked is None:
            watch.asked = self.actors[rank].status.remote()
        ready, _ = ray.wait([watch.asked], timeout=0)
        if ready:
            with contextlib.suppress(ray.exceptions.RayError):
                watch.status = ray.get(watch.asked)
                if watch.status.num_steps != watch.num_steps:
                    watch.num_steps, watch.moved = watch.status.num_steps, time.monotonic()
            watch.asked = None
        still_s = time.monotonic() - watch.moved
        # In lockstep all stand still with one: those that wait know whom they wait for, and say so first.
        is_waiting = watch.status is not None and watch.status.waits_for_all and watch.asked is None
        return still_s > self.patience_s + (GRACE_S if is_waiting or waits else 0)

    def abort(self, pending: dict[int, Any], within_s: float) -> None:
        """End a request on all hosts that work on it; a host that does not end in time is killed."""
        import ray

        told = {rank: self.actors[rank].abort.remote() for rank in pending}
        left = waited = [*told.values(), *pending.values()]
        try:
            _, left = ray.wait(waited, num_returns=len(waited), timeout=within_s)
        finally:
            # All of them where Ctrl-C is pressed again.
            for rank, ref in pending.items():
                if ref in left or told[rank] in left:
                    self.end(rank)

    def replace(self, rank: int | None) -> None:
        """A new host for a dead one, and for those that waited for it on their devices until they were ended.

        The others keep their engines and meet the new ones, or each other (None). All hosts are stopped where one does
        not start.
        """
        import ray

        with self.all_or_none():
            new = self.killed if rank is None else {rank, *self.killed}
            for each in new:
                ray.kill(self.actors[each], no_restart=True)
                self.actors[each] = self.make_actor(each, self.facts[each].host_bytes)
            self.killed = set()
            timeout_s = self.setup.start_timeout_s
            address, port = self.wait_for({0: self.actors[0].listen.remote()}, "restart", timeout_s)[0]
            refs = {
                each: actor.start.remote(address, port) if each in new else actor.rejoin.remote(address, port)
                for each, actor in enumerate(self.actors)
            }
            results = self.wait_for(refs, "restart", timeout_s)
            for each in new:
                self.facts[each] = results[each]

    def stop(self) -> None:
        """End all hosts and give their places back; Ray itself goes on."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if not ray.is_initialized():
            return
        try:
            with contextlib.suppress(ray.exceptions.RayError):
                # Killing alone frees a GPU's memory; leaving first lets what waits for this host go on.
                stopping = [actor.stop.remote() for actor in self.actors]
                ray.wait(stopping, num_returns=len(stopping), timeout=GRACE_S) if stopping else None
        finally:
            # Also where Ctrl-C is pressed meanwhile.
            for actor in self.actors:
                with contextlib.suppress(ray.exceptions.RayError):
                    ray.kill(actor, no_restart=True)
            if self.group is not None:
                remove_placement_group(self.group)
            self.actors, self.group, self.facts, self.killed = [], None, [], set()

    def close(self) -> None:
        """`stop`, and Ray too if it was started here."""
        import ray

        try:
            self.stop()
        finally:
            if self.owns_ray:
                ray.shutdown()
                self.owns_ray = False


def check_reachable(address: str) -> None:
    """Raise OSError where nobody listens at HOST:PORT, for which Ray alone would wait for many minutes."""
    from ray.util import get_node_ip_address

    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        # As Ray does.
        host = get_node_ip_address() if host in ("127.0.0.1", "localhost", "[::1]") else host.strip("[]")
        socket.create_connection((host, int(port)), REACH_S).close()


def choose_device(num_hosts: int, resources: dict[str, float], num_ranks: int = 1) -> Literal["cpu", "cuda"]:
    """`num_ranks` GPUs a host where the cluster has GPUs. Raises StarError where it has some, but too few."""
    num_gpus = int(resources.get("GPU", 0))
    if num_gpus == 0:
        return "cpu"
    if num_gpus < num_hosts * num_ranks:
        needed = "one of its own" if num_ranks == 1 else f"{num_ranks} of its own (tensor_parallel_size)"
        raise StarError(
            f"hosts={num_hosts}; the Ray cluster has {num_gpus} GPU{'s' if num_gpus > 1 else ''}, and every host needs "
            f"{needed}. Use fewer hosts, or add machines to the cluster."
        )
    return "cuda"


def stuck_error(rank: int, doing: str, timeout_s: float, errors: Iterable[BaseException]) -> StarError:
    """Why a host that makes no progress is ended: it is lost, or waits on its device for one that is."""
    sentence = f"{doing}: host {rank} made no progress for {timeout_s:g} s; see its log."
    if any(isinstance(error, HostLost | HostFailed) for error in errors):
        return StarError(sentence)
    return HostLost(rank, sentence)


def worst(errors: dict[int, BaseException]) -> BaseException:
    """The error that tells most: a lost host, then one that failed, then one that waited, then the first."""
    ranked: Sequence[type[BaseException]] = (HostLost, HostFailed, StarError, BaseException)
    for kind in ranked:
        for _, error in sorted(errors.items()):
            if isinstance(error, kind):
                return error
    raise AssertionError("no errors")
