"""A batch cut into runs: adjacent requests that decode, or that prefill alike. Plain Python, on the host."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from farspan.engine_ext.config import Prefill


def count_decodes(query_lens: list[int], most_tokens: int = 1) -> int:
    """Leading requests with at most so many query tokens: those that decode."""
    for request, query_len in enumerate(query_lens):
        if query_len > most_tokens:
            return request
    return len(query_lens)


class ChunkKind(NamedTuple):
    """What must be alike in requests that one pass serves."""

    prefill: Prefill
    turns: bool
    misses_pages: bool
    """Whether pages of cold heads are in no slot."""


@dataclass(frozen=True)
class Run:
    """Adjacent requests [first, stop) of a batch that prefill alike."""

    first: int
    stop: int
    kind: ChunkKind
    first_row: int
    """Of the first request's query tokens in the step."""
    query_start_loc: list[int]
    """Of the run alone, from 0."""
    kv_lens: list[int]

    def split(self, page_size: int, max_pages: int) -> Iterator["Run"]:
        """Cut the run so that the pages of each part are no more than `max_pages`, or those of one request."""
        first, num_pages = 0, 0
        for place, kv_len in enumerate(self.kv_lens):
            pages = -(-kv_len // page_size)
            if place > first and num_pages + pages > max_pages:
                yield self.part(first, place)
                first, num_pages = place, 0
            num_pages += pages
        yield self.part(first, len(self.kv_lens))

    def part(self, first: int, stop: int) -> "Run":
        """The requests [first, stop) of the run."""
        start = self.query_start_loc[first]
        return Run(
            self.first + first,
            self.first + stop,
            self.kind,
            self.first_row + start,
            [each - start for each in self.query_start_loc[first : stop + 1]],
            self.kv_lens[first:stop],
        )


@dataclass(frozen=True)
class HostChunks:
    """The requests of a batch that prefill, as the host knows them."""

    query_start_loc: list[int]
    """Of the whole batch."""
    kv_lens: list[int]
    kinds: dict[int, ChunkKind]
    """By request; padding, which has no tokens, is left out."""

    def runs(self, alike: Callable[[ChunkKind], Any]) -> Iterator[Run]:
        """Adjacent requests for which `alike` is the same."""
        for _, members in groupby(self.kinds, key=lambda request: alike(self.kinds[request])):
            requests = list(members)
            first, stop = requests[0], requests[-1] + 1
            first_row = self.query_start_loc[first]
            starts = [start - first_row for start in self.query_start_loc[first : stop + 1]]
            yield Run(first, stop, self.kinds[first], first_row, starts, self.kv_lens[first:stop])
