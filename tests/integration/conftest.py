"""Small models and engines for tests that run a real vLLM on the CPU."""

import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.tiny_models import write_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# Two-layer models have nothing to gain from a second thread, and threads that wait for each other on a busy machine
# make these tests ten times slower. Read by child processes; this one is told in `single_threaded`.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MAX_MODEL_LEN = 2048


@pytest.fixture(scope="session", autouse=True)
def single_threaded() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """From an architecture ("llama", "qwen2", "qwen3") to a folder with a random-weight model and a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Path] = {}

    def model_dir(architecture: str) -> Path:
        if architecture not in made:
            made[architecture] = write_model(root / architecture, architecture)
        return made[architecture]

    return model_dir


@functools.cache
def make_engines_cheap() -> None:
    """Leave out what vLLM does at each start and end of an engine for the sake of long-lived servers, once a process.

    Without it an engine of this process takes about 12 s, of which our tests need one. vLLM collects garbage eight
    times, each time over everything that is imported, and looks through all modules for kernels to replace.
    """
    import vllm.v1.engine.core
    import vllm.v1.worker.gpu_worker
    from vllm.triton_utils import dispatcher

    register, registered = dispatcher.register_kernels, set[str]()

    def register_once(overrides: Mapping[str, Callable[..., Any]]) -> None:
        # What imports a replaced kernel later gets the replacement.
        new = {name: kernel for name, kernel in overrides.items() if name not in registered}
        registered.update(new)
        if new:
            register(new)

    dispatcher.register_kernels = register_once
    # An engine is never frozen here, so there is nothing of it to thaw; `engine_maker` freezes what outlives it.
    for module in (vllm.v1.engine.core, vllm.v1.worker.gpu_worker):
        module.freeze_gc_heap = lambda: None
    gc.unfreeze = lambda: None  # type: ignore[assignment]
    gc.collect()
    gc.freeze()


class WithoutNumba:
    """`sys` without numba's modules; vLLM's scan for kernels fails on one of their objects, so that no engine on a CPU
    starts after one with n-gram drafts.
    """

    @property
    def modules(self) -> dict[str, Any]:
        return {name: each for name, each in sys.modules.items() if not name.startswith(("numba", "llvmlite"))}


def engine_maker(model_dirs: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """What `make_llm` and `make_module_llm` are; engines end when it does."""
    from vllm import LLM

    make_engines_cheap()
    engines = []

    def make(architecture: str = "llama", backend: str | None = "CUSTOM", **kwargs: Any) -> Any:
        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": MAX_MODEL_LEN,
            "num_gpu_blocks_override": 8 * MAX_MODEL_LEN // kwargs.get("block_size", 128),
            "worker_extension_cls": "tests.integration.probe.WorkerProbe",
        }
        if torch.cuda.is_available():
            # Other processes may use the GPU too. Given its bytes, vLLM does not fail when theirs change at its start.
            defaults |= {"gpu_memory_utilization": 0.2, "kv_cache_memory_bytes": 3 << 30}
        if "speculative_config" in kwargs:
            from vllm.triton_utils import dispatcher

            # Until the process ends: its later engines are scanned for too.
            dispatcher.sys = WithoutNumba()
        with pytest.MonkeyPatch.context() as patch:
            if "kv_cache_memory_bytes" in kwargs:
                # The variable goes before the argument.
                patch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
            llm = LLM(str(model_dirs(architecture)), attention_backend=backend, **{**defaults, **kwargs})
        engines.append(llm)
        return llm

    yield make
    # Ends the process groups of all engines in this process, so none may outlive its test: not even one that a
    # failure's traceback keeps.
    for llm in engines:
        llm.llm_engine.engine_core.shutdown()
    engines.clear()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def own_worker_extension() -> Iterator[None]:
    """An engine's extension stays in vLLM's worker class, which refuses another one with the same methods."""
    yield
    worker = sys.modules.get("vllm.v1.worker.cpu_worker")
    if worker is not None:
        stock = worker.CPUWorker.__bases__
        worker.CPUWorker.__bases__ = tuple(base for base in stock if base.__module__.startswith("vllm."))


@pytest.fixture
def make_llm(model_dirs: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """Make engines that live as long as the test: `make_llm("llama", "CUSTOM", **LLM arguments)`."""
    yield from engine_maker(model_dirs)


@pytest.fixture(scope="module")
def make_module_llm(model_dirs: Callable[[str], Path]) -> Iterator[Callable[..., Any]]:
    """Make engines that live as long as the module, which may then not use `make_llm`; see there."""
    yield from engine_maker(model_dirs)


@pytest.fixture
def async_scheduling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are scheduled before the ones before them have ended, which vLLM switches off on a CPU."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    stock = platform.check_and_update_config

    def check_and_update_config(vllm_config: Any) -> None:
        stock(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(platform, "check_and_update_config", staticmethod(check_and_update_config))
