"""Everything that depends on vLLM's version, its platform or its model runner; nothing else in farspan does.

Each entry says what it stands in for and when it can go.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from farspan.engine_ext.errors import UnsupportedEngineError, UnsupportedModelError

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

    from farspan.engine_ext.requests import set_source_factory
    from farspan.engine_ext.string import set_rotary_source
    from farspan.vllm_compat import rotary

    set_source_factory(RunnerSource)
    set_rotary_source(rotary)


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
    if hasattr(stock, "__wrapped__"):
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
        self.is_v2 = bool(vllm_config.use_v2_model_runner)
        follow_runner(runner_class(self.is_v2))

    def extra_args(self, common_attn_metadata: Any) -> Sequence[Mapping[str, Any] | None]:
        """By request of the batch; none while graphs are captured and memory is measured, outside of any step."""
        if not _running:
            return []
        runner = _running[-1]
        return [runner.farspan_extra_args.get(req_id) for req_id in self.req_ids(runner, common_attn_metadata)]

    def model(self) -> Any:
        """The torch module; inside a step or while the KV cache is set up."""
        return _running[-1].get_model()

    # The two runners keep the batch's request ids in different places. Drop when runner V1 is gone.
    def req_ids(self, runner: Any, common_attn_metadata: Any) -> list[str]:
        """Request ids in batch order; padding behind the batch has none."""
        if not self.is_v2:
            return runner.input_batch.req_ids[: common_attn_metadata.num_reqs]
        indices = common_attn_metadata.req_idx
        names = runner.req_states.index_to_req_id
        # Dummy batches of the warm-up have indices without a request.
        return [names.get(int(index), "") for index in indices[: common_attn_metadata.num_reqs]]


_running: list[Any] = []
"""The model runners at work in this thread of control, innermost last."""


def runner_class(is_v2: bool) -> type[Any]:
    if is_v2:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner
    return GPUModelRunner


# Builders are not told the request ids of a batch, nor given the requests' extra args. Drop when
# CommonAttentionMetadata carries both (not in 0.33).
def follow_runner(runner_cls: type[Any]) -> None:
    """Note which runner is running, and the extra args of the requests that it holds."""
    execute_model, initialize_kv_cache = runner_cls.execute_model, runner_cls.initialize_kv_cache
    if hasattr(execute_model, "__wrapped_by_farspan__"):
        return

    @functools.wraps(execute_model)
    def followed_execute_model(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        extra_args = self.__dict__.setdefault("farspan_extra_args", {})
        for req_id in scheduler_output.finished_req_ids:
            extra_args.pop(req_id, None)
        for request in scheduler_output.scheduled_new_reqs:
            params = request.sampling_params
            if params is not None and params.extra_args:
                extra_args[request.req_id] = params.extra_args
        with running(self):
            return execute_model(self, scheduler_output, *args, **kwargs)

    @functools.wraps(initialize_kv_cache)
    def followed_initialize_kv_cache(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.__dict__.setdefault("farspan_extra_args", {})
        with running(self):
            return initialize_kv_cache(self, *args, **kwargs)

    followed_execute_model.__wrapped_by_farspan__ = True  # type: ignore[attr-defined]
    runner_cls.execute_model = followed_execute_model
    runner_cls.initialize_kv_cache = followed_initialize_kv_cache


@contextmanager
def running(runner: Any) -> Iterator[None]:
    _running.append(runner)
    try:
        yield
    finally:
        _running.pop()
