"""KV that a connector of vLLM's stores and brings back is that of exact attention."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_engine_tokens import generate, make_prompts, run

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

PROMPTS = make_prompts((70, 300), seed=41)


def test_kv_comes_back_from_a_connector(make_llm: Callable[..., Any], tmp_path: Path) -> None:
    """Into an engine that has computed nothing, through files."""
    expected = generate(make_llm(), PROMPTS)
    connector = {
        "kv_connector": "ExampleConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path)},
    }
    engines = [make_llm(block_size=32, kv_transfer_config=connector) for _ in range(2)]
    assert generate(engines[0], PROMPTS) == expected
    outputs = run(engines[1], PROMPTS)
    assert [output.num_cached_tokens for output in outputs] == [64, 288]
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
