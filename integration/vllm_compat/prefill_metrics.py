"""How many tokens prefilled sparsely, and how many densely in spite of a sparse method and why, in vLLM's /metrics."""

from typing import Any

from farspan.engine_ext.config import DensePrefill
from farspan.engine_ext.plan import PREFILL_STATS
from farspan.engine_ext.selection.crossover import AttentionSize, sparse_kernel_of
from farspan.scheduler.residency import Scheduled

NAME = "vllm:farspan_prefill_tokens"
TEXT = "Prompt tokens computed, by whether sparsely or densely and why."
REASONS = {
    "selected": "sparse",
    "request": "dense",
    "crossover": "dense",
    "min_seq_len": "dense",
    "min_chunk_len": "dense",
}
"""By reason: how the tokens were computed. "request": it asked for method dense; "crossover": sparse would have taken
longer, as was measured; the others: shorter than the option."""


def decision_of(vllm_config: Any, request: Any, scheduled: Scheduled) -> str:
    """The reason in `REASONS` for how a chunk prefills, as the worker will decide it.

    request: vLLM's, in the scheduler.
    """
    from farspan.engine_ext.pass_maker import fallback_reason
    from farspan.engine_ext.requests import prefill_of_request
    from farspan.engine_ext.support import config_of

    params, prompt = request.sampling_params, request.prompt_token_ids
    prefill = prefill_of_request(config_of(vllm_config), params.extra_args if params is not None else None)
    if isinstance(prefill, DensePrefill):
        return "request"
    model_config = vllm_config.model_config
    num_q_heads = model_config.get_num_attention_heads(vllm_config.parallel_config)
    head_size = model_config.get_head_size()
    size = AttentionSize(num_q_heads, head_size, sparse_kernel_of(vllm_config, head_size))
    end = scheduled.start + scheduled.count
    reason = fallback_reason(prefill, scheduled.count, end, None if prompt is None else len(prompt), size)
    return reason or "selected"


class PrefillMetrics:
    """The Prometheus counter `vllm:farspan_prefill_tokens`, one for every engine of the front end and every reason."""

    def __init__(self, counter_cls: Any, labelnames: list[str], labelvalues: dict[int, Any]) -> None:
        """counter_cls: of prometheus_client, or what stands in for it."""
        counter = counter_cls(name=NAME, documentation=TEXT, labelnames=[*labelnames, "path", "reason"])
        self.counters = {
            (engine, reason): counter.labels(*values, path, reason)
            for engine, values in labelvalues.items()
            for reason, path in REASONS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add what a step's statistics tell; those of others are left alone."""
        for reason, num_tokens in transfer_stats_data.get(PREFILL_STATS, {}).items():
            self.counters[engine_idx, reason].inc(num_tokens)
