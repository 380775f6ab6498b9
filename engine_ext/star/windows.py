"""One host's share of a context that all of it is exact for: every token sees all before it, wherever they are.

The context is cut into windows of one chunk a host, and a window into two parts a host: host i has parts i and
2H - 1 - i of H hosts, so that all of them have as many pairs of query and key in every step. Before a layer attends,
the hosts gather each other's keys up to the window's end; afterwards each keeps its own alone.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, Literal

import msgspec
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.star.shard import NAME, Segment, Shard, StarShard, digest_of_text


class WindowShard(Shard, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A host's share where every token sees all before it. All numbers but the ranks are in tokens."""

    visibility: Literal["all"] = "all"
    window_len: int
    """Of all hosts together: each has one chunk of a window, the last window is shorter."""
    page_size: int
    context: str
    """A digest of the context's tokens: a host does not have the ones that its KV depends on."""

    def stretches(self) -> tuple[tuple[int, int], ...]:
        """Two of each window."""
        return self.stretches_on(self.rank)

    def stretches_on(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Those of any host."""
        return stretches_of(self.context_len, self.window_len, self.page_size, self.num_hosts, rank)

    def own_distances(self) -> Iterator[tuple[int, int, int]]:
        """Each stretch has its own."""
        begin = 0
        for start, stop in self.stretches():
            yield begin, begin + stop - start, start - begin
            begin += stop - start

    def chunk_pieces(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The request's tokens [begin, end), all of the context, cut into stretches: (tokens, true end)."""
        pieces = []
        for first, last, distance in self.own_distances():
            first, last = max(first, begin), min(last, end)
            if first < last:
                pieces.append((last - first, last + distance))
        return pieces

    def is_start(self, ends: Sequence[int]) -> bool:
        """Whether the first `ends[rank]` tokens of the hosts are together the start of the context, with no gap."""
        last = 0
        for rank, end in enumerate(ends):
            begin = 0
            for start, stop in self.stretches_on(rank):
                if begin < end:
                    last = max(last, start + min(end - begin, stop - start))
                begin += stop - start
            if end > begin:
                return False
        return sum(ends) == last

    def places(self) -> list[tuple[int, int]]:
        """Where the pages of the context are, in its order: (rank, page of that host's request)."""
        found: dict[int, tuple[int, int]] = {}
        for rank in range(self.num_hosts):
            own = 0
            for start, stop in self.stretches_on(rank):
                for page in range(start // self.page_size, stop // self.page_size):
                    found[page] = rank, own
                    own += 1
        return [found[page] for page in range(len(found))]

    def segments(self, begin: int, end: int) -> Iterator[Segment]:
        """Query tokens alone: those of the context see keys of other hosts, which no range of the request describes."""
        assert begin >= self.local_len
        if begin < end:
            yield self.query_segment(begin, end)

    def own_page_keys(self, start: int) -> tuple[tuple[str, str], ...]:
        """Exact KV of neighbours from the start on is that of any request; other pages are this context's alone."""
        first, stop = self.stretches()[0]
        if first == 0 and start < stop:
            return ()
        return ((NAME, f"all {self.context} window {self.window_len} host {self.rank} of {self.num_hosts}"),)

    def window_digest(self, begin: int) -> bytes:
        """What all hosts must agree on before a step of the context from its token `begin` on."""
        return digest_of_text(f"{self.name} window {begin * self.num_hosts // self.window_len}")

    def check_context(self, page_size: int) -> None:
        """Whole pages, at least one for each part of each window."""
        if self.page_size != page_size:
            self.refuse("page_size", f"the engine's, {page_size}")
        least = 2 * max(self.num_hosts, 1) * page_size
        self.check_pages("context_len", page_size, least)
        if self.window_len < least or self.window_len % least:
            self.refuse("window_len", f"a multiple of {least}: two pages a host")
        rest = self.context_len % self.window_len
        if 0 < rest < least:
            self.refuse("context_len", f"with {least} tokens or more in the last window")


@lru_cache(maxsize=1024)
def stretches_of(
    context_len: int, window_len: int, page_size: int, num_hosts: int, rank: int
) -> tuple[tuple[int, int], ...]:
    """See `WindowShard.stretches_on`."""
    found = []
    for start in range(0, context_len, window_len):
        pages = min(window_len, context_len - start) // page_size
        for part in (rank, 2 * num_hosts - 1 - rank):
            first, stop = (start + pages * edge // (2 * num_hosts) * page_size for edge in (part, part + 1))
            found.append((first, stop))
    return tuple(found)


def decode_shard(raw: Any) -> Shard:
    """Decode the value of the request option. Raises ConfigError naming what is malformed."""
    kind = WindowShard if isinstance(raw, dict) and raw.get("visibility") == "all" else StarShard
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{NAME}: {error}. Shards are made by farspan.star.StarLLM.") from error
