"""Queries and keys at their true positions: vLLM rotates by a token's place in the request, which a shard shifts.

One more rotation by a constant distance makes up for it, on the queries and on the keys before they are written. So
pages hold keys at true positions, and no kernel needs to know of a shift.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from farspan.engine_ext.string import Rotation
from farspan.kernels.rotary_turn import Turn, make_turn

MAX_KEPT = 256
"""Turns kept of one rotation: two for each request that runs."""


class Turns:
    """Turns of all keys by whole distances, for the layers that rotate alike; each distance is computed once."""

    def __init__(self, rotation: Rotation, device: torch.device) -> None:
        self.rotation, self.device = rotation, device
        self.made: dict[int, Turn] = {}
        self.rows: Turn | None = None
        """Angles of single rows, [max_rows, rotary_dim / 2], which stay where they are; None unless made."""

    def of(self, distance: int) -> Turn:
        """The turn by `distance` positions, in tokens."""
        turn = self.made.get(distance)
        if turn is None:
            if len(self.made) >= MAX_KEPT:
                del self.made[next(iter(self.made))]
            turn = make_turn(self.rotation.inv_freq, distance, self.rotation.is_neox, self.device, slope=0, offset=0)
            self.made[distance] = turn
        return turn

    def make_rows(self, max_rows: int) -> None:
        """Make room for the angles of single rows; no row turns yet."""
        half = len(self.rotation.inv_freq)
        cos = torch.ones(max_rows, half, device=self.device)
        self.rows = Turn(cos, torch.zeros_like(cos), self.rotation.is_neox, slope=0, offset=0)

    def of_rows(self, rows: slice) -> Turn:
        """The turn of rows by their own angles."""
        assert self.rows is not None
        return replace(self.rows, cos=self.rows.cos[rows], sin=self.rows.sin[rows])

    def fill_rows(self, distances: Sequence[int]) -> None:
        """Let row i turn by `distances[i]` positions, in tokens."""
        assert self.rows is not None
        turns = [self.of(distance) for distance in distances]
        self.rows.cos[: len(turns)].copy_(torch.stack([turn.cos for turn in turns]))
        self.rows.sin[: len(turns)].copy_(torch.stack([turn.sin for turn in turns]))


def share_turns(rotations: dict[str, Rotation], device: torch.device) -> dict[str, Turns]:
    """By layer name as given: one `Turns` for all layers that rotate alike."""
    found: dict[tuple[bytes, bool], Turns] = {}
    shared = {}
    for name, rotation in rotations.items():
        key = rotation.inv_freq.numpy().tobytes(), rotation.is_neox
        shared[name] = found.setdefault(key, Turns(rotation, device))
    return shared
