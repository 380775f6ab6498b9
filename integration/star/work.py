"""One request to `StarLLM` between its plan and its output."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from farspan.engine_ext.star.shard import Shard, StarShard
from farspan.star.arguments import sampling_params
from farspan.star.output import StarOutput, StarTimes
from farspan.star.protocol import Answer, Ask, HostStatus


@dataclass
class Work:
    """One request, and what came of it so far."""

    name: str
    context: list[int]
    query: list[int]
    params: Any
    shards: Sequence[Shard] | None
    """None: exact attention on host 0."""
    shares_anchor: bool
    first: dict[int, Answer] = field(default_factory=dict)
    """Of phase 1, by rank."""
    second: dict[int, Answer] = field(default_factory=dict)
    """Of phase 2, or of exact attention."""
    phase_1_s: float = 0.0

    @property
    def num_blocks(self) -> int:
        return sum(shard.num_blocks for shard in self.shards or ())

    def need(self, rank: int) -> int:
        """Tokens of the request on a host, the answer included."""
        if self.shards is None:
            own = len(self.context) if rank == 0 else 0
        else:
            own = self.shards[rank].local_len
        return own + len(self.query) + self.params.max_tokens

    def first_ask(self, shard: Shard, attempt: int) -> Ask:
        """Phase 1 on a host, with the request's own options, by which phase 2 finds its pages.

        A second attempt needs no other host's anchor.
        """
        params = sampling_params(max_tokens=1, temperature=0.0, ignore_eos=True, extra_args=self.params.extra_args)
        shares = self.shares_anchor and attempt == 0
        # Names of requests are used once in an engine.
        name = f"{self.name}-1-{attempt}"
        return Ask(name, "phase 1", host_context(self.context, shard), params, shard, shares)

    def second_ask(self, rank: int) -> Ask:
        """Phase 2 on a host."""
        assert self.shards is not None
        shard = self.shards[rank]
        prompt = host_context(self.context, shard) + self.query
        return Ask(f"{self.name}-2", "phase 2", prompt, self.params, shard)

    def output(self, total_s: float, restart_s: float, num_hosts: int) -> StarOutput:
        """What the user gets, once phase 2 has its answers; times in seconds."""
        answer = self.second[0 if self.shards is None else self.shards[0].query_host]
        completion = answer.output.outputs[0]
        first = [self.first.get(rank) for rank in range(num_hosts)]
        times = StarTimes(
            phase_1_s=self.phase_1_s,
            first_token_s=self.phase_1_s + answer.token_s[0],
            total_s=total_s,
            token_s=[late - early for early, late in itertools.pairwise(answer.token_s)],
            exchanged_bytes=sum(each.num_bytes for each in (*self.first.values(), *self.second.values())),
            key_exchange_s=[each.key_exchange_s if each else 0.0 for each in first],
            host_s=[each.seconds if each else 0.0 for each in first],
            restart_s=restart_s,
        )
        return StarOutput(
            token_ids=list(completion.token_ids),
            text=completion.text,
            finish_reason=completion.finish_reason,
            output=answer.output,
            shards=None if self.shards is None else list(self.shards),
            times=times,
            num_prompt_tokens=len(self.context) + len(self.query),
        )


def host_context(context: list[int], shard: Shard) -> list[int]:
    """What a host reads of the context: a copy of the anchor, if it has one, and its blocks."""
    return context[: shard.copied_len] + [token for start, stop in shard.stretches() for token in context[start:stop]]


def blocks_done(shard: Shard, status: HostStatus) -> int:
    """Own blocks that a host in phase 1 has read."""
    if status.phase != "phase 1":
        return 0
    own = max(status.num_computed_tokens - shard.copied_len, 0)
    if own >= shard.own_len:
        return shard.num_blocks
    return own // shard.block_len if isinstance(shard, StarShard) else own * shard.num_blocks // shard.own_len


def tokens_of_status(status: HostStatus | None) -> list[int]:
    return status.token_ids if status is not None else []
