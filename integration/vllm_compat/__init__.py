"""What depends on vLLM's version, its platform or its model runner.

Each entry says what it stands in for and when it can go.
"""

from typing import Any

from farspan.engine_ext.errors import UnsupportedEngineError
from farspan.vllm_compat import versions
from farspan.vllm_compat.offload import follow_planning
from farspan.vllm_compat.platform import check_engines, honour_custom_on_cpu
from farspan.vllm_compat.requests import follow_requests
from farspan.vllm_compat.runner import RunnerSource, follow_workers
from farspan.vllm_compat.statistics import follow_statistics

BACKEND = "farspan.engine_ext.backend.FarspanBackend"


def connect() -> None:
    """Register the backend and hook it into vLLM.

    A vLLM of another version gets a backend that refuses itself when chosen, so that a vLLM in whose environment
    farspan is merely installed goes on working.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if versions.version_refusal(versions.vllm_version()) is not None:
        register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.RefusedBackend")
        honour_custom_on_cpu()
        return
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    honour_custom_on_cpu()
    check_engines()
    follow_requests()
    follow_workers()
    follow_planning()
    follow_statistics()

    from farspan.engine_ext.requests import set_source_factory
    from farspan.engine_ext.string import set_rotary_source
    from farspan.vllm_compat import rotary

    set_source_factory(RunnerSource)
    set_rotary_source(rotary)


def __getattr__(name: str) -> Any:
    """`RefusedBackend` is looked up by vLLM when a user chooses CUSTOM under an unsupported version."""
    if name == "RefusedBackend":
        raise UnsupportedEngineError(versions.version_refusal(versions.vllm_version()))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
