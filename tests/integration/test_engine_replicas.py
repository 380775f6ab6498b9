"""Data parallelism: each of two replicas behind one front end gives the tokens of a single engine."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import MAX_MODEL_LEN
from tests.integration.test_engine_features import ask, tokens_of
from tests.integration.test_engine_tokens import make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

PROMPTS = make_prompts((5, 300, 900), seed=11)
MAX_TOKENS = 6
FLEX = {"method": "flex", "gamma": 0.5, "min_budget": 0, "min_seq_len": 0, "min_chunk_len": 0}
MASK = {"method": "block_sparse", "block_size": 64, "sink_blocks": 1, "local_blocks": 2}
HOST_PAGES = 100
"""Of each replica: half of what the host memory of an offload holds."""
COLD_PAGE = 2 * 2 * 2 * 128 * 64 * 4
"""Bytes of a page: layers, heads, keys and values, tokens, components."""
OPTIONS: dict[str, dict[str, Any]] = {
    "flex-string-offload": {
        "prefill": FLEX,
        "string": {"shift": 64, "window": 16},
        "offload": {"host_memory": 2 * (HOST_PAGES + 0.5) * COLD_PAGE / 2**30},
    },
    "block_sparse": {"prefill": MASK},
}


async def answers_of(engine: Any, rank: int, extra_args: dict[str, Any] | None) -> list[list[int]]:
    """One prompt after the other, as what flex selects depends on the chunks."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, extra_args=extra_args)
    found = []
    for place, prompt in enumerate(PROMPTS):
        inputs, name = {"prompt_token_ids": prompt}, f"{rank}-{extra_args}-{place}"
        async for output in engine.generate(inputs, params, name, data_parallel_rank=rank):
            tokens = list(output.outputs[0].token_ids)
        found.append(tokens)
    return found


def check_metrics(name: str) -> None:
    """Of both replicas, as the front end's /metrics have them."""
    from prometheus_client import REGISTRY

    samples = [sample for family in REGISTRY.collect() for sample in family.samples]

    def by_engine(name: str, **labels: str) -> dict[str, float]:
        return {
            each.labels["engine"]: each.value
            for each in samples
            if each.name == f"vllm:farspan_{name}" and labels.items() <= each.labels.items()
        }

    all_tokens = sum(map(len, PROMPTS))
    for reason in ("selected", "request"):
        assert by_engine("prefill_tokens_total", reason=reason) == {"0": all_tokens, "1": all_tokens}
    if "offload" in OPTIONS[name]:
        assert by_engine("offload_host_pages") == {"0": HOST_PAGES, "1": HOST_PAGES}


@pytest.mark.parametrize("name", OPTIONS)
def test_data_parallel(
    make_llm: Any,
    model_dirs: Callable[[str], Path],
    name: str,
) -> None:
    """Sparsely and densely; with offload each has half of the host memory."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    arguments = {"max_num_batched_tokens": 256, "additional_config": {"farspan": OPTIONS[name]}}
    arguments["enable_prefix_caching"] = False
    single = make_llm(**arguments)
    methods = [None, {"farspan.method": "dense"}]
    expected = [
        [tokens_of(ask(single, [prompt], max_tokens=MAX_TOKENS, extra_args=how))[0] for prompt in PROMPTS]
        for how in methods
    ]
    assert expected[0] != expected[1]
    single.llm_engine.engine_core.shutdown()
    arguments |= {"model": str(model_dirs("llama")), "dtype": "float32", "enforce_eager": True}
    arguments |= {"max_model_len": MAX_MODEL_LEN, "data_parallel_size": 2, "attention_backend": "CUSTOM"}

    async def ask_replicas() -> None:
        engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        try:
            for rank in (0, 1):
                assert [await answers_of(engine, rank, how) for how in methods] == expected
            check_metrics(name)
        finally:
            engine.shutdown()

    asyncio.run(ask_replicas())
