"""Counts of ours on their way to vLLM's /metrics.

The scheduler counts, and workers tell it what flex chose; its counts travel as vLLM's statistics of a KV connector do,
whose place is free: engines with cold heads, and those whose KV is not exact, have no connector. In the front end they
become metrics. Counts of a single request are in its response, where a connector's parameters would be.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

from farspan.engine_ext.config import DensePrefill, FlexPrefill
from farspan.engine_ext.plan import OFFLOAD_STATS, PREFILL_STATS, SELECTION_STATS
from farspan.vllm_compat.offload import cold_options
from farspan.vllm_compat.offload_metrics import OffloadMetrics
from farspan.vllm_compat.platform import chooses_farspan
from farspan.vllm_compat.prefill_metrics import PrefillMetrics, decision_of
from farspan.vllm_compat.selection_metrics import SelectionCounters
from farspan.vllm_compat.wrapping import wrap_once

OURS = {OFFLOAD_STATS, PREFILL_STATS, SELECTION_STATS}


# Statistics of a scheduler reach the front end in fixed fields. Drop when a scheduler can add its own (not in 0.33).
def follow_statistics() -> None:
    """Count in the core, and take in in the front end, what engines with approximate methods or cold heads do."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import metrics
    from vllm.v1.core.sched.scheduler import Scheduler

    wrap_once(Scheduler, "schedule", counting_prefill)
    wrap_once(Scheduler, "update_from_output", taking_selected)
    wrap_once(Scheduler, "make_stats", adding_counts)
    wrap_once(Scheduler, "_free_request", telling_of_the_request)
    wrap_once(metrics.KVConnectorLogging, "observe", leaving_ours_out)
    wrap_once(metrics.KVConnectorProm, "__init__", making_ours)


def is_sparse(vllm_config: Any) -> bool:
    """Whether an engine prefills sparsely, by requests of its own and not in blocks of Star Attention."""
    from farspan.engine_ext.support import config_of

    if not chooses_farspan(vllm_config):
        return False
    config = config_of(vllm_config)
    return config.star is None and not isinstance(config.prefill, DensePrefill)


def tells_selected(vllm_config: Any) -> bool:
    """Whether the workers of an engine tell what flex chose."""
    from farspan.engine_ext.layers import collects_statistics
    from farspan.engine_ext.support import config_of

    return (
        is_sparse(vllm_config)
        and isinstance(config_of(vllm_config).prefill, FlexPrefill)
        and collects_statistics(vllm_config)
    )


def counting_prefill(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Count the tokens of every chunk by how it prefills."""

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        from farspan.engine_ext.support import max_decode_len
        from farspan.scheduler.scheduler import scheduled_of

        output = stock(self, *args, **kwargs)
        counts = vars(self).setdefault("farspan_prefill", Counter() if is_sparse(self.vllm_config) else None)
        if counts is not None:
            for each in scheduled_of(output):
                if each.count > max_decode_len(self.vllm_config):
                    request = self.requests[each.req_id]
                    reason = decision_of(self.vllm_config, request, each)
                    counts[reason] += each.count
                    vars(request).setdefault("farspan_prefill", Counter())[reason] += each.count
        return output

    return schedule


def telling_of_the_request(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A request of an engine that prefills sparsely ends with what `RequestOutput.kv_transfer_params` then is."""

    def _free_request(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, request, *args, **kwargs)
        if getattr(self, "farspan_prefill", None) is None or not isinstance(result, tuple) or result[0] is not None:
            return result
        # What a KV connector would tell, and what one of an encoder cache does.
        return {"farspan": {"prefill_tokens": dict(getattr(request, "farspan_prefill", {}))}}, *result[1:]

    return _free_request


def taking_selected(stock: Callable[..., Any]) -> Callable[..., Any]:
    """What a worker told of the blocks that flex chose waits for the next statistics."""

    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        told = getattr(model_runner_output, "farspan_selected", None)
        if told is not None:
            waiting = vars(self).setdefault("farspan_selected", Counter())
            least = told.pop("least_kept", None)
            waiting.update(told)
            if least is not None:
                waiting["least_kept"] = least
        return stock(self, scheduler_output, model_runner_output)

    return update_from_output


def adding_counts(stock: Callable[..., Any]) -> Callable[..., Any]:
    def make_stats(self: Any, *args: Any, **kwargs: Any) -> Any:
        stats = stock(self, *args, **kwargs)
        places = {PREFILL_STATS: "farspan_prefill", SELECTION_STATS: "farspan_selected"}
        for name, place in places.items():
            counts = getattr(self, place, None)
            if stats is not None and counts:
                stats.kv_connector_stats = {**(stats.kv_connector_stats or {}), name: dict(counts)}
                counts.clear()
        return stats

    return make_stats


def leaving_ours_out(stock: Callable[..., None]) -> Callable[..., None]:
    def observe(self: Any, transfer_stats_data: dict[str, Any]) -> None:
        if not OURS & transfer_stats_data.keys():
            stock(self, transfer_stats_data)

    return observe


def making_ours(stock: Callable[..., None]) -> Callable[..., None]:
    def __init__(self: Any, vllm_config: Any, labelnames: list[str], per_engine_labelvalues: Any) -> None:
        stock(self, vllm_config, labelnames, per_engine_labelvalues)
        if self.prom_metrics is not None:
            return
        ours: list[OffloadMetrics | PrefillMetrics | SelectionCounters] = []
        if cold_options(vllm_config) is not None:
            ours.append(OffloadMetrics(self._counter_cls, self._gauge_cls, labelnames, per_engine_labelvalues))
        if is_sparse(vllm_config):
            ours.append(PrefillMetrics(self._counter_cls, labelnames, per_engine_labelvalues))
        if tells_selected(vllm_config):
            ours.append(SelectionCounters(self._counter_cls, self._gauge_cls, labelnames, per_engine_labelvalues))
        if ours:
            self.prom_metrics = Several(ours)

    return __init__


class Several:
    """Metrics that are told the same statistics; each takes its own."""

    def __init__(self, members: list[Any]) -> None:
        self.members = members

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Tell all of them."""
        for each in self.members:
            each.observe(transfer_stats_data, engine_idx)
