"""What sparse prefill did inside a running engine: density, pattern and coverage per layer and head.

Start the engine with `LLM(..., worker_extension_cls="farspan.metrics.SelectionMetrics")`; then `read_selection(llm)`
after `llm.generate(...)`. Coverage is there unless the option `coverage_rows` is 0. Without the extension nothing is
added up.
"""

from typing import Any

from farspan.vllm_compat import metadata_builders


class SelectionMetrics:
    """Mixed into vLLM's workers by `worker_extension_cls`; reached through `LLM.collective_rpc`."""

    reads_selection_stats = True
    """Asks the layers of this engine to add up what they select."""

    def farspan_selection(self, reset: bool = False) -> list[dict[str, Any]]:
        """Rows of this rank's layers and heads since the last reset; see `read_selection`."""
        worker: Any = self
        rows = []
        layers = [layer for builder in metadata_builders(worker.model_runner) for layer in builder.layers.values()]
        for layer in sorted(layers, key=lambda layer: layer.index):
            stats = None if layer.selector is None else layer.selector.stats
            if stats is not None:
                rows += [{"rank": worker.rank, "layer": layer.index, **row} for row in stats.rows()]
                if reset:
                    stats.reset()
        return rows


def read_selection(llm: Any, reset: bool = False) -> list[dict[str, Any]]:
    """One row per rank, layer and query head of the rank, for the chunks that flex prefilled since the last reset.

    llm: a `vllm.LLM` whose `worker_extension_cls` is `farspan.metrics.SelectionMetrics`. Waits for the device. Empty
    where no chunk was prefilled sparsely: chunks over less than `min_seq_len` tokens, or of fewer than `min_chunk_len`,
    are dense.
    Keys: rank, layer, head, density (blocks read over causal blocks; a head that was computed again read its list and
    all of them), query_aware (share of the chunks whose blocks were selected query by query, the others by columns and
    diagonals), divergence (mean sqrt of the Jensen-Shannon divergence, natural log), coverage (mean share of the
    attention mass kept on sampled rows, after repair; None where `coverage_rows` is 0), repaired (share of the chunks
    in which the head kept too little and was computed again), chunks, measured_rows.
    """
    return [row for rows in llm.collective_rpc("farspan_selection", kwargs={"reset": reset}) for row in rows]
