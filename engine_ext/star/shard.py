"""One host's share of a context under Star Attention: which keys each of its tokens sees, and where they truly stand.

The context is cut into blocks of `block_len` tokens; the anchor is its first `anchor_len` tokens. A host's request is
the prompt `anchor | own blocks | query`, with positions that count from 0 without a gap, as vLLM numbers them. Block 0
begins with the anchor itself, so its host has no copy in front. Own blocks are neighbours in the context: one distance
takes all of them from their positions in the request to their true ones. Source: Star Attention, arXiv 2411.17116.
"""

import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from farspan.engine_ext.errors import ConfigError

NAME = "farspan.star"
"""Of the option of one request that carries its shard, in `SamplingParams.extra_args`."""


class Segment(NamedTuple):
    """Adjacent tokens of a request that see the same keys before their own stretch. All positions are the request's."""

    begin: int
    end: int
    """The tokens are [begin, end)."""
    keys: tuple[tuple[int, int], ...]
    """Ranges of positions, ascending, that the last of the tokens sees on this host; none may be left."""
    is_causal: bool
    """Whether the tokens are themselves the last of the keys; otherwise all of them see all keys."""
    is_query: bool
    """Whether the tokens see other hosts' keys as well: query and generated tokens."""


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one host has of one request, whatever its tokens see in phase 1. All numbers but the ranks are in tokens.

    `StarShard` and `WindowShard` have the methods that are only declared here.
    """

    name: str
    """Of the request, the same on all hosts and never used twice."""
    context_len: int
    """Of the whole context; the query begins there."""
    num_hosts: int
    query_host: int
    """The host that alone keeps keys of the query."""
    rank: int

    if TYPE_CHECKING:

        def stretches(self) -> tuple[tuple[int, int], ...]:
            """What the host has of the context beside the copy, in the order of its request: true positions."""

        def segments(self, begin: int, end: int) -> Iterator[Segment]:
            """Cut the request's tokens [begin, end) where their keys change, in order."""

        def own_distances(self) -> Iterator[tuple[int, int, int]]:
            """All own tokens: (begin, end, distance from their positions in the request to the true ones)."""

        def own_page_keys(self, start: int) -> tuple[tuple[str, str], ...]:
            """`page_keys` of a page of the context."""

        def check_context(self, page_size: int) -> None:
            """The numbers that do not depend on the hosts."""

    @property
    def copied_len(self) -> int:
        """Tokens in front of the own ones: a copy of the anchor."""
        return 0

    @property
    def num_blocks(self) -> int:
        """Pieces of the context that the host has: its blocks, or its stretches."""
        return len(self.stretches())

    @property
    def own_len(self) -> int:
        return sum(stop - start for start, stop in self.stretches())

    @property
    def local_len(self) -> int:
        """Of the context in this request; the query begins there."""
        return self.copied_len + self.own_len

    @property
    def query_distance(self) -> int:
        """From the position of a query token in the request to its true one."""
        return self.context_len - self.local_len

    @property
    def has_query(self) -> bool:
        return self.rank == self.query_host

    def query_segment(self, begin: int, end: int) -> Segment:
        """The tokens [begin, end) of query and answer."""
        keys_end = end if self.has_query else self.local_len
        keys = ((self.copied_len, keys_end),) if self.copied_len < keys_end else ()
        return Segment(begin, end, keys, self.has_query, True)

    def distances(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """The tokens among [begin, end) that do not stand at their true positions: (begin, end, distance to add)."""
        for first, last, distance in (*self.own_distances(), (self.local_len, end, self.query_distance)):
            first, last = max(first, begin), min(last, end)
            if first < last and distance != 0:
                yield first, last, distance

    def page_keys(self, start: int) -> tuple[tuple[str, str], ...]:
        """What the hash of the page at position `start` has to hold beside its tokens; nothing where its KV is exact
        and all tokens before it are in the request. Pages of the query depend on what all hosts have: never shared.
        """
        if start >= self.local_len:
            return ((NAME, f"query of {self.name}"),)
        return self.own_page_keys(start)

    def step_digest(self, begin: int, end: int) -> bytes:
        """What all hosts must agree on before they compute the query's tokens among [begin, end) together."""
        first = max(begin - self.local_len, 0)
        return digest_of_text(f"{self.name} {first} {end - self.local_len}")

    def check(self, page_size: int, prompt_len: int | None = None) -> None:
        """Raise ConfigError unless the numbers describe a shard of whole pages.

        prompt_len: tokens of the prompt, where it is known: the host's context, alone or followed by a query.
        """
        self.check_context(page_size)
        if self.num_hosts < 1:
            self.refuse("num_hosts", "at least 1")
        for name in ("rank", "query_host"):
            if not 0 <= getattr(self, name) < self.num_hosts:
                self.refuse(name, f"a rank below num_hosts, which is {self.num_hosts}")
        self.check_own(page_size)
        if prompt_len is not None and prompt_len < self.local_len:
            raise ConfigError(
                f"{NAME}: a prompt of {prompt_len} tokens; allowed: the host's context of {self.local_len} tokens, "
                "alone or followed by the query. Send the tokens that the shard describes."
            )

    def check_own(self, page_size: int) -> None:
        """What this host has."""

    def check_pages(self, name: str, page_size: int, least: int) -> None:
        value = getattr(self, name)
        if value < least or value % page_size:
            self.refuse(name, f"a multiple of the page size, {page_size}, of at least {least}")

    def refuse(self, name: str, allowed: str) -> None:
        raise ConfigError(
            f"{NAME}.{name}={getattr(self, name)!r}; allowed: {allowed}. Shards are made by farspan.star.StarLLM."
        )


class StarShard(Shard, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A host's share where a block sees the anchor and itself. All numbers but the ranks are in tokens."""

    block_len: int
    anchor_len: int
    first_block: int
    num_blocks: int
    """Own blocks are [first_block, first_block + num_blocks); without any, the request is the query alone. The host of
    the last block is the query's."""

    @property
    def own_start(self) -> int:
        """True position of the first own token."""
        return self.first_block * self.block_len

    @property
    def own_len(self) -> int:
        return max(min(self.num_blocks * self.block_len, self.context_len - self.own_start), 0)

    def stretches(self) -> tuple[tuple[int, int], ...]:
        """One, or none: own blocks are neighbours."""
        return ((self.own_start, self.own_start + self.own_len),) if self.num_blocks else ()

    @property
    def copied_len(self) -> int:
        """Tokens in front of the own blocks: a copy of the anchor."""
        return self.anchor_len if self.first_block > 0 and self.num_blocks > 0 else 0

    @property
    def own_distance(self) -> int:
        """From the position of an own token in the request to its true one."""
        return self.own_start - self.copied_len if self.num_blocks > 0 else 0

    def check_context(self, page_size: int) -> None:
        """Blocks and anchor of whole pages, and blocks that the context has."""
        for name in ("context_len", "block_len", "anchor_len"):
            self.check_pages(name, page_size, page_size if name == "block_len" else 0)
        if self.anchor_len > self.block_len:
            self.refuse("anchor_len", f"at most block_len, which is {self.block_len}")
        num_blocks = -(-self.context_len // self.block_len)
        if not 0 <= self.first_block <= num_blocks:
            self.refuse("first_block", f"a whole number from 0 to {num_blocks}")
        if not 0 <= self.num_blocks <= num_blocks - self.first_block:
            self.refuse("num_blocks", f"a whole number from 0 to {num_blocks - self.first_block}")

    def check_own(self, page_size: int) -> None:
        """The query's host has the last block."""
        num_blocks = -(-self.context_len // self.block_len)
        has_last = self.num_blocks > 0 and self.first_block + self.num_blocks == num_blocks
        if self.context_len > 0 and self.has_query != has_last:
            self.refuse("query_host", "the rank of the host that has the last block")

    def segments(self, begin: int, end: int) -> Iterator[Segment]:
        """Cut the request's tokens [begin, end) where their keys change, in order."""
        while begin < end:
            if begin < self.copied_len:
                stop = min(end, self.copied_len)
                yield Segment(begin, stop, ((0, stop),), True, False)
            elif begin < self.local_len:
                block = (begin - self.copied_len) // self.block_len
                start = self.copied_len + block * self.block_len
                stop = min(end, start + self.block_len, self.local_len)
                is_first = self.first_block + block == 0
                anchor = () if is_first or self.anchor_len == 0 else ((0, self.anchor_len),)
                yield Segment(begin, stop, (*anchor, (start, stop)), True, False)
            else:
                stop = end
                yield self.query_segment(begin, stop)
            begin = stop

    def own_distances(self) -> Iterator[tuple[int, int, int]]:
        """One distance for all own blocks."""
        yield self.copied_len, self.local_len, self.own_distance

    def own_page_keys(self, start: int) -> tuple[tuple[str, str], ...]:
        """Pages of the anchor and of block 0 hold exact KV; those of other blocks depend on where the block begins."""
        if start < self.copied_len or (self.own_start == 0 and start < self.block_len):
            return ()
        return ((NAME, f"block {self.block_len} anchor {self.anchor_len} distance {self.own_distance}"),)


def digest_of_text(text: str) -> bytes:
    """At most 7 bytes, as `Exchange.agree` takes them."""
    return hashlib.blake2b(text.encode(), digest_size=7).digest()
