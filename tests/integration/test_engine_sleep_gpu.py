"""On a GPU: an engine that slept gives the tokens that it gave before, with every method that has sleep mode."""

from typing import Any

import pytest

from tests.integration.test_engine_tokens import generate, make_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.e2e, pytest.mark.filterwarnings("default")]

PROMPTS = make_prompts((5, 129, 700, 1500), seed=41)
OPTIONS: dict[str, dict[str, Any]] = {
    "string": {"string": {"shift": 64, "window": 16}},
    "flex": {"prefill": {"method": "flex", "gamma": 0.9, "min_budget": 0, "min_seq_len": 0, "min_chunk_len": 0}},
    "block_sparse": {"prefill": {"method": "block_sparse", "local_blocks": 2}},
    "dense": {},
}


@pytest.mark.parametrize("method", OPTIONS)
def test_tokens_survive_sleep(make_llm: Any, method: str) -> None:
    """Level 1 keeps weights in host memory and forgets KV; level 2 forgets both, and weights are loaded again."""
    llm = make_llm(
        "llama",
        dtype="bfloat16",
        enable_sleep_mode=True,
        max_num_batched_tokens=512,
        max_num_seqs=8,
        additional_config={"farspan": OPTIONS[method]},
        gpu_memory_utilization=0.3,
    )
    before = generate(llm, PROMPTS)
    llm.sleep(level=1)
    llm.wake_up()
    assert generate(llm, PROMPTS) == before
    llm.sleep(level=2)
    llm.wake_up(tags=["weights"])
    llm.collective_rpc("reload_weights")
    llm.wake_up(tags=["kv_cache"])
    assert generate(llm, PROMPTS) == before
