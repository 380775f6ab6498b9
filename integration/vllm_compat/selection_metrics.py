"""What flex prefill read and kept, in vLLM's /metrics, of engines whose worker extension collects it."""

from typing import Any

from farspan.engine_ext.plan import SELECTION_STATS

COUNTERS = {
    "blocks": "Blocks that query heads read in chunks that flex computed, of the rank that answers.",
    "causal_blocks": "Blocks that dense attention would have read there.",
    "kept": "Sum of the shares of the attention mass that the blocks kept.",
    "kept_of": "Number of those shares: one a head and measured row, or a head and span of query tokens that chose.",
    "seconds": "Time of the device for choosing blocks, all layers.",
    "chunks": "Chunks of requests that blocks were chosen for.",
}
LEAST_KEPT = "Least share of the attention mass that the blocks kept."


class SelectionCounters:
    """Prometheus metrics `vllm:farspan_selection_*`, one of each for every engine of the front end."""

    def __init__(self, counter_cls: Any, gauge_cls: Any, labelnames: list[str], labelvalues: dict[int, Any]) -> None:
        """counter_cls, gauge_cls: of prometheus_client, or what stands in for them."""
        self.counters = {
            name: counter_cls(name=f"vllm:farspan_selection_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        name = "vllm:farspan_selection_least_kept"
        self.least_kept = gauge_cls(name=name, documentation=LEAST_KEPT, labelnames=labelnames)
        self.labelvalues = labelvalues

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what a step's statistics tell; those of others are left alone."""
        told = transfer_stats_data.get(SELECTION_STATS, {})
        values = self.labelvalues[engine_idx]
        for name, counter in self.counters.items():
            counter.labels(*values).inc(told.get(name, 0))
        if "least_kept" in told:
            self.least_kept.labels(*values).set(told["least_kept"])
