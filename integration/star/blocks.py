"""How a context is cut and who gets which blocks: by cost, neighbours together, so that each host has one stretch."""

from collections.abc import Sequence
from dataclasses import dataclass

from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.star.shard import StarShard

DEFAULT_SHARE = 4
"""Blocks of a context where the user names no size: the paper's tables have N/4."""


@dataclass(frozen=True)
class BlockSizes:
    """What the user asks for; None for the default. In tokens."""

    block_len: int | None = None
    anchor_len: int | None = None

    def check(self, page_size: int) -> None:
        """Raise ConfigError unless both are whole pages and the anchor fits into a block."""
        for name, value, least in (("block_len", self.block_len, page_size), ("anchor_len", self.anchor_len, 0)):
            if value is not None and (value < least or value % page_size):
                raise ConfigError(
                    f"{name}={value!r}; allowed: a multiple of the page size, {page_size} tokens, of at least {least}. "
                    f"Use {max(round(value / page_size) * page_size, least)}."
                )
        if self.block_len is not None and self.anchor_len is not None and self.anchor_len > self.block_len:
            raise ConfigError(
                f"anchor_len={self.anchor_len}; allowed: at most block_len, which is {self.block_len}: the anchor is "
                "the start of the first block. Lower anchor_len or raise block_len."
            )


def plan_shards(
    name: str, num_tokens: int, num_hosts: int, page_size: int, sizes: BlockSizes, linear_pairs: float
) -> list[StarShard] | None:
    """The shard of every host, or None where exact attention on one host does the same.

    num_tokens: of the context, whole pages. linear_pairs: pairs of a query and a key whose attention costs as much as
    the linear layers of one token.
    """
    assert num_tokens % page_size == 0
    block_len = sizes.block_len or default_block_len(num_tokens, num_hosts, page_size)
    if num_tokens <= block_len or (num_hosts == 1 and sizes.block_len is None):
        return None
    anchor_len = block_len if sizes.anchor_len is None else min(sizes.anchor_len, block_len)
    counts = assign_blocks(block_lens(num_tokens, block_len), num_hosts, anchor_len, linear_pairs)
    query_host = max(rank for rank, count in enumerate(counts) if count)
    shards, first = [], 0
    for rank, count in enumerate(counts):
        shards.append(
            StarShard(
                name=name,
                context_len=num_tokens,
                block_len=block_len,
                anchor_len=anchor_len,
                first_block=first,
                num_blocks=count,
                num_hosts=num_hosts,
                query_host=query_host,
                rank=rank,
            )
        )
        first += count
    return shards


def shards_of_one(name: str, num_tokens: int, num_hosts: int, page_size: int) -> list[StarShard]:
    """All of a context on host 0, where other hosts have to take part all the same: they bring no keys."""
    return [
        StarShard(
            name=name,
            context_len=num_tokens,
            block_len=max(num_tokens, page_size),
            anchor_len=0,
            first_block=0,
            num_blocks=int(rank == 0 and num_tokens > 0),
            num_hosts=num_hosts,
            query_host=0,
            rank=rank,
        )
        for rank in range(num_hosts)
    ]


def default_block_len(num_tokens: int, num_hosts: int, page_size: int) -> int:
    """A quarter of the context or a host's even share, whichever is smaller, so that every host has a block."""
    num_pages = num_tokens // page_size
    parts = max(DEFAULT_SHARE, num_hosts)
    pages = -(-num_pages // parts)
    if -(-num_pages // pages) < num_hosts:
        pages = num_pages // parts
    return max(pages, 1) * page_size


def block_lens(num_tokens: int, block_len: int) -> list[int]:
    """Lengths of the blocks in tokens; only the last may be shorter."""
    return [min(block_len, num_tokens - start) for start in range(0, num_tokens, block_len)]


def assign_blocks(
    lens: Sequence[int], num_hosts: int, anchor_len: int, linear_pairs: float, *, copies_anchor: bool = True
) -> list[int]:
    """How many blocks each host has, in order, so that the busiest host has as little to do as can be.

    copies_anchor: whether hosts behind the first also compute the anchor. Each has a block as long as there are any.
    """
    num_blocks = len(lens)
    used = min(num_hosts, num_blocks)
    costs = [cost_of(length, anchor_len if at else 0, linear_pairs) for at, length in enumerate(lens)]
    copy = cost_of(anchor_len, 0, linear_pairs) if copies_anchor else 0.0

    def fill(most: float) -> list[int] | None:
        """Counts with no host above `most`, each host taking what it can; None where there are none."""
        counts, at = [], 0
        for host in range(used):
            total, first = (copy if host else 0.0) + costs[at], at
            at += 1
            # Every host behind this one needs a block.
            while at < num_blocks - (used - host - 1) and total + costs[at] <= most:
                total += costs[at]
                at += 1
            if total > most:
                return None
            counts.append(at - first)
        return counts if at == num_blocks else None

    low, high = 0.0, sum(costs) + copy
    counts = fill(high)
    assert counts is not None
    while low < (middle := (low + high) / 2) < high:
        filled = fill(middle)
        if filled is None:
            low = middle
        else:
            high, counts = middle, filled
    return counts + [0] * (num_hosts - used)


def cost_of(block_len: int, anchor_len: int, linear_pairs: float) -> float:
    """Work of one block, in pairs of a query and a key."""
    return block_len * (linear_pairs + anchor_len + block_len / 2)
