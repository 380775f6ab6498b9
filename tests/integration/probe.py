"""What a test asks of a worker, wherever the worker runs: `llm.collective_rpc("attention_launches")`."""

import functools
from collections import Counter
from typing import Any

from farspan.decisions import decisions_of
from farspan.engine_ext import impl
from farspan.engine_ext.passes import Decode, Dense, LayerContext, Pass
from farspan.vllm_compat.runner import metadata_builders, state_of

_launches: list[tuple[LayerContext, str]] = []


def kinds(each: Pass) -> list[str]:
    """The launches that a pass makes, by name."""
    if isinstance(each.work, Decode):
        return ["decode"]
    if isinstance(each.work, Dense):
        return ["prefill_dense"]
    return ["prefill_sparse"]


def count_passes() -> None:
    """Note the passes of all engines of this process, from here on."""
    stock = impl.attend

    @functools.wraps(stock)
    def attend(each: Pass, query: Any, kv: Any, layer: LayerContext, *rest: Any) -> Any:
        _launches.extend((layer, kind) for kind in kinds(each))
        return stock(each, query, kv, layer, *rest)

    impl.attend = attend


count_passes()


class WorkerProbe:
    """Mixed into vLLM's worker by `worker_extension_cls`."""

    __reads_selection_stats__ = True

    def attention_launches(self) -> dict[str, dict[str, int]]:
        """By class name of the attention impl: how often its layers launched which path."""
        worker: Any = self
        runner = worker.model_runner
        names = {type(each.impl).__name__ for each in runner.get_model().modules() if hasattr(each, "impl")}
        own = {id(layer) for builder in metadata_builders(runner) for layer in builder.layers.values()}
        counts = Counter(kind for layer, kind in _launches if id(layer) in own)
        return {name: dict(counts) if name == "FarspanImpl" else {} for name in names}

    def selection_rows(self) -> list[dict[str, Any]]:
        """As `farspan.metrics.SelectionMetrics.farspan_selection`."""
        worker: Any = self
        layers = [layer for builder in metadata_builders(worker.model_runner) for layer in builder.layers.values()]
        return [row for layer in layers if layer.selector.stats is not None for row in layer.selector.stats.rows()]

    def decisions(self) -> dict[str, Any]:
        """What the worker decided at its start, as the log has it."""
        worker: Any = self
        return decisions_of(metadata_builders(worker.model_runner))

    def memory_for_activations(self) -> int:
        """Bytes that vLLM's memory profile leaves free for what a step allocates."""
        worker: Any = self
        return worker.peak_activation_memory

    def planned_step(self) -> int | None:
        """Number of the last step, as the scheduler's plan told the runner; None without plans."""
        worker: Any = self
        plan = state_of(worker.model_runner).plan
        return None if plan is None else plan.step

    def selected_pages(self) -> list[int]:
        """Pages in host memory that selective decode read, and those it chose from, once for every layer and head."""
        worker: Any = self
        totals: list[int] = state_of(worker.model_runner).cold.selection.buffers.totals.tolist()
        return totals

    def offload_state(self) -> dict[str, Any]:
        """Check the pools of cold heads, and tell what was done with them so far."""
        worker: Any = self
        cold = state_of(worker.model_runner).cold
        cold.check_integrity()
        return {
            "num_slots": cold.sizes.num_slots,
            "num_blocks": cold.sizes.num_blocks,
            "spilled": cold.num_spilled,
            "loaded": cold.num_loaded,
            "staged": cold.num_staged,
        }
