"""What flex prefill did inside an engine can be read from outside."""

from types import SimpleNamespace
from typing import Any

import pytest
from farspan.engine_ext.errors import UnsupportedEngineError
from farspan.metrics import EXTENSION, read_selection

from tests.integration.test_engine_tokens import generate, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]


@pytest.mark.parametrize("name", ["", "tests.integration.probe.WorkerProbe"])
def test_an_engine_without_the_extension_is_told_what_to_do(name: str) -> None:
    engine = SimpleNamespace(vllm_config=SimpleNamespace(parallel_config=SimpleNamespace(worker_extension_cls=name)))
    with pytest.raises(
        UnsupportedEngineError, match=f"worker_extension_cls='{name}'.*--worker-extension-cls {EXTENSION}"
    ):
        read_selection(SimpleNamespace(llm_engine=engine))


def test_engine_tells_density_pattern_and_coverage(make_llm: Any) -> None:
    prefill = {"method": "flex", "gamma": 0.9, "min_budget": 0, "min_seq_len": 0, "min_chunk_len": 0}
    llm = make_llm(
        max_num_batched_tokens=512,
        max_num_seqs=16,
        worker_extension_cls="farspan.metrics.SelectionMetrics",
        additional_config={"farspan": {"prefill": prefill}},
        enable_prefix_caching=False,
    )
    with pytest.warns(UserWarning, match="shorter than the crossover"):
        assert read_selection(llm) == []
    generate(llm, make_prompts((1500,), seed=5), 2)
    rows = read_selection(llm, reset=True)
    assert [(row["rank"], row["layer"], row["head"]) for row in rows] == [(0, i, h) for i in range(2) for h in range(4)]
    for row in rows:
        assert row["chunks"] == 3
        assert row["measured_rows"] == 0
        assert 0 < row["density_min"] <= row["density"] <= 1
        # By the rows that chose, which keep more than gamma.
        assert 0.9 < row["coverage_min"] <= row["coverage"] <= 1 + 1e-6
        assert row["query_aware"] == row["divergence"] == 0
        assert 0 < row["selection_ms"] < 60_000
    assert read_selection(llm, reset=True) == []
