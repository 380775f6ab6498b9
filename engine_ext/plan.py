"""Messages from the scheduler to the workers: one immutable plan per step, without tensors."""

import msgspec


class StepPlan(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """What the scheduler extension decided for one step; it travels on vLLM's SchedulerOutput."""

    step: int
    """Number of the step, counted by the scheduler from 1."""
