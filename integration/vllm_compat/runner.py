"""What metadata builders learn from the model runner: its requests' options, the step's plan, the model."""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from farspan.engine_ext.config import FarspanConfig, Prefill
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.plan import StepPlan
from farspan.engine_ext.star.shard import Shard
from farspan.vllm_compat.offload import make_cold_cache, shrinking_pages
from farspan.vllm_compat.platform import chooses_farspan
from farspan.vllm_compat.wrapping import wrap_once

logger = logging.getLogger(__name__)


@dataclass
class RunnerState:
    """What we note about one model runner."""

    config: FarspanConfig
    overrides: dict[str, Prefill] = field(default_factory=dict)
    """By request id, of the requests that the runner holds and that do not prefill as the engine does."""
    prompt_lens: dict[str, int] = field(default_factory=dict)
    """By request id: tokens of the prompts of the requests that the runner holds."""
    shards: dict[str, Shard] = field(default_factory=dict)
    """By request id, of the requests of Star Attention that the runner holds."""
    page_size: int = 0
    """Tokens of a page of the KV cache."""
    plan: StepPlan | None = None
    """Of the step that runs."""
    warms_up: bool = False
    """Whether our kernels are registered with vLLM's warm-up."""
    cold: Any = None
    """`engine_ext.offload.cache.ColdCache`; None where no KV head is cold."""
    selected: Any = None
    """`engine_ext.selection.report.SelectionReporter`; None where statistics of flex are off."""

    def update(self, scheduler_output: Any) -> None:
        """Take over a step: forget finished requests, decode the options of new ones and of streaming chunks."""
        from farspan.engine_ext.requests import shard_of_request

        self.plan = getattr(scheduler_output, "farspan_plan", None)
        if self.cold is not None and self.plan is not None and self.plan.residency is not None:
            self.cold.follow(self.plan.residency)
        for req_id in scheduler_output.finished_req_ids:
            self.overrides.pop(req_id, None)
            self.prompt_lens.pop(req_id, None)
            self.shards.pop(req_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            if request.prompt_token_ids is not None:
                self.prompt_lens[request.req_id] = len(request.prompt_token_ids)
            extra_args = params.extra_args if params is not None else None
            prefill = self.decode(request.req_id, extra_args)
            shard = shard_of_request(self.config, extra_args, self.page_size)
            if shard is not None:
                self.shards[request.req_id] = shard
            self.overrides.pop(request.req_id, None)
            if prefill != self.config.prefill:
                self.overrides[request.req_id] = prefill

    def decode(self, req_id: str, extra_args: Mapping[str, Any] | None) -> Prefill:
        """A request's prefill; the engine's own, with a warning, if its overrides make no sense."""
        from farspan.engine_ext.requests import prefill_of_request

        try:
            return prefill_of_request(self.config, extra_args)
        except ConfigError as error:
            # The core refuses such requests; one bad request must not end the engine for all others.
            logger.warning("request %s prefills by the engine's options: %s", req_id, error)
            return self.config.prefill


class RunnerSource:
    """What the metadata builder learns from the model runner that calls it (engine_ext.requests.RequestSource)."""

    def __init__(self, vllm_config: Any) -> None:
        from farspan.engine_ext.support import config_of

        self.engine_prefill = config_of(vllm_config).prefill
        self.is_v2 = bool(vllm_config.use_v2_model_runner)

    def prefills(self, common_attn_metadata: Any) -> Sequence[Prefill]:
        """How each request of the batch prefills, in batch order; the engine's own for padding and dummy rows.

        Graphs are captured and memory is measured outside of any step: there all rows are dummies.
        """
        num_reqs = common_attn_metadata.num_reqs
        runner = running_runner()
        if runner is None or not state_of(runner).overrides:
            return [self.engine_prefill] * num_reqs
        overrides = state_of(runner).overrides
        req_ids = self.req_ids(runner, common_attn_metadata)
        prefills = [overrides.get(req_id, self.engine_prefill) for req_id in req_ids]
        return prefills + [self.engine_prefill] * (num_reqs - len(prefills))

    def prompt_lens(self, common_attn_metadata: Any) -> Sequence[int | None]:
        """Tokens of each request's whole prompt, in batch order; None for padding and dummy rows."""
        num_reqs = common_attn_metadata.num_reqs
        runner = running_runner()
        if runner is None:
            return [None] * num_reqs
        known = state_of(runner).prompt_lens
        lens = [known.get(req_id) for req_id in self.req_ids(runner, common_attn_metadata)]
        return lens + [None] * (num_reqs - len(lens))

    def shards(self, common_attn_metadata: Any) -> Sequence[Shard | None]:
        """What each request of the batch is to Star Attention, in batch order; None for the others and padding."""
        num_reqs = common_attn_metadata.num_reqs
        runner = running_runner()
        if runner is None or not state_of(runner).shards:
            return [None] * num_reqs
        shards = [state_of(runner).shards.get(req_id) for req_id in self.req_ids(runner, common_attn_metadata)]
        return shards + [None] * (num_reqs - len(shards))

    def plan(self) -> StepPlan | None:
        """The scheduler's plan for the step that runs."""
        runner = running_runner()
        return None if runner is None else state_of(runner).plan

    def missing(self, common_attn_metadata: Any) -> Sequence[bool]:
        """Whether each request of the batch has pages of cold heads in no slot; not outside of steps with a plan."""
        num_reqs = common_attn_metadata.num_reqs
        plan, runner = self.plan(), running_runner()
        if runner is None or plan is None or plan.residency is None or not plan.residency.missing:
            return [False] * num_reqs
        missing = plan.residency.missing
        flags = [req_id in missing for req_id in self.req_ids(runner, common_attn_metadata)]
        return flags + [False] * (num_reqs - len(flags))

    def cold_cache(self) -> Any:
        """The pages of cold heads of the runner whose KV cache is set up."""
        runner = running_runner()
        return None if runner is None else state_of(runner).cold

    def model(self) -> Any:
        """The torch module; inside a step or while the KV cache is set up."""
        runner = running_runner()
        assert runner is not None, "asked outside of the model runner"
        return runner.get_model()

    # The two runners keep the batch's request ids in different places. Drop when runner V1 is gone.
    def req_ids(self, runner: Any, common_attn_metadata: Any) -> list[str]:
        """Request ids in batch order; padding after the batch has none."""
        num_reqs = common_attn_metadata.num_reqs
        if not self.is_v2:
            return list(runner.input_batch.req_ids[:num_reqs])
        names = runner.req_states.index_to_req_id
        # Dummy batches of the warm-up have indices without a request.
        return [names.get(int(index), "") for index in common_attn_metadata.req_idx[:num_reqs]]


_running = threading.local()
"""`runners`: the model runners at work in a thread, innermost last. Engines of one process may run in threads."""


def running_runner() -> Any | None:
    runners = getattr(_running, "runners", None)
    return runners[-1] if runners else None


@contextmanager
def running(runner: Any) -> Iterator[None]:
    if not hasattr(_running, "runners"):
        _running.runners = []
    _running.runners.append(runner)
    try:
        yield
    finally:
        _running.runners.pop()


def state_of(runner: Any) -> RunnerState:
    if "farspan_state" not in runner.__dict__:
        from farspan.engine_ext.support import config_of

        page_size = runner.vllm_config.cache_config.block_size
        runner.farspan_state = RunnerState(config_of(runner.vllm_config), page_size=page_size)
    state: RunnerState = runner.farspan_state
    return state


def runner_class(is_v2: bool) -> type[Any]:
    if is_v2:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    return GPUModelRunner


# A builder is made inside `initialize_kv_cache`, too late to follow that call. Drop with `follow_runner`.
def follow_workers() -> None:
    """Follow the model runner of every worker whose engine chose CUSTOM, from before the runner is made."""
    from vllm.v1.worker.worker_base import WorkerBase

    # Plugins may be loaded inside the wrapper's `init_worker`: the worker's own constructor is the first call after it.
    wrap_once(WorkerBase, "__init__", following_workers)


def following_workers(stock: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if chooses_farspan(vllm_config):
            follow_runner(runner_class(bool(vllm_config.use_v2_model_runner)))
        stock(self, vllm_config, *args, **kwargs)

    return __init__


def metadata_builders(runner: Any) -> list[Any]:
    """The metadata builders of farspan that a model runner has made."""
    from farspan.engine_ext.metadata import FarspanMetadataBuilder

    groups = (group for of_cache in runner.attn_groups for group in of_cache)
    return [each for group in groups for each in group.metadata_builders if isinstance(each, FarspanMetadataBuilder)]


# Builders are not told the request ids of a batch, nor given the requests' extra args. Drop when
# CommonAttentionMetadata carries both (not in 0.33).
def follow_runner(runner_cls: type[Any]) -> None:
    """Note which runner is running, its step's plan, and the options of the requests that it holds."""
    wrap_once(runner_cls, "execute_model", following_steps)
    wrap_once(runner_cls, "sample_tokens", following_samples)
    wrap_once(runner_cls, "initialize_kv_cache", following_setup)
    wrap_once(runner_cls, "get_kv_cache_spec", shrinking_pages)


def following_steps(stock: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        state_of(self).update(scheduler_output)
        with running(self):
            return stock(self, scheduler_output, *args, **kwargs)

    return execute_model


def following_samples(stock: Callable[..., Any]) -> Callable[..., Any]:
    """What selective decode kept, and what flex chose, travels to the scheduler with the tokens of a step."""

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = stock(self, *args, **kwargs)
        if output is not None:
            state = state_of(self)
            names = ("model_runner_output", "_model_runner_output")
            inner = next((getattr(output, name) for name in names if hasattr(output, name)), output)
            if state.cold is not None and state.cold.selection is not None:
                inner.farspan_selection = state.cold.selection.report()
            if state.selected is not None:
                inner.farspan_selected = state.selected.report()
        return output

    return sample_tokens


def following_setup(stock: Callable[..., Any]) -> Callable[..., Any]:
    def initialize_kv_cache(self: Any, kv_cache_config: Any, *args: Any, **kwargs: Any) -> Any:
        state = state_of(self)
        if self.device.type == "cuda" and not state.warms_up:
            from farspan.vllm_compat.warmup import register_warm_up

            register_warm_up(self, metadata_builders)
            state.warms_up = True
        # Those of the profile run go before others come.
        state.cold = None
        state.cold = make_cold_cache(self, kv_cache_config)
        with running(self):
            result = stock(self, kv_cache_config, *args, **kwargs)
        state.selected = selection_reporter(self)
        tell_decisions(self, kv_cache_config)
        return result

    return initialize_kv_cache


def selection_reporter(runner: Any) -> Any:
    """What tells the blocks that flex chose in the layers of a runner; None where nobody collects that."""
    from farspan.engine_ext.selection.report import SelectionReporter

    layers = [layer for builder in metadata_builders(runner) for layer in builder.layers.values()]
    stats = [getattr(layer.selector, "stats", None) for layer in layers]
    collected = [each for each in stats if each is not None]
    return SelectionReporter(collected) if collected else None


def tell_decisions(runner: Any, kv_cache_config: Any) -> None:
    """Log what the engine decided, and what has no effect, once, in the first rank of each engine."""
    from farspan.decisions import decision_line, unread_coverage
    from farspan.engine_ext.layers import collects_statistics
    from vllm.logger import init_logger

    builders, cold = metadata_builders(runner), state_of(runner).cold
    is_profile = cold is not None and getattr(kv_cache_config, "farspan_offload", None) is None
    if builders and not is_profile and runner.vllm_config.parallel_config.rank == 0:
        # vLLM prints only its own loggers' names, so this one is under them.
        log = init_logger("vllm.farspan")
        log.info_once("farspan attention on %s: %s", runner.device, decision_line(builders))
        if unread := unread_coverage(state_of(runner).config.prefill, collects_statistics(runner.vllm_config)):
            log.warning_once(unread)
