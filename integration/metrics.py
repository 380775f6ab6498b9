"""What sparse prefill did inside a running engine: density, coverage, pattern and selection time by layer and head.

Start the engine with `LLM(..., worker_extension_cls="farspan.metrics.SelectionMetrics")`; then `read_selection(llm)`
after `llm.generate(...)`. The same rows of a running server are read over HTTP: see docs/deploying.md.
"""

import importlib
import warnings
from typing import Any

from farspan.engine_ext.errors import UnsupportedEngineError
from farspan.vllm_compat.runner import metadata_builders

EXTENSION = "farspan.metrics.SelectionMetrics"
NOTHING_SELECTED = (
    "No chunk was prefilled by flex since the last reset, so there is no density or coverage to read. Prefill "
    'is dense without {"prefill": {"method": "flex"}}, and for prompts or chunks shorter than the crossover: send '
    "longer ones, or set prefill.min_seq_len and prefill.min_chunk_len."
)


class SelectionMetrics:
    """Mixed into vLLM's workers by `worker_extension_cls`; reached through `LLM.collective_rpc`."""

    __reads_selection_stats__ = True
    """Asks the layers of this engine to add up what they select. vLLM lets no two extensions share a plain name."""

    def farspan_selection(self, reset: bool = False) -> list[dict[str, Any]]:
        """Rows of this rank's layers and heads since the last reset; see `read_selection`."""
        worker: Any = self
        rows = []
        layers = [layer for builder in metadata_builders(worker.model_runner) for layer in builder.layers.values()]
        for layer in sorted(layers, key=lambda layer: layer.index):
            stats = None if layer.selector is None else layer.selector.stats
            if stats is not None:
                order = None if layer.head_order is None else layer.head_order.q_heads.tolist()
                for row in stats.rows():
                    head = row["head"] if order is None else order[int(row["head"] or 0)]
                    rows.append({"rank": worker.rank, "layer": layer.index, **row, "head": head})
                if reset:
                    stats.reset()
        return rows


def read_selection(llm: Any, reset: bool = False) -> list[dict[str, Any]]:
    """One row per rank, layer and query head of the rank, for the chunks that flex prefilled since the last reset.

    llm: a `vllm.LLM` whose `worker_extension_cls` is `farspan.metrics.SelectionMetrics`, or a subclass of it. Waits for
    the device. Raises UnsupportedEngineError for an engine without it. Warns where there are no rows, unless `reset`.
    Keys: rank, layer, head; density (blocks read over causal blocks), density_min (of the sparsest chunk); coverage,
    coverage_min (mean and least share of the attention mass kept: on the `coverage_rows` rows measured, where there are
    any; else on the rows that chose the blocks, span by span of 128 query tokens; None with selection "flexprefill" and
    `coverage_rows` 0); query_aware (share of the chunks whose blocks were selected query by query, the others by
    columns and diagonals) and divergence (mean sqrt of the Jensen-Shannon divergence, natural log), both 0 but for
    selection "flexprefill"; selection_ms (time of the device for choosing the blocks of a chunk in the layer, all heads
    together); chunks, measured_rows.
    """
    check_extension(llm.llm_engine.vllm_config.parallel_config.worker_extension_cls)
    rows = [row for rows in llm.collective_rpc("farspan_selection", kwargs={"reset": reset}) for row in rows]
    if not rows and not reset:
        warnings.warn(NOTHING_SELECTED, stacklevel=2)
    return rows


def check_extension(name: str) -> None:
    """Raise UnsupportedEngineError unless an engine's `worker_extension_cls` is `SelectionMetrics` or a subclass."""
    module, _, attribute = name.rpartition(".")
    extension = getattr(importlib.import_module(module), attribute) if module else None
    if not (isinstance(extension, type) and issubclass(extension, SelectionMetrics)):
        raise UnsupportedEngineError(
            f"worker_extension_cls={name!r}; density and coverage are read through {EXTENSION!r} or a subclass of it. "
            f'Start the engine with LLM(..., worker_extension_cls="{EXTENSION}"), or a server with '
            f"--worker-extension-cls {EXTENSION}."
        )
