"""Whether requests have room on their hosts, and ask nothing that hosts with cold KV heads cannot do."""

from collections.abc import Sequence

from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.star.shard import Shard
from farspan.star.blocks import BlockSizes
from farspan.star.protocol import HostFacts
from farspan.star.work import Work


def check_offload(sizes: BlockSizes) -> None:
    """Raise ConfigError for what hosts with cold heads cannot do for each other: they send no pages."""
    if sizes.visibility == "all":
        raise ConfigError(
            "visibility='all' together with offload; allowed: 'star', as hosts gather each other's keys from GPU "
            "memory alone. Leave out offload, or visibility."
        )
    if sizes.anchor == "share":
        raise ConfigError(
            "anchor='share' together with offload; allowed: 'recompute' or 'auto', which is the same then: hosts "
            "send pages from GPU memory alone. Leave out anchor, or offload."
        )


def room_of(facts: Sequence[HostFacts], shards: Sequence[Shard] | None, context_len: int, query_len: int) -> int:
    """New tokens for which the fullest host has room. shards: None where host 0 has all of the context."""
    needs = [context_len] if shards is None else [shard.local_len for shard in shards]
    rooms = (min(each.max_model_len, each.cache_len) for each in facts)
    return min(room - need - query_len for need, room in zip(needs, rooms, strict=False))


def check_room(works: Sequence[Work], facts: Sequence[HostFacts], *, has_offload: bool) -> None:
    """Raise ConfigError unless every host's shares, the queries and the answers fit into its engine together."""
    for work in works:
        check_share(work, facts, has_offload=has_offload)
    if len(works) == 1:
        return
    for rank, each in enumerate(facts):
        total = sum(-(-work.need(rank) // each.page_size) * each.page_size for work in works)
        if total > each.cache_len:
            raise ConfigError(
                f"{len(works)} requests together need {total} tokens of KV cache on host {rank}; it has "
                f"{each.cache_len}. Ask fewer at a time."
            )


def check_share(work: Work, facts: Sequence[HostFacts], *, has_offload: bool) -> None:
    """Raise ConfigError unless every host's share of a request fits."""
    context_len, query_len, max_tokens = len(work.context), len(work.query), work.params.max_tokens
    needs = [context_len] if work.shards is None else [shard.local_len for shard in work.shards]
    for rank, (need, each) in enumerate(zip(needs, facts, strict=False)):
        total = work.need(rank)
        room = min(each.max_model_len, each.cache_len)
        if total > room:
            is_long = each.max_model_len <= each.cache_len
            limit = "max_model_len" if is_long else "tokens of KV cache"
            larger = "gpu_memory_utilization"
            if has_offload:
                limit = limit if is_long else "tokens that its host memory and GPU memory hold"
                larger = "offload.host_memory"
            raise ConfigError(
                f"host {rank} needs {total} tokens: {need} of the context ({context_len} in all), {query_len} of "
                f"the query and {max_tokens} new ones; it has {room} ({limit}). Use more hosts, a larger "
                f"max_model_len or {larger}, or smaller blocks and a smaller anchor."
            )
