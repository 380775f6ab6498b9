"""vLLM's scheduler with a plan on every step: `--scheduler-cls farspan.scheduler.scheduler.make_scheduler`.

The only module of this room that imports vLLM; it decides nothing that vLLM's schedulers decide.
"""

from collections.abc import Iterator
from typing import Any

from farspan.engine_ext.plan import OFFLOAD_STATS, OffloadSizes, ResidencyPlan, StepPlan
from farspan.scheduler.placement import running_limit
from farspan.scheduler.residency import Residency, Scheduled
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


class PlannedSteps:
    """Mixed into a vLLM scheduler: counts its steps and attaches `farspan_plan` to each SchedulerOutput."""

    _num_planned_steps = 0
    _residency: Residency | None = None
    _cut: str | None = None
    """The request whose chunks were cut last."""

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """The stock schedule, with the step's StepPlan; the arguments are vLLM's."""
        stock: Any = super()
        scheduler: Any = self
        most = getattr(scheduler, "max_num_scheduled_tokens", 0)
        if self._residency is not None and self._residency.sizes.short_chunk_early:
            scheduler.max_num_scheduled_tokens = self._step_tokens(most, self._residency.sizes)
        try:
            output = stock.schedule(*args, **kwargs)
        finally:
            scheduler.max_num_scheduled_tokens = most
        self._num_planned_steps += 1
        residency = None if self._residency is None else self._plan_residency(self._residency, output)
        output.farspan_plan = StepPlan(step=self._num_planned_steps, residency=residency)
        return output

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """The stock statistics, with those of cold pages in the place of a KV connector's."""
        stock: Any = super()
        stats = stock.make_stats(*args, **kwargs)
        if stats is not None and self._residency is not None:
            stats.kv_connector_stats = {
                **(stats.kv_connector_stats or {}),
                OFFLOAD_STATS: self._residency.statistics(),
            }
        return stats

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        """The stock update, which makes the statistics, with what a worker told of selective decode."""
        stock: Any = super()
        report = getattr(model_runner_output, "farspan_selection", None)
        if report is not None and self._residency is not None:
            self._residency.selection = report
        return stock.update_from_output(scheduler_output, model_runner_output)

    def place_cold_heads(self, sizes: OffloadSizes) -> None:
        """Plan where cold pages lie, and run no more requests at once than slots can always hold the new pages of."""
        scheduler: Any = self
        self._residency = Residency(sizes)
        limit = running_limit(sizes, scheduler.max_num_scheduled_tokens, scheduler.max_num_running_reqs)
        scheduler.max_num_running_reqs = limit
        scheduler.max_num_active_reqs = min(scheduler.max_num_active_reqs, limit)

    def _step_tokens(self, most: int, sizes: OffloadSizes) -> int:
        """Tokens of the next step: fewer than `most` for the second chunk of a long prompt that is read alone.

        Attention of a short chunk hides no fetching, so it has its place where least is to be fetched. Other prompts
        would fill up its step: then it stays the last one.
        """
        scheduler: Any = self
        running = scheduler.running
        reading = [each for each in running if each.num_computed_tokens < each.num_prompt_tokens]
        may_start = bool(scheduler.waiting) and len(running) < scheduler.max_num_running_reqs
        if len(reading) != 1 or may_start or scheduler.scheduler_config.long_prefill_token_threshold > 0:
            return most
        (request,) = reading
        if request.request_id == self._cut or request.num_tokens < sizes.num_slots * sizes.page_size:
            return most
        self._cut = request.request_id
        chunk = most - (len(running) - 1)
        left = request.num_tokens - request.num_computed_tokens
        return most if left <= chunk or left % chunk == 0 else most - chunk + left % chunk

    def _plan_residency(self, residency: Residency, output: Any) -> ResidencyPlan:
        if getattr(output, "kv_cache_block_copies", None):
            # Only of layers of several kinds, which are refused at start-up.
            raise RuntimeError(
                "farspan offload: vLLM copies blocks whose cold KV heads it does not know. Leave out offload, or set "
                "--no-enable-prefix-caching."
            )
        scheduler: Any = self
        blocks = scheduler.kv_cache_manager.block_pool.blocks
        ended = (*output.finished_req_ids, *(output.preempted_req_ids or ()))
        return residency.plan(
            list(scheduled_of(output)),
            ended,
            lambda block: blocks[block].ref_cnt > 0 or blocks[block].block_hash is not None,
        )


def scheduled_of(output: Any) -> Iterator[Scheduled]:
    """The requests of a SchedulerOutput that compute tokens in its step."""
    counts = output.num_scheduled_tokens
    for new in output.scheduled_new_reqs:
        yield Scheduled(new.req_id, new.num_computed_tokens, counts[new.req_id], new.block_ids[0], replaces=True)
    cached = output.scheduled_cached_reqs
    for req_id, block_ids, computed in zip(
        cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True
    ):
        new_blocks = block_ids[0] if block_ids is not None else ()
        yield Scheduled(req_id, computed, counts[req_id], new_blocks, replaces=req_id in cached.resumed_req_ids)


class PlannedScheduler(PlannedSteps, Scheduler):
    """The synchronous scheduler with plans."""


class PlannedAsyncScheduler(PlannedSteps, AsyncScheduler):
    """The asynchronous scheduler with plans."""


def make_scheduler(vllm_config: Any, kv_cache_config: Any = None, *args: Any, **kwargs: Any) -> Scheduler:
    """The scheduler that vLLM would choose, with plans; the arguments are those of vLLM's Scheduler."""
    is_async = vllm_config.scheduler_config.async_scheduling
    scheduler_cls = PlannedAsyncScheduler if is_async else PlannedScheduler
    made = scheduler_cls(vllm_config, kv_cache_config, *args, **kwargs)
    sizes = getattr(kv_cache_config, "farspan_offload", None)
    if sizes is not None:
        made.place_cold_heads(sizes)
    return made
