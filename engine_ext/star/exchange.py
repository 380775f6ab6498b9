"""What the hosts of Star Attention send each other: partial results of a layer, pages of keys, agreement on a step.

One group per process, formed before the engine captures graphs; with tensor parallelism inside a host one for each of
its ranks, with the same rank of the others. A host that is late or gone is named within the time-out, as long as the
others wait on the CPU; a device that waits is the coordinator's to notice.
"""

import contextlib
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

import torch
from farspan.engine_ext.errors import StarError
from farspan.engine_ext.star.mesh import Mesh, form_mesh
from farspan.engine_ext.star.team import Agreement, HostMissing, StarAborted, Team

TELLING_S = 2.0
"""Between hosts that notice a failed collective by themselves: their time-outs begin within a step."""


MESSAGE = struct.Struct("<?qqq")
"""Of a host before a step: whether it aborts, its step, what it is about to compute, and a number."""
WAITED = -1
"""In place of what a host is about to compute: it gave up waiting for a collective."""
RESULT_ALIGNMENT = 128
"""Bytes. Triton compiles one kernel for strides that are multiples of 16 elements and another for the rest."""


@dataclass(frozen=True)
class PartialResult:
    """A host's attention over its own keys, in the one buffer that is sent."""

    buffer: torch.Tensor
    """[num_bytes] uint8."""
    out: torch.Tensor
    """[num_tokens, num_q_heads, head_dim], model dtype; a view of the buffer, as is `lse`."""
    lse: torch.Tensor
    """[num_q_heads, num_tokens] float32, natural log."""

    @classmethod
    def empty(cls, out: torch.Tensor) -> Self:
        """Room for a result of the shape and dtype of `out`."""
        num_tokens, num_q_heads, head_dim = out.shape
        num_bytes = result_bytes(num_tokens, num_q_heads, head_dim, out.itemsize)
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device=out.device)
        return cls(buffer, *unpacked(buffer, out))


def result_bytes(num_tokens: int, num_q_heads: int, head_dim: int, itemsize: int) -> int:
    """Of the buffer of a PartialResult."""
    num_bytes = num_tokens * num_q_heads * (head_dim * itemsize + 4)
    return -(-num_bytes // RESULT_ALIGNMENT) * RESULT_ALIGNMENT


def unpacked(buffer: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The results in [..., num_bytes] uint8 of PartialResults: [..., *out.shape] and [..., num_q_heads, num_tokens]."""
    others, lse_begin = buffer.shape[:-1], out.numel() * out.itemsize
    lse_end = lse_begin + 4 * out.shape[0] * out.shape[1]
    part_lse = buffer[..., lse_begin:lse_end].view(torch.float32).view(*others, out.shape[1], out.shape[0])
    return buffer[..., :lse_begin].view(out.dtype).view(*others, *out.shape), part_lse


class Exchange:
    """The group of one host with all others. Steps are counted from 1, and are the same on all hosts."""

    def __init__(
        self,
        rank: int,
        num_hosts: int,
        group: Any,
        mesh: Mesh,
        device: torch.device,
        timeout_s: float,
        team: Team | None = None,
    ) -> None:
        """rank: of the host. group: of torch, for tensors on the device. team: where the host has several ranks."""
        self.rank, self.num_hosts, self.timeout_s = rank, num_hosts, timeout_s
        self.group, self.mesh, self.device, self.team = group, mesh, device, team
        self.step = 0
        self.failure: StarError | None = None
        """The last error of this group, for a host whose ranks are other processes."""
        self.is_torn = False
        """Whether a collective failed inside a step, so that ranks of this host may stand at different places."""
        self.phase = "start"
        """Of the request that is worked on, for errors."""
        self.is_aborted = False
        """Set from another thread: at the next step all hosts end what they compute together."""
        self.num_bytes = 0
        """Received from the other hosts so far, as builders count it: a replayed graph passes no line of ours."""
        self.anchor_of: str | None = None
        """The request whose anchor all hosts have to send or receive at their next step that can."""
        self.gathers_keys = False
        """Whether contexts may be spread so that a layer has all hosts' keys for a while."""
        self.num_on_machine = num_hosts
        """Hosts that share this one's machine, itself included."""
        self.host_bytes: int | None = None
        """Host memory for KV that each rank of the lost host had which this one replaces; None for others."""
        self.waited_s = 0.0
        self.waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        """Around exchanges that the device has not been asked about yet."""

    def warm_up(self, machine: int = 0) -> None:
        """One message and one small collective, by every host. Raises StarError where a host does not take part.

        machine: see `form_exchange`.
        """
        self.num_on_machine = self.agree(b"warm-up", machine).count(machine)
        mine = PartialResult.empty(torch.empty(1, 1, 2, device=self.device))
        mine.buffer.zero_()
        mine.out.fill_(self.rank)
        out, _ = self.gather(mine)
        if out[:, 0, 0, 0].tolist() != list(range(self.num_hosts)):
            raise StarError(f"host {self.rank}: the warm-up exchange gave other hosts' numbers in the wrong places.")

    def agree(self, digest: bytes, number: int = 0) -> list[int]:
        """Wait until all hosts are about to compute the same step; returns the number that each of them tells.

        digest: at most 7 bytes that name what is computed together. Raises HostMissing naming the hosts that do not
        come within the time-out, StarError those that come with another step; StarAborted on all hosts if one of them
        was told so. With several ranks in a host the first one agrees for all.
        """
        self.step += 1
        try:
            if self.team is None:
                return self.agree_with_hosts(digest, number)
            return self.shared_agreement(self.team, digest, number).numbers_or_raise()
        except StarError as error:
            self.failure = error
            raise

    def shared_agreement(self, team: Team, digest: bytes, number: int) -> Agreement:
        """What the first rank of this host agreed on with the other hosts."""
        if not team.is_leader:
            told = team.share(None)
            if (told.step, told.digest) != (self.step, digest) and not told.error:
                raise StarError(
                    f"{self.phase}, step {self.step}: ranks of host {self.rank} are about to compute different steps."
                )
            return told
        try:
            agreement = Agreement(self.step, digest, self.agree_with_hosts(digest, number))
        except StarError as error:
            agreement = Agreement(self.step, digest, [], str(error), type(error).__name__)
        except BaseException as error:
            # The other ranks wait for an answer, whatever happened here.
            team.share(Agreement(self.step, digest, [], f"{self.phase}, step {self.step}: host {self.rank}: {error!r}"))
            raise
        return team.share(agreement)

    def agree_with_hosts(self, digest: bytes, number: int) -> list[int]:
        """See `agree`."""
        mine = bool(self.is_aborted), self.step, int.from_bytes(digest, "big"), number
        came, late, gone = self.mesh.swap(MESSAGE.pack(*mine), self.timeout_s)
        if sentence := self.sentence_of_missing(late, gone, self.timeout_s):
            raise HostMissing(sentence)
        everyone = [mine if rank == self.rank else MESSAGE.unpack(came[rank]) for rank in range(self.num_hosts)]
        if any(is_aborted for is_aborted, *_ in everyone):
            self.is_aborted = False
            raise StarAborted(f"{self.phase}, step {self.step}: aborted.")
        waited = [rank for rank, theirs in enumerate(everyone) if theirs[2] == WAITED]
        if waited:
            raise StarError(
                f"{self.phase}, step {self.step}: {hosts(waited)} gave up waiting for a collective that is over on "
                f"host {self.rank}; see its log."
            )
        differing = [rank for rank, theirs in enumerate(everyone) if theirs[:3] != mine[:3]]
        if differing:
            raise StarError(
                f"{self.phase}, step {self.step}: host {self.rank} and {hosts(differing)} are about to compute "
                "different steps (other requests, or tokens of other requests). Answers would be wrong, so the request "
                "ends."
            )
        return [theirs[3] for theirs in everyone]

    def gather_pages(self, mine: torch.Tensor) -> torch.Tensor:
        """Pages of all hosts, as many of each: [num_pages, …] contiguous to [num_hosts * num_pages, …], by ranks."""
        everyone = torch.empty(self.num_hosts, mine.nbytes, dtype=torch.uint8, device=mine.device)
        with self.timed(mine.device):
            self.all_gather(everyone, mine.view(-1).view(torch.uint8))
        return everyone.view(mine.dtype).view(-1, *mine.shape[1:])

    def send_pages(self, pages: torch.Tensor) -> None:
        """Let all hosts have what host 0 has in `pages`, contiguous and of the same shape everywhere."""
        from torch.distributed.distributed_c10d import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        options.timeout = timedelta(seconds=self.timeout_s)
        with self.timed(pages.device), self.named_errors():
            done(self.group.broadcast([pages.view(-1).view(torch.uint8)], on_this_stream(options)))

    @contextlib.contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Count the time until an exchange is over on the device, which waits there for the other hosts."""
        if device.type == "cpu":
            started = time.perf_counter()
            yield
            self.waited_s += time.perf_counter() - started
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        yield
        events[1].record()
        self.waits.append(events)

    def take_waited_s(self) -> float:
        """Seconds that exchanges of keys took since this was last asked, the wait for other hosts included."""
        for first, last in self.waits:
            last.synchronize()
            self.waited_s += first.elapsed_time(last) / 1e3
        waited_s, self.waited_s, self.waits = self.waited_s, 0.0, []
        return waited_s

    @contextlib.contextmanager
    def named_errors(self) -> Iterator[None]:
        """Say who is missing where the CPU notices that a collective failed."""
        started = time.perf_counter()
        try:
            yield
        except RuntimeError as error:
            self.is_torn = True
            self.failure = HostMissing(self.sentence_of(error, started))
            raise self.failure from error

    def gather(self, mine: PartialResult) -> tuple[torch.Tensor, torch.Tensor]:
        """Partial results of all hosts for the same queries, in the order of their ranks.

        Returns [num_hosts, num_tokens, num_q_heads, head_dim] and [num_hosts, num_q_heads, num_tokens], views of one
        buffer. Raises HostMissing where the CPU notices that a host is gone.
        """
        everyone = torch.empty(self.num_hosts, len(mine.buffer), dtype=torch.uint8, device=mine.buffer.device)
        self.all_gather(everyone, mine.buffer)
        return unpacked(everyone, mine.out)

    def all_gather(self, everyone: torch.Tensor, mine: torch.Tensor) -> None:
        from torch.distributed.distributed_c10d import AllgatherOptions

        options = AllgatherOptions()
        options.timeout = timedelta(seconds=self.timeout_s)
        with self.named_errors():
            done(self.group._allgather_base(everyone, mine[None], on_this_stream(options)))

    def sentence_of(self, error: Exception, started: float) -> str:
        """Who is missing from a collective: hosts that waited in vain tell each other so, at about the same time.

        started: when this host began to wait, by `time.perf_counter`.
        """
        told = MESSAGE.pack(False, self.step, WAITED, 0)
        _, late, gone = self.mesh.swap(told, TELLING_S)
        # A connection that has ended is certain; who is silent may only wait longer than this host.
        return self.sentence_of_missing([] if gone else late, gone, time.perf_counter() - started) or (
            f"{self.phase}, step {self.step}: host {self.rank} lost the connection to another host ({error})."
        )

    def sentence_of_missing(self, late: Sequence[int], gone: Sequence[int], waited_s: float) -> str:
        """The error that names hosts whose message did not come, or whose connection has ended; empty for none."""
        if late:
            return (
                f"{self.phase}, step {self.step}: {hosts(late)} did not take part within {round(waited_s, 2):g} s "
                f"(host {self.rank} waited). The host is gone, or too slow; see its log."
            )
        if gone:
            return (
                f"{self.phase}, step {self.step}: host {self.rank} lost the connection to {hosts(gone)}; see its log."
            )
        return ""

    def close(self) -> None:
        """Leave the group; what waits on the device for another host is aborted."""
        self.mesh.close()
        if self.group is not None and self.device.type != "cpu":
            with contextlib.suppress(RuntimeError):
                self.group._get_backend(self.device).abort()
        self.group = None


def on_this_stream(options: Any) -> Any:
    """Options of a collective that NCCL puts on the current stream, so that nothing waits for another one."""
    options.asyncOp = False
    return options


def done(work: Any) -> None:
    """Wait for a collective where its backend has not: gloo's CPU, and NCCL of versions that use a stream of theirs."""
    if work is not None:
        work.wait()


def hosts(ranks: Sequence[int]) -> str:
    return f"host{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def form_exchange(
    rank: int,
    num_hosts: int,
    address: str,
    port: int,
    *,
    listening: socket.socket | None = None,
    device_type: str,
    timeout_s: float,
    start_timeout_s: float,
    team: Team | None = None,
    machine: int = 0,
) -> Exchange:
    """Meet the other hosts and warm up; returns when all of them have.

    address, port: where rank 0 listens. listening: rank 0's socket, already bound there. timeout_s: for each exchange;
    start_timeout_s: until all hosts are there. team: where the host has several ranks, which meet at ports of their
    own. machine: a number below 2**63 that hosts on one machine have in common. Raises StarError where a host does not
    come.
    """
    try:
        exchange = meet(rank, num_hosts, address, port, listening, device_type, start_timeout_s, team)
    except StarError as error:
        if team is not None and team.is_leader:
            # The other ranks wait for the first agreement.
            team.share(Agreement(1, b"", [], str(error)))
        raise
    try:
        exchange.warm_up(machine)
    except BaseException:
        exchange.close()
        raise
    exchange.timeout_s = timeout_s
    return exchange


def meet(
    rank: int,
    num_hosts: int,
    address: str,
    port: int,
    listening: socket.socket | None,
    device_type: str,
    start_timeout_s: float,
    team: Team | None,
) -> Exchange:
    """`form_exchange` before its warm-up. Only the first rank of a host has connections for agreements."""
    from vllm.distributed.utils import stateless_init_torch_distributed_process_group

    try:
        group, store = stateless_init_torch_distributed_process_group(
            address,
            port,
            rank,
            num_hosts,
            "gloo" if device_type == "cpu" else "nccl",
            return_store=True,
            listen_socket=listening,
            timeout=timedelta(seconds=start_timeout_s),
        )
    except (RuntimeError, OSError) as error:
        raise StarError(
            f"host {rank} did not meet all {num_hosts} hosts at {address}:{port} within {start_timeout_s:g} s "
            f"({error}). See the logs of the hosts, and whether they reach that address."
        ) from error
    finally:
        if listening is not None:
            listening.close()
    if team is not None and not team.is_leader:
        return Exchange(rank, num_hosts, group, Mesh({}), torch.device(device_type), start_timeout_s, team)
    try:
        mesh = form_mesh(rank, num_hosts, address, store, start_timeout_s)
    except (RuntimeError, OSError) as error:
        raise StarError(
            f"host {rank} did not reach all {num_hosts} hosts within {start_timeout_s:g} s ({error}). See the logs of "
            "the hosts, and whether their machines reach each other on any port."
        ) from error
    return Exchange(rank, num_hosts, group, mesh, torch.device(device_type), start_timeout_s, team)


_exchange: Exchange | None = None


def set_exchange(exchange: Exchange | None) -> None:
    """Make a group this process's, or leave it without one; the one before is closed."""
    global _exchange
    if _exchange is not None:
        _exchange.close()
    _exchange = exchange


def current() -> Exchange | None:
    """This process's group."""
    return _exchange


def exchange_of(num_hosts: int, rank: int) -> Exchange | None:
    """The group that a request of `num_hosts` hosts uses; None for a single one. Raises StarError where it is none."""
    if num_hosts == 1:
        return None
    if _exchange is None or (_exchange.num_hosts, _exchange.rank) != (num_hosts, rank):
        formed = "none" if _exchange is None else f"host {_exchange.rank} of {_exchange.num_hosts}"
        raise StarError(
            f"a request for host {rank} of {num_hosts}; this process is {formed}. Send such requests through "
            "farspan.star.StarLLM, which forms the group."
        )
    return _exchange
