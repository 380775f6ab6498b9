"""Ring attention, the exact peer of Star Attention: keys and values go around the hosts while each attends to the last.

The sequence is cut into two parts a host, and host r of H has parts r and 2H - 1 - r ("zigzag"), so that every step of
the ring costs all hosts the same. A step's exchange runs beside its attention; partial results are combined by their
LSE. Simple on purpose: whole blocks, no fusion, prefill only. Source: Ring Attention, arXiv 2310.01889.
"""

import contextlib
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist

from benchmarks.plain_llama import Attend, Merged, PlainLlama, partial_attention
from benchmarks.worker_process import WorkerProcess

LOCALHOST = "127.0.0.1"


def part_bounds(num_tokens: int, num_hosts: int) -> list[int]:
    """Where the 2 * num_hosts parts begin, and the end; they differ by a token at most."""
    return [index * num_tokens // (2 * num_hosts) for index in range(2 * num_hosts + 1)]


def positions_of(rank: int, num_tokens: int, num_hosts: int) -> torch.Tensor:
    """Positions [num_own_tokens] of a host's tokens, ascending."""
    bounds = part_bounds(num_tokens, num_hosts)
    late = 2 * num_hosts - 1 - rank
    return torch.cat([torch.arange(bounds[part], bounds[part + 1]) for part in (rank, late)])


class Ring:
    """This process's place in the ring: the default group of torch.distributed."""

    def __init__(self, num_tokens: int, scale: float) -> None:
        """num_tokens: of the whole sequence, at least two a host. scale: factor on the logits."""
        self.rank, self.num_hosts = dist.get_rank(), dist.get_world_size()
        self.scale = scale
        self.bounds = part_bounds(num_tokens, self.num_hosts)
        self.num_bytes = 0
        """Received from the other hosts so far."""

    def early_len(self, rank: int) -> int:
        """Tokens of the first of a host's two parts."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def own_len(self, rank: int) -> int:
        late = 2 * self.num_hosts - 1 - rank
        return self.early_len(rank) + self.bounds[late + 1] - self.bounds[late]

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Causal attention of the own tokens over the whole sequence; an `Attend`, called by all hosts alike.

        query: [num_own_tokens, num_q_heads, head_dim]; key, value: [num_own_tokens, num_kv_heads, head_dim].
        """
        merged = Merged(query)
        held = torch.stack((key, value))
        early = self.early_len(self.rank)
        for step in range(self.num_hosts):
            source = (self.rank - step) % self.num_hosts
            following, works = None, []
            if step + 1 < self.num_hosts:
                following = held.new_empty(2, self.own_len((source - 1) % self.num_hosts), *held.shape[2:])
                works = self.pass_on(held, following)
            keys, values = held
            if source == self.rank:
                merged.add(*partial_attention(query, keys, values, self.scale, causal=True))
            elif source < self.rank:
                # Its early part lies before both of ours, its late one behind both.
                end = self.early_len(source)
                merged.add(*partial_attention(query, keys[:end], values[:end], self.scale, causal=False))
            else:
                # Both of its parts lie between ours.
                rows = slice(early, None)
                merged.add(*partial_attention(query[rows], keys, values, self.scale, causal=False), rows)
            for work in works:
                work.wait()
            if following is not None:
                self.num_bytes += following.numel() * following.element_size()
                held = following
        return merged.out.to(query.dtype)

    def pass_on(self, held: torch.Tensor, following: torch.Tensor) -> list[Any]:
        """Start to send what we hold to the next host, and to receive from the one before."""
        after, before = (self.rank + 1) % self.num_hosts, (self.rank - 1) % self.num_hosts
        return dist.batch_isend_irecv([dist.P2POp(dist.isend, held, after), dist.P2POp(dist.irecv, following, before)])


@dataclass(frozen=True)
class RingSpec:
    """The model of a ring; every host has all of its weights."""

    model: dict[str, Any]
    """config.json."""
    dtype: torch.dtype
    timeout_s: float = 120.0
    """For one exchange."""


@dataclass(frozen=True)
class RingAnswer:
    """What one host made of a prompt."""

    prefill_ms: list[float]
    """From the tokens to the first new token's logits, once a repeat."""
    num_bytes: int
    """Received from the other hosts by one prefill."""
    positions: list[int]
    hidden: Any = None
    """Final hidden states [num_own_tokens, hidden_size] as a NumPy array of float32; only where asked for."""


@dataclass
class RingHosts:
    """Hosts of a ring as processes of this machine, one GPU each where there are GPUs."""

    spec: RingSpec
    num_hosts: int
    deadline: float
    """Of time.monotonic()."""
    workers: list[WorkerProcess] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.store = dist.TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False)
        with ExitStack() as stack:
            for rank in range(self.num_hosts):
                arguments = [str(rank), str(self.num_hosts), str(self.store.port)]
                worker = WorkerProcess(f"ring host {rank}", "benchmarks.ring_worker", arguments, {}, self.deadline)
                self.workers.append(stack.enter_context(worker))
                worker.send(self.spec)
            self.stack = stack.pop_all()
        return self

    def wait(self) -> None:
        """Return when all hosts have met. Raises BenchmarkError with the log of one that failed."""
        for worker in self.workers:
            worker.receive()

    def prefill(self, tokens: torch.Tensor, repeats: int, returns_hidden: bool = False) -> list[RingAnswer]:
        """Read a prompt [num_tokens] int64 on all hosts; their answers by rank."""
        for worker in self.workers:
            # A tensor would go through shared memory, with a key that a `python -m` process lacks.
            worker.send((tokens.tolist(), repeats, returns_hidden))
        return [worker.receive() for worker in self.workers]

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)


@contextlib.contextmanager
def joined(rank: int, num_hosts: int, port: int, timeout_s: float) -> Iterator[torch.device]:
    """Be a host: the default group, NCCL with a GPU of its own or gloo."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    store = dist.TCPStore(LOCALHOST, port, is_master=False)
    dist.init_process_group(
        "gloo" if device.type == "cpu" else "nccl",
        store=store, rank=rank, world_size=num_hosts, timeout=timedelta(seconds=timeout_s),
    )  # fmt: skip
    try:
        yield device
    finally:
        dist.destroy_process_group()


def prefill(model: PlainLlama, tokens: torch.Tensor, repeats: int, returns_hidden: bool) -> RingAnswer:
    """One host's part of a prompt, `repeats` times."""
    ring = Ring(len(tokens), model.scale)
    positions = positions_of(ring.rank, len(tokens), ring.num_hosts)
    mine, attend = tokens[positions], ring.attend
    times = []
    for _ in range(repeats):
        ring.num_bytes = 0
        times.append(timed(model, mine, positions, attend, ring.rank == 0))
    num_bytes = ring.num_bytes
    hidden = model.forward(mine, positions, attend).float().cpu().numpy() if returns_hidden else None
    return RingAnswer(times, num_bytes, positions.tolist() if returns_hidden else [], hidden)


def timed(model: PlainLlama, tokens: torch.Tensor, positions: torch.Tensor, attend: Attend, has_last: bool) -> float:
    """Milliseconds of a prefill. has_last: whether the sequence's last token is ours, whose logits are then made."""
    # A collective, so that all hosts begin together.
    dist.all_reduce(torch.zeros(1, device=model.device))
    synchronize(model.device)
    started = time.perf_counter()
    hidden = model.forward(tokens, positions, attend)
    if has_last:
        model.logits(hidden[-1:]).argmax().item()
    synchronize(model.device)
    return (time.perf_counter() - started) * 1e3


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
