"""Queries and keys at their true positions: vLLM rotates by a token's place in the request, which a shard shifts.

One more rotation by a constant distance makes up for it, on the queries and on the keys before they are written. So
pages hold keys at true positions, and no kernel needs to know of a shift.
"""

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

    def of(self, distance: int) -> Turn:
        """The turn by `distance` positions, in tokens."""
        turn = self.made.get(distance)
        if turn is None:
            if len(self.made) >= MAX_KEPT:
                del self.made[next(iter(self.made))]
            turn = make_turn(self.rotation.inv_freq, distance, self.rotation.is_neox, self.device, slope=0, offset=0)
            self.made[distance] = turn
        return turn


def share_turns(rotations: dict[str, Rotation], device: torch.device) -> dict[str, Turns]:
    """By layer name as given: one `Turns` for all layers that rotate alike."""
    found: dict[tuple[bytes, bool], Turns] = {}
    shared = {}
    for name, rotation in rotations.items():
        key = rotation.inv_freq.numpy().tobytes(), rotation.is_neox
        shared[name] = found.setdefault(key, Turns(rotation, device))
    return shared
