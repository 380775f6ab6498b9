"""vLLM's scheduler with a plan on every step: `--scheduler-cls farspan.scheduler.scheduler.make_scheduler`.

The only module of this room that imports vLLM; it decides nothing that vLLM's schedulers decide.
"""

from typing import Any

from farspan.engine_ext.plan import StepPlan
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


class PlannedSteps:
    """Mixed into a vLLM scheduler: counts its steps and attaches `farspan_plan` to each SchedulerOutput."""

    _num_planned_steps = 0

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """The stock schedule, with the step's StepPlan; the arguments are vLLM's."""
        stock: Any = super()
        output = stock.schedule(*args, **kwargs)
        self._num_planned_steps += 1
        output.farspan_plan = StepPlan(step=self._num_planned_steps)
        return output


class PlannedScheduler(PlannedSteps, Scheduler):
    """The synchronous scheduler with plans."""


class PlannedAsyncScheduler(PlannedSteps, AsyncScheduler):
    """The asynchronous scheduler with plans."""


def make_scheduler(vllm_config: Any, *args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler that vLLM would choose, with plans; the arguments are those of vLLM's Scheduler."""
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler_cls = PlannedAsyncScheduler if is_async else PlannedScheduler
    return scheduler_cls(vllm_config, *args, **kwargs)
