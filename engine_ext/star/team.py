"""The ranks of one host: with tensor parallelism each has a group of its own with the same rank of the other hosts.

What a host agrees on with others is one decision: its first rank makes it and tells the rest, or ranks of one host
could begin different steps and wait for each other for ever.
"""

from typing import Any, Protocol

import msgspec
from farspan.engine_ext.errors import StarError


class StarAborted(StarError):
    """All hosts end a request together, at the same step."""


class HostMissing(StarError):
    """A host did not take part in what all hosts do, or lost the connection to another one; they may meet again."""


def error_of(kind: str, sentence: str) -> StarError:
    """An error of another rank. kind: the name of its class."""
    kinds = {each.__name__: each for each in (StarAborted, HostMissing)}
    return kinds.get(kind, StarError)(sentence)


class Agreement(msgspec.Struct, frozen=True, tag=True):
    """What came of a step's agreement of all hosts."""

    step: int
    digest: bytes
    numbers: list[int] = []
    """By host; empty after an error."""
    error: str = ""
    kind: str = ""
    """Of the error, see `error_of`."""

    def numbers_or_raise(self) -> list[int]:
        """Raises StarError, StarAborted or HostMissing where hosts did not agree."""
        if self.error:
            raise error_of(self.kind, self.error)
        return self.numbers


class Team(Protocol):
    """How the first rank of a host tells the others."""

    is_leader: bool

    def share(self, agreement: Agreement | None) -> Agreement:
        """What the leader gives, on all ranks; the others give None and wait."""
        ...


class RankTeam:
    """The tensor-parallel ranks of an engine, over vLLM's own queue between them."""

    def __init__(self, group: Any) -> None:
        """group: of vLLM, `get_tp_group()`."""
        self.group = group
        self.is_leader = group.rank_in_group == 0

    def share(self, agreement: Agreement | None) -> Agreement:
        """See `Team`. Ranks that wait for a dead one end with their engine, which is nobody's without it."""
        shared: Agreement = self.group.broadcast_object(agreement, src=0)
        return shared
