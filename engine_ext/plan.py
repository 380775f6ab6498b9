"""What the scheduler decides for one step and sends to the workers: tagged, frozen messages without tensors."""

import msgspec


class StepPlan(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """One step of the engine."""

    step: int
    """Counts the engine's scheduled steps from 1."""
