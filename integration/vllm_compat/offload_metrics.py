"""What happened to cold pages, in vLLM's /metrics: the scheduler's counts become metrics here, in the front end."""

from typing import Any

from farspan.engine_ext.plan import OFFLOAD_STATS

COUNTERS = {
    "bytes_to_host": "Bytes of KV copied from GPU to host memory, per rank.",
    "bytes_from_host": "Bytes of KV read or copied from host memory, per rank.",
    "steps": "Steps that computed tokens.",
    "steps_that_read": "Steps whose attention waited for host memory.",
    "select_bytes_on_host": "Bytes of KV in host memory that selective decode chose from, per rank.",
    "select_audited": "Query heads of requests on which selective decode was held against all keys.",
    "select_kept": "Sum over those of the share of the attention mass that was kept.",
    "select_certified": "Sum over those of the share that was certain without reading the rest.",
}
GAUGES = {
    "slots": "Pages of cold KV heads that GPU memory can hold.",
    "slots_used": "Pages of cold KV heads that GPU memory holds.",
    "host_pages": "Pages of cold KV heads that host memory can hold.",
    "host_pages_used": "Pages of cold KV heads that lie in host memory alone.",
    "select_least_kept": "Least share of the attention mass that selective decode kept in its last audit.",
    "select_least_certified": "Least share that was certain in the last audit.",
}


class OffloadMetrics:
    """Prometheus metrics `vllm:farspan_offload_*`, one of each for every engine of the front end."""

    def __init__(self, counter_cls: Any, gauge_cls: Any, labelnames: list[str], labelvalues: dict[int, Any]) -> None:
        """counter_cls, gauge_cls: of prometheus_client, or what stands in for them."""

        def make(kind: Any, texts: dict[str, str]) -> dict[str, Any]:
            return {
                name: kind(name=f"vllm:farspan_offload_{name}", documentation=text, labelnames=labelnames)
                for name, text in texts.items()
            }

        self.counters, self.gauges = make(counter_cls, COUNTERS), make(gauge_cls, GAUGES)
        self.labelvalues = labelvalues

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what a step's statistics tell; those of others are left alone."""
        counts = transfer_stats_data.get(OFFLOAD_STATS, {})
        values = self.labelvalues[engine_idx]
        for name, counter in self.counters.items():
            counter.labels(*values).inc(counts.get(name, 0))
        for name, gauge in self.gauges.items():
            if name in counts:
                gauge.labels(*values).set(counts[name])
