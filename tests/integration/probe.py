"""What a test asks of a worker, wherever the worker runs: `llm.collective_rpc("attention_launches")`."""

from collections import Counter
from typing import Any


class WorkerProbe:
    """Mixed into vLLM's worker by `worker_extension_cls`."""

    def attention_launches(self) -> dict[str, dict[str, int]]:
        """By class name of the attention impl: how often its layers launched which path."""
        worker: Any = self
        found: dict[str, Counter[str]] = {}
        for module in worker.model_runner.get_model().modules():
            if hasattr(module, "impl"):
                counts = found.setdefault(type(module.impl).__name__, Counter())
                counts.update(getattr(module.impl, "launches", {}))
        return {name: dict(counts) for name, counts in found.items()}

    def planned_step(self) -> int | None:
        """Number of the last step, as the scheduler's plan told the runner; None without plans."""
        from farspan.vllm_compat.runner import state_of

        worker: Any = self
        plan = state_of(worker.model_runner).plan
        return None if plan is None else plan.step
