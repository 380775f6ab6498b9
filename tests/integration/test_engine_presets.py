"""Every preset starts an engine that says so, and answers as its method does."""

from typing import Any

import pytest
from farspan.engine_ext.presets import PRESETS

from tests.integration.test_engine_offload import offloading
from tests.integration.test_engine_tokens import generate, launches, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

PROMPTS = make_prompts((17, 300, 700), seed=41)
SMALL = {"max_model_len": 768, "max_num_batched_tokens": 256, "max_num_seqs": 16, "enable_prefix_caching": False}
# Prompts this short are otherwise dense.
ALWAYS = {"min_seq_len": 0, "min_chunk_len": 0, "min_budget": 0}


def options(preset: str, **beside: Any) -> dict[str, Any]:
    return {**SMALL, "block_size": 16, "additional_config": {"farspan": {"preset": preset, **beside}}}


OF_ENGINES: dict[str, dict[str, Any]] = {
    "exact": options("exact"),
    "balanced": options("balanced", prefill=ALWAYS),
    "fast": options("fast", prefill=ALWAYS),
    "max-context": offloading(20, tokens=256, farspan={"preset": "max-context"}),
}
"""Arguments of an engine, by preset."""
GAMMAS = {"balanced": 0.95, "fast": 0.9}


def test_presets(make_llm: Any) -> None:
    assert OF_ENGINES.keys() == PRESETS.keys()
    stock = make_llm("llama", None, **SMALL)
    expected = generate(stock, PROMPTS)
    stock.llm_engine.engine_core.shutdown()
    for preset, arguments in OF_ENGINES.items():
        llm = make_llm(**arguments)
        found = generate(llm, PROMPTS)
        (decisions,) = llm.collective_rpc("decisions")
        assert decisions["preset"] == preset
        assert (decisions["offload"] is not None) == (preset == "max-context")
        is_sparse = preset in GAMMAS
        assert ("prefill_sparse" in launches(llm)) == is_sparse
        if is_sparse:
            assert decisions["method"] == "flex"
            assert decisions["prefill"]["gamma"] == GAMMAS[preset]
            assert all(len(tokens) == 12 for tokens in found)
        else:
            assert found == expected, preset
        llm.llm_engine.engine_core.shutdown()
