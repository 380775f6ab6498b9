"""On a GPU, in CUDA graphs and with async scheduling: the tokens of vLLM's FLASH_ATTN, in bfloat16."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.test_engine_features import METHODS, engine_arguments
from tests.integration.test_engine_guards import GRAPHS
from tests.integration.test_engine_tokens import launches, make_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.e2e, pytest.mark.filterwarnings("default")]

PROMPTS = make_prompts((1, 16, 129, 400, 700), seed=41)
NUM_TOKENS = 24
MARGIN = 0.15
"""Difference of the two best log-probabilities below which rounding may choose the other token."""
Answer = tuple[list[int], list[float]]
"""Greedy tokens, and by how much each was ahead of the next best."""


def arguments_of(method: str | None) -> dict[str, Any]:
    made = {**engine_arguments(method), "dtype": "bfloat16", "enforce_eager": False, "compilation_config": GRAPHS}
    if method == "offload":
        # Half as many bytes a page as in float32, for which these arguments are.
        made["kv_cache_memory_bytes"] //= 2
        made["additional_config"]["farspan"]["offload"]["host_memory"] /= 2
    return made


def ask(llm: Any) -> list[Answer]:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=2)
    answers = []
    for output in llm.generate([{"prompt_token_ids": each} for each in PROMPTS], params, use_tqdm=False):
        made = output.outputs[0]
        best = [sorted((each.logprob for each in step.values()), reverse=True) for step in made.logprobs]
        answers.append((list(made.token_ids), [first - second for first, second, *_ in best]))
    return answers


def num_equal(found: list[Answer], expected: list[Answer]) -> int:
    """Tokens until answers part; fails where the expected one was ahead by more than rounding takes."""
    count = 0
    for request, ((tokens, _), (wanted, margins)) in enumerate(zip(found, expected, strict=True)):
        for place, (token, other, margin) in enumerate(zip(tokens, wanted, margins, strict=True)):
            if token != other:
                assert margin < MARGIN, (request, place, tokens, wanted, margins)
                break
            count += 1
    return count


@pytest.fixture(scope="module")
def stock(make_module_llm: Callable[..., Any]) -> list[Answer]:
    llm = make_module_llm("llama", "FLASH_ATTN", **arguments_of(None))
    answers = ask(llm)
    llm.llm_engine.engine_core.shutdown()
    return answers


@pytest.mark.parametrize("method", ["dense", "flex", "offload", "block_sparse"])
def test_tokens_of_flash_attn(make_module_llm: Callable[..., Any], stock: list[Answer], method: str) -> None:
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    assert method in METHODS
    llm = make_module_llm("llama", "CUSTOM", **arguments_of(method))
    assert isinstance(llm.llm_engine.engine_core.engine_core.scheduler, AsyncScheduler)
    found = ask(llm)
    count, total = num_equal(found, stock), len(PROMPTS) * NUM_TOKENS
    print(f"{method}: {count} of {total} tokens until answers part; {launches(llm)}")
    assert count >= 0.6 * total
    llm.llm_engine.engine_core.shutdown()
