"""Everything that depends on vLLM's version, its platform or its model runner; nothing else in farspan does.

Each entry says what it stands in for and when it can go.
"""

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from farspan.engine_ext.config import DensePrefill, Prefill
from farspan.engine_ext.errors import UnsupportedEngineError, UnsupportedModelError
from farspan.engine_ext.plan import StepPlan

VLLM_MIN = (0, 32)
VLLM_BELOW = (0, 34)
BACKEND = "farspan.engine_ext.backend.FarspanBackend"


def connect() -> None:
    """Register the backend and hook it into vLLM.

    A vLLM of another version gets a backend that refuses itself when chosen, so that a vLLM beside which farspan is
    merely installed goes on working.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    problem = version_refusal(vllm_version())
    if problem is not None:
        register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.RefusedBackend")
        honour_custom_on_cpu()
        return
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    honour_custom_on_cpu()
    check_engines()

    follow_workers()

    from farspan.engine_ext.requests import set_source_factory

    set_source_factory(RunnerSource)


def __getattr__(name: str) -> Any:
    """`RefusedBackend` is looked up by vLLM when a user chooses CUSTOM under an unsupported version."""
    if name == "RefusedBackend":
        raise UnsupportedEngineError(version_refusal(vllm_version()))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def vllm_version() -> str:
    import vllm

    return vllm.__version__


def version_refusal(version: str) -> str | None:
    """Why a vLLM version cannot be used, or None if it can. A development build counts as its release."""
    allowed = f"vllm>={VLLM_MIN[0]}.{VLLM_MIN[1]},<{VLLM_BELOW[0]}.{VLLM_BELOW[1]}"
    parts = version.split("+")[0].split(".")
    try:
        release = int(parts[0]), int(parts[1])
    except (ValueError, IndexError):
        return f"vLLM {version!r} has no release number; farspan supports {allowed}. Install a released vLLM."
    if VLLM_MIN <= release < VLLM_BELOW:
        return None
    return f"vLLM {version}; farspan supports {allowed}. Install such a vLLM, or leave out --attention-backend CUSTOM."


# The CPU platform ignores CUSTOM and takes its own backend. Drop when platforms/cpu.py honours it (not in 0.33).
def honour_custom_on_cpu() -> None:
    """On the CPU platform, serve CUSTOM where it is chosen, with the refusals that CUDA makes by itself."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not current_platform.is_cpu():
        return
    platform: Any = type(current_platform)
    stock = platform.get_attn_backend_cls

    @functools.wraps(stock)
    def get_attn_backend_cls(selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
        if selected_backend is not AttentionBackendEnum.CUSTOM:
            return stock(selected_backend, attn_selector_config, num_heads)
        backend: Any = selected_backend.get_class()
        # No CPU has a compute capability, and none of the checks that ours answers looks at it.
        reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
        if reasons:
            raise UnsupportedModelError(f"attention backend CUSTOM (farspan): {' '.join(reasons)}")
        return selected_backend.get_path()

    platform.get_attn_backend_cls = staticmethod(get_attn_backend_cls)


# vLLM asks a backend about single layers only, in the worker, where an exception reaches the user as "engine core
# initialization failed". The platform's check of the whole configuration runs in the front end.
# Drop when backends can check a VllmConfig (not in 0.33).
def check_engines() -> None:
    """Refuse engines that chose CUSTOM and cannot have it, while their configuration is made; see `check_engine`."""
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    stock = platform.check_and_update_config

    @functools.wraps(stock)
    def check_and_update_config(vllm_config: Any) -> None:
        stock(vllm_config)
        if chooses_farspan(vllm_config):
            from farspan.engine_ext.support import check_engine

            check_engine(vllm_config)
            salt_requests()

    platform.check_and_update_config = staticmethod(check_and_update_config)


def chooses_farspan(vllm_config: Any) -> bool:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention = vllm_config.attention_config
    chosen = [attention.backend, *(attention.backend_per_kind or {}).values()]
    return AttentionBackendEnum.CUSTOM in chosen


# vLLM has no hook on incoming requests. Drop when backends can validate and salt them (not in 0.33).
def salt_requests() -> None:
    """In the front end: check each request's `farspan.*` overrides, and salt its prefix-cache blocks by its options."""
    from farspan.engine_ext.errors import ConfigError
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    processor: Any = InputProcessor
    stock = processor.process_inputs
    if hasattr(stock, MARK):
        return

    @functools.wraps(stock)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = stock(self, *args, **kwargs)
        if chooses_farspan(self.vllm_config):
            try:
                request.cache_salt = salt_of(self.vllm_config, request)
            except ConfigError as error:
                # The server answers 400 to vLLM's own validation errors alone.
                raise VLLMValidationError(str(error), parameter="extra_args") from error
        return request

    setattr(process_inputs, MARK, True)
    processor.process_inputs = process_inputs


def salt_of(vllm_config: Any, request: Any) -> str | None:
    """The cache salt of a request: the user's own joined with that of the options. Raises ConfigError."""
    from farspan.engine_ext.requests import cache_salt, prefill_of_request
    from farspan.engine_ext.support import config_of

    config = config_of(vllm_config)
    params = request.sampling_params
    prefill = prefill_of_request(config, params.extra_args if params is not None else None)
    salts = [salt for salt in (request.cache_salt, cache_salt(config, prefill)) if salt]
    return "/".join(salts) or None


class RunnerSource:
    """What the metadata builder learns from the model runner that calls it (engine_ext.requests.RequestSource)."""

    def __init__(self, vllm_config: Any) -> None:
        from farspan.engine_ext.support import config_of

        self.config = config_of(vllm_config)
        self.is_v2 = bool(vllm_config.use_v2_model_runner)

    def prefills(self, common_attn_metadata: Any) -> Sequence[Prefill]:
        """By request of the batch; the engine's own while graphs are captured and memory is measured."""
        own = [self.config.prefill] * common_attn_metadata.num_reqs
        runner = running_runner()
        # An engine that prefills densely has no options for single requests.
        if runner is None or isinstance(self.config.prefill, DensePrefill):
            return own
        options = runner.__dict__[REQUEST_OPTIONS]
        ids = self.req_ids(runner, common_attn_metadata)
        return [options.get(req_id, self.config.prefill) for req_id in ids] + own[len(ids) :]

    def plan(self) -> StepPlan | None:
        """That of the step which the runner at work executes."""
        runner = running_runner()
        return None if runner is None else runner.__dict__.get(STEP_PLAN)

    def model(self) -> Any:
        """The torch module; inside a step or while the KV cache is set up."""
        runner = running_runner()
        assert runner is not None
        return runner.get_model()

    # The two runners keep the batch's request ids in different places. Drop when runner V1 is gone.
    def req_ids(self, runner: Any, common_attn_metadata: Any) -> list[str]:
        """Request ids in batch order; padding behind the batch has none."""
        if not self.is_v2:
            return runner.input_batch.req_ids[: common_attn_metadata.num_reqs]
        indices = common_attn_metadata.req_idx
        names = runner.req_states.index_to_req_id
        # Dummy batches of the warm-up have indices without a request.
        return [names.get(int(index), "") for index in indices[: common_attn_metadata.num_reqs]]


class _Running(threading.local):
    """The model runners at work in this thread, innermost last."""

    def __init__(self) -> None:
        self.runners: list[Any] = []


_running = _Running()
REQUEST_OPTIONS = "farspan_prefills"
"""Attribute of a runner: how each of its requests prefills, by request id; those that prefill as the engine does are
left out."""
STEP_PLAN = "farspan_step_plan"
"""Attribute of a runner, and of vLLM's scheduler output: the plan of the step."""


def running_runner() -> Any | None:
    return _running.runners[-1] if _running.runners else None


def metadata_builders(runner: Any) -> list[Any]:
    """The metadata builders of farspan that a model runner has made."""
    from farspan.engine_ext.metadata import FarspanMetadataBuilder

    groups = (group for groups in runner.attn_groups for group in groups)
    return [each for group in groups for each in group.metadata_builders if isinstance(each, FarspanMetadataBuilder)]


def runner_class(is_v2: bool) -> type[Any]:
    if is_v2:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    return GPUModelRunner


# A builder is made inside `initialize_kv_cache`, too late to follow that call. Drop with `follow_runner`.
def follow_workers() -> None:
    """Follow the model runner of every worker whose engine chose CUSTOM, from before the runner is made."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    wrapper: Any = WorkerWrapperBase
    stock = wrapper.init_worker
    if hasattr(stock, MARK):
        return

    @functools.wraps(stock)
    def init_worker(self: Any, all_kwargs: list[dict[str, Any]]) -> None:
        vllm_config = all_kwargs[self.rpc_rank]["vllm_config"]
        if chooses_farspan(vllm_config):
            follow_runner(runner_class(bool(vllm_config.use_v2_model_runner)))
        stock(self, all_kwargs)

    setattr(init_worker, MARK, True)
    wrapper.init_worker = init_worker


MARK = "__wrapped_by_farspan__"
"""On every function that stands in for one of vLLM's: whatever else wraps it, ours is applied once."""


# Builders are not told the request ids of a batch, nor given the requests' extra args. Drop when
# CommonAttentionMetadata carries both (not in 0.33).
def follow_runner(runner_cls: type[Any]) -> None:
    """Note which runner is running, the options of the requests that it holds, and the plan of the step."""
    execute_model, initialize_kv_cache = runner_cls.execute_model, runner_cls.initialize_kv_cache
    if hasattr(execute_model, MARK):
        return

    @functools.wraps(execute_model)
    def followed_execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        note_requests(self.__dict__.setdefault(REQUEST_OPTIONS, {}), self.vllm_config, scheduler_output)
        self.__dict__[STEP_PLAN] = getattr(scheduler_output, STEP_PLAN, None)
        with running(self):
            return execute_model(self, scheduler_output, *args, **kwargs)

    @functools.wraps(initialize_kv_cache)
    def followed_initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault(REQUEST_OPTIONS, {})
        with running(self):
            return initialize_kv_cache(self, *args, **kwargs)

    setattr(followed_execute_model, MARK, True)
    runner_cls.execute_model = followed_execute_model
    runner_cls.initialize_kv_cache = followed_initialize_kv_cache


def note_requests(options: dict[str, Prefill], vllm_config: Any, scheduler_output: Any) -> None:
    """Decode the options of requests as they arrive at the worker, and forget those of requests that ended.

    They were validated before (`salt_of`), so that nothing raises here.
    """
    from farspan.engine_ext.requests import prefill_of_request
    from farspan.engine_ext.support import config_of

    for req_id in scheduler_output.finished_req_ids:
        options.pop(req_id, None)
    config = config_of(vllm_config)
    for request in scheduler_output.scheduled_new_reqs:
        params = request.sampling_params
        prefill = prefill_of_request(config, params.extra_args if params is not None else None)
        # A later part of a streaming session takes the place of the earlier one.
        options.pop(request.req_id, None)
        if prefill != config.prefill:
            options[request.req_id] = prefill


@contextmanager
def running(runner: Any) -> Iterator[None]:
    _running.runners.append(runner)
    try:
        yield
    finally:
        _running.runners.pop()
