"""What the coordinator and the hosts tell each other."""

from dataclasses import dataclass, field
from typing import Any, Literal

from farspan.engine_ext.errors import StarError
from farspan.engine_ext.star.shard import Shard
from farspan.engine_ext.star.windows import WindowShard

Phase = Literal["phase 1", "phase 2", "exact attention"]


class EngineGone(StarError):
    """A process of a host's engine is dead, or does not answer: the host is lost."""


class RanksApart(StarError):
    """A collective failed inside a step of a host with several GPUs: they cannot go on together."""


class OfRanks:
    """Something with the arguments of a host's engine."""

    engine: dict[str, Any]

    @property
    def num_ranks(self) -> int:
        """GPUs of a host, by tensor parallelism."""
        return int(self.engine.get("tensor_parallel_size", 1))


@dataclass(frozen=True)
class HostSetup(OfRanks):
    """How a host's engine is made."""

    rank: int
    num_hosts: int
    model: str
    device_type: Literal["cpu", "cuda"]
    timeout_s: float
    start_timeout_s: float
    graphs: bool
    """Whether decode runs in CUDA graphs that hold the exchange."""
    gathers_keys: bool
    """Whether memory is kept for all hosts' keys of one layer."""
    options: dict[str, Any]
    """additional_config["farspan"]."""
    engine: dict[str, Any] = field(default_factory=dict)
    """More arguments of `LLM`."""
    host_bytes: int | None = None
    """Host memory for KV of each rank, where this host replaces one that had as much."""


@dataclass(frozen=True)
class HostFacts:
    """What a started host knows that the others plan by."""

    page_size: int
    """Tokens."""
    max_model_len: int
    """Tokens of one request on the host."""
    cache_len: int
    """Tokens that the host's KV cache holds."""
    vocab_size: int
    linear_pairs: float
    """Pairs of a query and a key whose attention costs as much as the linear layers of one token."""
    chunk_len: int
    """Tokens of a prompt that a step computes at most."""
    start_s: float
    host_bytes: int | None = None
    """Host memory for KV of each rank; None without cold heads."""


@dataclass(frozen=True)
class HostRates:
    """What a host measured, by which it is chosen whether the anchor is sent or computed anew."""

    send_token_s: float
    """Seconds to send all layers' keys and values of a token from host 0 to all others."""
    compute_token_s: float
    """Seconds of the linear layers of a token, as far as multiplying matrices takes."""


@dataclass(frozen=True)
class Ask:
    """One request, or one phase of it, for one host."""

    name: str
    phase: Phase
    prompt: list[int]
    sampling: Any
    """vLLM's SamplingParams, without our options."""
    shard: Shard | None
    shares_anchor: bool = False
    """Phase 1: host 0 sends the anchor, which the others do not compute."""
    others: tuple["Ask", ...] = ()
    """Phase 2: requests that are answered together with this one, in the same order on all hosts."""
    timeout_s: float | None = None
    """How long hosts wait for each other; as in HostSetup if None. The first request compiles, and takes longer."""

    @property
    def is_lockstep(self) -> bool:
        """Whether every step of it is one of all hosts."""
        return self.phase == "phase 2" or isinstance(self.shard, WindowShard)


@dataclass(frozen=True)
class Answer:
    """What a host made of an Ask."""

    output: Any
    """vLLM's RequestOutput; None where the request was aborted."""
    seconds: float
    token_s: list[float]
    """Seconds from the start to each new token."""
    num_cached_tokens: int
    num_bytes: int
    """Received from other hosts."""
    key_exchange_s: float
    """In exchanges of keys, the wait for other hosts included."""
    others: tuple["Answer", ...] = ()
    """Of `Ask.others`; seconds and bytes are told once for all."""


@dataclass(frozen=True)
class HostStatus:
    """How far a host is; answered while it works."""

    phase: Phase | None
    """None while it waits for work."""
    num_steps: int
    """Since it started; a host at work whose number stands still makes no progress."""
    num_computed_tokens: int
    """Of the running request's prompt and output on this host."""
    token_ids: list[int]
    """New tokens of the running request so far."""
    waits_for_all: bool = False
    """Whether the host stands still where another one does."""
