"""What a request to `StarLLM` gives: its answer, its times, and how far it is."""

from dataclasses import dataclass, field
from typing import Any

from farspan.engine_ext.star.shard import Shard
from farspan.star.protocol import Phase


@dataclass(frozen=True)
class StarTimes:
    """Where the time of one request went, in seconds, and what went between hosts."""

    phase_1_s: float
    """Reading the context; 0 with exact attention."""
    first_token_s: float
    """From when all hosts were up."""
    total_s: float
    token_s: list[float]
    """Between one token and the next, as the query's host had them."""
    exchanged_bytes: int
    """Received by all hosts from each other."""
    host_s: list[float]
    """Of each host, at work in phase 1."""
    restart_s: float
    """Spent on hosts that had to be replaced."""
    key_exchange_s: list[float] = field(default_factory=list)
    """Of each host, in phase 1: until it had the anchor that host 0 sends, or all hosts' keys; waiting included."""


@dataclass(frozen=True)
class StarOutput:
    """One answer."""

    token_ids: list[int]
    text: str
    """Empty without a tokenizer."""
    finish_reason: str | None
    output: Any
    """vLLM's RequestOutput of the query's host, whose prompt is that host's share."""
    shards: list[Shard] | None
    """Who had which blocks; None with exact attention on one host."""
    times: StarTimes
    num_prompt_tokens: int = 0
    """Of context and query."""


@dataclass(frozen=True)
class Progress:
    """How far a request is."""

    phase: Phase
    num_blocks_done: int
    num_blocks: int
    token_ids: list[int]
    """New tokens so far."""
