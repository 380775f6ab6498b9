"""How a context is cut and who gets which blocks: by cost, neighbours together, so that each host has one stretch."""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.star.shard import StarShard
from farspan.engine_ext.star.windows import WindowShard

DEFAULT_SHARE = 4
"""Blocks of a context where the user names no size: the paper's tables have N/4."""


Anchor = Literal["auto", "share", "recompute"]
Visibility = Literal["star", "all"]


@dataclass(frozen=True)
class BlockSizes:
    """What the user asks for; None for the default. In tokens."""

    block_len: int | None = None
    anchor_len: int | None = None
    anchor: Anchor = "auto"
    visibility: Visibility = "star"

    def changed(
        self, block_len: int | None, anchor_len: int | None, anchor: Anchor | None, visibility: Visibility | None
    ) -> "BlockSizes":
        """With what one request asks for; what it leaves open stays, but for blocks where it has none.

        Raises ConfigError for blocks where every token sees all before it.
        """
        merged = BlockSizes(
            self.block_len if block_len is None else block_len,
            self.anchor_len if anchor_len is None else anchor_len,
            self.anchor if anchor is None else anchor,
            self.visibility if visibility is None else visibility,
        )
        merged.check_choices()
        if merged.visibility == "all":
            given = {"block_len": block_len, "anchor_len": anchor_len, "anchor": anchor}
            for name, value in given.items():
                if value is not None:
                    raise ConfigError(
                        f"{name}={value!r}; allowed: only with visibility='star'. With 'all' every token sees all "
                        "before it, so that there are no blocks and no anchor. Leave it out."
                    )
        return merged

    def check_choices(self) -> None:
        """Raise ConfigError for words that mean nothing."""
        for name, value, words in (
            ("anchor", self.anchor, get_args(Anchor)),
            ("visibility", self.visibility, get_args(Visibility)),
        ):
            if value not in words:
                raise ConfigError(f"{name}={value!r}; allowed: {', '.join(map(repr, words))}.")

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
    name: str,
    num_tokens: int,
    num_hosts: int,
    page_size: int,
    sizes: BlockSizes,
    linear_pairs: float,
    *,
    sending_chunk_len: int | None = None,
) -> list[StarShard] | None:
    """The shard of every host, or None where exact attention on one host does the same.

    num_tokens: of the context, whole pages. linear_pairs: pairs of a query and a key whose attention costs as much as
    the linear layers of one token. sending_chunk_len: tokens of a step, where host 0 sends the anchor in the one that
    ends it; None where each host computes it.
    """
    assert num_tokens % page_size == 0
    block_len = sizes.block_len or default_block_len(num_tokens, num_hosts, page_size)
    if num_tokens <= block_len or (num_hosts == 1 and sizes.block_len is None):
        return None
    anchor_len = block_len if sizes.anchor_len is None else min(sizes.anchor_len, block_len)
    waited_len = anchor_len if sending_chunk_len is None else max(anchor_len - sending_chunk_len, 0)
    lens = block_lens(num_tokens, block_len)
    counts = assign_blocks(lens, num_hosts, anchor_len, linear_pairs, waited_len=waited_len)
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


def window_shards(
    name: str, context: Sequence[int], num_hosts: int, page_size: int, chunk_len: int
) -> list[WindowShard]:
    """The shard of every host where every token sees all before it. context: of `windowed_len` tokens."""
    digest = hashlib.blake2b(array("q", context).tobytes(), digest_size=16).hexdigest()
    return [
        WindowShard(
            name=name,
            context_len=len(context),
            window_len=num_hosts * chunk_len,
            page_size=page_size,
            context=digest,
            num_hosts=num_hosts,
            query_host=num_hosts - 1,
            rank=rank,
        )
        for rank in range(num_hosts)
    ]


def windowed_len(num_tokens: int, num_hosts: int, page_size: int, chunk_len: int) -> int:
    """How much of a context of whole pages is cut into windows: in the last one every part needs a page.

    chunk_len: most tokens of a step of one host. Raises ConfigError where a window would not have equal parts.
    """
    if chunk_len % (2 * page_size):
        raise ConfigError(
            f"max_num_batched_tokens={chunk_len} with visibility='all'; allowed: multiples of two pages, "
            f"{2 * page_size} tokens. Use {max(chunk_len // (2 * page_size), 1) * 2 * page_size}."
        )
    rest = num_tokens % (num_hosts * chunk_len)
    return num_tokens - rest if rest < 2 * num_hosts * page_size else num_tokens


def sharing_pays(send_token_s: float, compute_token_s: float) -> bool:
    """Whether an anchor is sooner there if host 0 sends it than if each host computes it.

    send_token_s: seconds to send a token's keys and values; compute_token_s: of its linear layers, to which attention
    only adds.
    """
    return send_token_s < compute_token_s


def block_lens(num_tokens: int, block_len: int) -> list[int]:
    """Lengths of the blocks in tokens; only the last may be shorter."""
    return [min(block_len, num_tokens - start) for start in range(0, num_tokens, block_len)]


def assign_blocks(
    lens: Sequence[int], num_hosts: int, anchor_len: int, linear_pairs: float, *, waited_len: int | None = None
) -> list[int]:
    """How many blocks each host has, in order, so that the busiest host has as little to do as can be.

    waited_len: tokens of the anchor that hosts behind the first compute, or wait for; None for all. Each has a block as
    long as there are any.
    """
    num_blocks = len(lens)
    used = min(num_hosts, num_blocks)
    costs = [cost_of(length, anchor_len if at else 0, linear_pairs) for at, length in enumerate(lens)]
    copy = cost_of(anchor_len if waited_len is None else waited_len, 0, linear_pairs)

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
