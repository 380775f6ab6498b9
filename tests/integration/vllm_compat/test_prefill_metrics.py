"""Why a chunk prefilled densely, as the scheduler counts it, is why the worker does it."""

from types import SimpleNamespace
from typing import Any

import pytest
from farspan.engine_ext.plan import OFFLOAD_STATS, PREFILL_STATS
from farspan.scheduler.residency import Scheduled
from farspan.vllm_compat.prefill_metrics import REASONS, PrefillMetrics, decision_of
from farspan.vllm_compat.statistics import adding_counts, counting_prefill
from prometheus_client import CollectorRegistry, Counter
from vllm.v1.attention.backends.registry import AttentionBackendEnum


def engine(options: dict[str, Any], num_drafts: int = 0) -> Any:
    model_config = SimpleNamespace(get_num_attention_heads=lambda parallel: 32, get_head_size=lambda: 128)
    return SimpleNamespace(
        additional_config={"farspan": options},
        model_config=model_config,
        parallel_config=None,
        speculative_config=SimpleNamespace(num_speculative_tokens=num_drafts) if num_drafts else None,
        attention_config=SimpleNamespace(backend=AttentionBackendEnum.CUSTOM, backend_per_kind=None),
    )


def request(prompt_len: int, **extra_args: Any) -> Any:
    params = SimpleNamespace(extra_args=extra_args or None)
    return SimpleNamespace(sampling_params=params, prompt_token_ids=[3] * prompt_len)


BY_HAND = {"preset": "fast", "prefill": {"min_seq_len": 1000, "min_chunk_len": 100}}
MASK = {"prefill": {"method": "block_sparse"}}


@pytest.mark.parametrize(
    ("options", "prompt_len", "start", "count", "extra_args", "reason"),
    [
        (BY_HAND, 1200, 0, 500, {}, "selected"),
        (BY_HAND, 1200, 0, 500, {"farspan.method": "dense"}, "request"),
        (BY_HAND, 999, 0, 500, {}, "min_seq_len"),
        (BY_HAND, 1200, 1101, 99, {}, "min_chunk_len"),
        ({"preset": "fast"}, 500, 0, 500, {}, "crossover"),
        ({"preset": "fast"}, 65536, 32768, 8192, {}, "selected"),
        (MASK, 20, 0, 20, {}, "selected"),
    ],
    ids=["sparse", "request", "prompt", "chunk", "crossover", "long", "mask"],
)
def test_reasons(
    options: dict[str, Any], prompt_len: int, start: int, count: int, extra_args: dict[str, Any], reason: str
) -> None:
    found = decision_of(engine(options), request(prompt_len, **extra_args), Scheduled("r", start, count))
    assert found == reason
    assert found in REASONS


class Output:
    """A SchedulerOutput with one new request of a chunk each."""

    def __init__(self, **counts: int) -> None:
        self.num_scheduled_tokens = counts
        self.scheduled_new_reqs = [
            SimpleNamespace(req_id=name, num_computed_tokens=0, block_ids=([1],)) for name in counts
        ]
        self.scheduled_cached_reqs = SimpleNamespace(
            req_ids=[], new_block_ids=[], num_computed_tokens=[], resumed_req_ids=set()
        )


def test_counts_reach_the_counter_once() -> None:
    requests = {"a": request(2000), "b": request(300), "c": request(5)}
    scheduler = SimpleNamespace(vllm_config=engine(BY_HAND), requests=requests)
    counting_prefill(lambda self: Output(a=2000, b=300, c=1))(scheduler)
    stats = SimpleNamespace(kv_connector_stats={OFFLOAD_STATS: {"steps": 1}})
    make_stats = adding_counts(lambda self: stats)
    told = make_stats(scheduler).kv_connector_stats
    assert told == {OFFLOAD_STATS: {"steps": 1}, PREFILL_STATS: {"selected": 2000, "min_seq_len": 300}}
    stats.kv_connector_stats = None
    assert make_stats(scheduler).kv_connector_stats is None

    registry = CollectorRegistry()
    metrics = PrefillMetrics(
        lambda **arguments: Counter(**arguments, registry=registry), ["engine"], {0: ["zero"], 1: ["one"]}
    )
    metrics.observe(told, engine_idx=1)
    metrics.observe({OFFLOAD_STATS: {}}, engine_idx=1)

    def value(engine_name: str, path: str, reason: str) -> float | None:
        labels = {"engine": engine_name, "path": path, "reason": reason}
        return registry.get_sample_value("vllm:farspan_prefill_tokens_total", labels)

    assert value("one", "sparse", "selected") == 2000
    assert value("one", "dense", "min_seq_len") == 300
    assert value("zero", "sparse", "selected") == 0


def test_drafts_are_not_counted() -> None:
    scheduler = SimpleNamespace(vllm_config=engine(BY_HAND, num_drafts=3), requests={"b": request(300)})
    counting_prefill(lambda self: Output(a=4, b=300))(scheduler)
    assert scheduler.farspan_prefill == {"min_seq_len": 300}


def test_dense_engines_count_nothing() -> None:
    scheduler = SimpleNamespace(vllm_config=engine({}), requests={})
    counting_prefill(lambda self: Output(a=10))(scheduler)
    assert scheduler.farspan_prefill is None
