"""The platform's choice of a backend, and its check of a whole engine."""

from collections.abc import Callable, Mapping
from typing import Any

from farspan.engine_ext.errors import ConfigError, UnsupportedEngineError, UnsupportedModelError
from farspan.vllm_compat.wrapping import wrap_once

SCHEDULER = "farspan.scheduler.scheduler.make_scheduler"
REPLICAS = "farspan_replicas"


def chooses_farspan(vllm_config: Any) -> bool:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention = vllm_config.attention_config
    chosen = [attention.backend, *(attention.backend_per_kind or {}).values()]
    return AttentionBackendEnum.CUSTOM in chosen


# The CPU platform ignores CUSTOM and takes its own backend. Drop when platforms/cpu.py honours it (not in 0.33).
def honour_custom_on_cpu() -> None:
    """On the CPU platform, serve CUSTOM where it is chosen, with the refusals that CUDA makes by itself."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not current_platform.is_cpu():
        return

    def honouring(stock: Callable[..., str]) -> Callable[..., str]:
        def get_attn_backend_cls(selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
            if selected_backend is not AttentionBackendEnum.CUSTOM:
                return stock(selected_backend, attn_selector_config, num_heads)
            backend: Any = selected_backend.get_class()
            # No CPU has a compute capability, and none of the checks that ours answers looks at it.
            reasons = backend.validate_configuration(device_capability=None, **attn_selector_config._asdict())
            if reasons:
                raise UnsupportedModelError(f"attention backend CUSTOM (farspan): {' '.join(reasons)}")
            return str(selected_backend.get_path())

        return get_attn_backend_cls

    wrap_once(type(current_platform), "get_attn_backend_cls", honouring)


# vLLM asks a backend about single layers only, in the worker, where an exception reaches the user as "engine core
# initialization failed". The platform's check of the whole configuration runs in the front end.
# Drop when backends can check a VllmConfig (not in 0.33).
def check_engines() -> None:
    """Refuse, while an engine's configuration is made, what cannot work and what would have no effect."""
    from vllm.platforms import current_platform

    def checking(stock: Callable[..., None]) -> Callable[..., None]:
        def check_and_update_config(vllm_config: Any) -> None:
            stock(vllm_config)
            if chooses_farspan(vllm_config):
                from farspan.engine_ext.support import check_engine

                check_engine(vllm_config)
                leave_window_layers(vllm_config)
                refuse_mixed_up_microbatches(vllm_config)
                choose_scheduler(vllm_config)
                remember_replicas(vllm_config.parallel_config)
            else:
                refuse_unused_options(vllm_config.additional_config)

        return check_and_update_config

    wrap_once(type(current_platform), "check_and_update_config", checking)


def leave_window_layers(vllm_config: Any) -> None:
    """Let vLLM's own backend serve layers with a sliding window that would be ours, as all layers are."""
    from farspan.engine_ext.support import has_window_layers
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    attention, model_config = vllm_config.attention_config, vllm_config.model_config
    # Where CUSTOM is chosen for layers of one kind alone, the others have what the user or vLLM chooses.
    if attention.backend is not AttentionBackendEnum.CUSTOM or model_config is None:
        return
    if has_window_layers(model_config):
        own = AttentionBackendEnum.CPU_ATTN if current_platform.is_cpu() else AttentionBackendEnum.FLASH_ATTN
        attention.backend_per_kind.setdefault("sliding_window", own)


def choose_scheduler(vllm_config: Any) -> None:
    """Take the scheduler that places cold pages, where KV heads are cold. Raises UnsupportedEngineError."""
    from farspan.engine_ext.support import has_cold_heads

    if not has_cold_heads(vllm_config):
        return
    chosen = vllm_config.scheduler_config.scheduler_cls
    if chosen not in (None, SCHEDULER):
        raise UnsupportedEngineError(
            f"scheduler_cls={chosen!r} together with offload, which needs {SCHEDULER!r} to place pages. Leave out "
            "--scheduler-cls."
        )
    vllm_config.scheduler_config.scheduler_cls = SCHEDULER


# An independent replica's own process forgets that it has neighbours. Drop when it does not (not in 0.33).
def remember_replicas(parallel_config: Any) -> None:
    """Keep how many replicas this machine has where `num_replicas` finds it, also in the replicas' processes."""
    vars(parallel_config).setdefault(REPLICAS, parallel_config.data_parallel_size_local)


def num_replicas(parallel_config: Any) -> int:
    """Engines of a data-parallel deployment on this machine, at least 1; one engine is its own only replica."""
    return max(vars(parallel_config).get(REPLICAS, 1), 1)


def refuse_unused_options(additional_config: Any) -> None:
    """Raise ConfigError for options of ours in an engine that another backend serves."""
    from farspan.engine_ext.requests import names_like_ours

    for name in names_like_ours(additional_config if isinstance(additional_config, Mapping) else ()):
        raise ConfigError(
            f"additional_config[{name!r}]={additional_config[name]!r}; allowed: only with the attention backend "
            "CUSTOM. Add --attention-backend CUSTOM, or remove the key."
        )


# Model runner V1 cuts a batch into microbatches without saying which requests each holds. Drop when V1 is gone.
def refuse_mixed_up_microbatches(vllm_config: Any) -> None:
    """Raise UnsupportedEngineError where a microbatch could prefill by another request's options."""
    if vllm_config.parallel_config.use_ubatching and not vllm_config.use_v2_model_runner:
        raise UnsupportedEngineError(
            "microbatches (dual-batch overlap) with model runner V1; farspan cannot tell which requests a microbatch "
            "holds. Leave out --enable-dbo, or set VLLM_USE_V2_MODEL_RUNNER=1."
        )
