"""What a worker told of the blocks that flex chose, on its way from a step's output to a scrape."""

import re
from types import SimpleNamespace
from typing import Any

import pytest
from farspan.engine_ext.config import FarspanConfig, FlexPrefill
from farspan.engine_ext.plan import PREFILL_STATS, SELECTION_STATS
from farspan.metrics import EXTENSION
from farspan.vllm_compat import runner as runner_module
from farspan.vllm_compat.runner import RunnerState, tell_decisions
from farspan.vllm_compat.selection_metrics import SelectionCounters
from farspan.vllm_compat.statistics import adding_counts, taking_selected, tells_selected
from prometheus_client import CollectorRegistry, Counter, Gauge
from vllm.v1.attention.backends.registry import AttentionBackendEnum

TOLD = {"blocks": 30, "causal_blocks": 100, "kept": 18, "kept_of": 20, "seconds": 0.5, "chunks": 1}


def test_counts_reach_the_scrape_once() -> None:
    scheduler = SimpleNamespace()
    update = taking_selected(lambda self, scheduler_output, model_runner_output: None)
    for least in (0.75, 0.5):
        update(scheduler, None, SimpleNamespace(farspan_selected={**TOLD, "least_kept": least}))
    update(scheduler, None, SimpleNamespace(farspan_selected=None))
    update(scheduler, None, SimpleNamespace())
    stats = SimpleNamespace(kv_connector_stats={PREFILL_STATS: {"selected": 7}})
    make_stats = adding_counts(lambda self: stats)
    told = make_stats(scheduler).kv_connector_stats
    stats.kv_connector_stats = None
    assert make_stats(scheduler).kv_connector_stats is None

    registry = CollectorRegistry()
    kinds = [lambda kind=kind, **arguments: kind(**arguments, registry=registry) for kind in (Counter, Gauge)]
    metrics = SelectionCounters(*kinds, ["engine"], {0: ["zero"]})
    metrics.observe(told)
    metrics.observe({PREFILL_STATS: {}})

    def value(name: str) -> float | None:
        return registry.get_sample_value(f"vllm:farspan_selection_{name}", {"engine": "zero"})

    assert {name: value(f"{name}_total") for name in TOLD} == {name: 2 * number for name, number in TOLD.items()}
    assert value("least_kept") == 0.5
    assert told.keys() == {PREFILL_STATS, SELECTION_STATS}


@pytest.mark.parametrize(
    ("options", "extension", "expected"),
    [
        ({"preset": "fast"}, EXTENSION, True),
        ({"preset": "fast"}, "", False),
        ({"prefill": {"method": "block_sparse"}}, EXTENSION, False),
        ({}, EXTENSION, False),
    ],
    ids=["flex", "not asked", "static masks", "dense"],
)
def test_who_tells(options: dict[str, Any], extension: str, expected: bool) -> None:
    config = SimpleNamespace(
        additional_config={"farspan": options},
        parallel_config=SimpleNamespace(worker_extension_cls=extension),
        attention_config=SimpleNamespace(backend=AttentionBackendEnum.CUSTOM, backend_per_kind=None),
    )
    assert tells_selected(config) is expected


@pytest.mark.parametrize(
    ("rows", "extension", "sentences"),
    [(4, "", ["coverage_rows=4 measures nothing.*--worker-extension-cls"]), (4, EXTENSION, []), (0, "", [])],
    ids=["unread", "read", "off"],
)
def test_rows_that_nobody_reads_get_a_warning(
    rows: int, extension: str, sentences: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    log = SimpleNamespace(info_once=lambda *_: None, warning_once=told.append)
    monkeypatch.setattr("vllm.logger.init_logger", lambda name: log)
    monkeypatch.setattr("farspan.decisions.decision_line", lambda builders: "")
    monkeypatch.setattr(runner_module, "metadata_builders", lambda runner: [None])
    config = FarspanConfig(prefill=FlexPrefill(coverage_rows=rows))
    parallel = SimpleNamespace(rank=0, worker_extension_cls=extension)
    runner = SimpleNamespace(
        device="cpu", farspan_state=RunnerState(config), vllm_config=SimpleNamespace(parallel_config=parallel)
    )
    tell_decisions(runner, None)
    assert len(told) == len(sentences)
    assert all(re.search(sentence, text) for sentence, text in zip(sentences, told, strict=True))
