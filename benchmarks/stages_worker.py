"""The worker's side of benchmark `stages`: what an engine's host and device spend on a request, by stage."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The first of these in a kernel's name, in lower case, says which stage it belongs to.
STAGES_OF_KERNELS = (
    ("log_sums", "log-sums"),
    ("choice_kernel", "choice"),
    ("block_mass", "choice"),
    ("write_kv", "kv-write"),
    ("reshape_and_cache", "kv-write"),
    ("flash", "attention"),
    ("prepare_varlen", "attention"),
    ("prefill_kernel", "attention"),
    ("decode_kernel", "attention"),
    ("nvjet", "linear"),
    ("gemm", "linear"),
    ("gemv", "linear"),
    ("cutlass", "linear"),
    ("splitk", "linear"),
    ("memcpy", "copies"),
    ("memset", "copies"),
)


def stage_of(kernel: str) -> str:
    """The stage of a device kernel by its name; `rest` are norms, activations, rotations and the like."""
    name = kernel.lower()
    return next((stage for part, stage in STAGES_OF_KERNELS if part in name), "rest")


def device_ms(events: Iterable[tuple[str, float, float]], num_layers: int) -> dict[str, float]:
    """Time of a request's kernels by stage, in ms: `all/STAGE` of all of them, `last/STAGE` of the last chunk.

    events: name, start and end of each kernel in us, of one stream. A chunk begins where its first layer writes keys.
    `idle` is what the device waits between kernels; `layers` counts the layers of all chunks.
    """
    ordered = sorted(events, key=lambda event: event[1])
    writes = [place for place, event in enumerate(ordered) if stage_of(event[0]) == "kv-write"]
    found = {"layers": float(len(writes))}
    first = writes[-num_layers] if len(writes) >= num_layers else 0
    for label, part in (("all", ordered), ("last", ordered[first:])):
        stages: defaultdict[str, float] = defaultdict(float)
        for name, start, end in part:
            stages[stage_of(name)] += (end - start) / 1e3
        if part:
            span = (max(end for _, _, end in part) - part[0][1]) / 1e3
            stages["idle"] = max(span - sum(stages.values()), 0.0)
        found |= {f"{label}/{stage}": ms for stage, ms in stages.items()}
    return found


class StageMetrics:
    """Mixed into vLLM's workers by `worker_extension_cls`."""

    def begin_stages(self, of_device: bool) -> None:
        """Count from now on: times of the device's kernels, or of what the host does for them, without waiting."""
        worker: Any = self
        runner = worker.model_runner
        layers = layers_of(worker)
        self.stage_profiler = None
        self.stage_ns: Counter[str] = Counter()
        self.stage_calls: Counter[str] = Counter()
        self.stage_patches: list[tuple[Any, str]] = []
        if of_device and torch.cuda.is_available():
            self.stage_profiler = profile(activities=[ProfilerActivity.CUDA])
            self.stage_profiler.start()
            return
        for layer in layers:
            self._time_stage(layer.impl, "forward", "attention")
            self._time_stage(layer.impl, "do_kv_cache_update", "kv-write")
        for of_cache in runner.attn_groups:
            for group in of_cache:
                for builder in group.metadata_builders:
                    self._time_stage(builder, "build", "metadata")
        self._time_stage(runner, "execute_model", "step")
        self._time_stage(runner, "sample_tokens", "sample")

    def end_stages(self) -> dict[str, float]:
        """What was counted: `device_ms`, or host times in ms by stage, and the calls by `calls/STAGE`."""
        for owner, name in self.stage_patches:
            delattr(owner, name)
        self.stage_patches = []
        if self.stage_profiler is not None:
            torch.cuda.synchronize()
            self.stage_profiler.stop()
            events = [
                (event.name, event.time_range.start, event.time_range.end)
                for event in self.stage_profiler.events() or ()
                if event.device_type == torch.autograd.DeviceType.CUDA
            ]
            self.stage_profiler = None
            return device_ms(events, len(layers_of(self)))
        found = {stage: ns / 1e6 for stage, ns in self.stage_ns.items()}
        return found | {f"calls/{stage}": float(count) for stage, count in self.stage_calls.items()}

    def _time_stage(self, owner: Any, name: str, stage: str) -> None:
        work: Callable[..., Any] | None = getattr(owner, name, None)
        if work is None:
            return
        host_ns, calls = self.stage_ns, self.stage_calls

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter_ns()
            try:
                return work(*args, **kwargs)
            finally:
                host_ns[stage] += time.perf_counter_ns() - started
                calls[stage] += 1

        setattr(owner, name, timed)
        self.stage_patches.append((owner, name))


def layers_of(worker: Any) -> list[Any]:
    """The attention layers of a worker's model."""
    context = worker.vllm_config.compilation_config.static_forward_context
    return [layer for layer in context.values() if hasattr(layer, "impl") and hasattr(layer, "kv_cache")]
