"""A KV cache in fp8 through vLLM: tokens are those of keys and values rounded before they are stored in float32."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from tests.integration.test_engine_features import METHODS
from tests.integration.test_engine_offload import offload_state, offloading, run_checked
from tests.integration.test_engine_speculation import BUDGETS, NGRAM, PROMPTS, SIZES
from tests.integration.test_engine_tokens import generate

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

KEY_SCALE, VALUE_SCALE = 0.02, 0.125


def give_scales(worker: Any) -> None:
    """As a checkpoint with scales of its KV cache does."""
    for module in worker.model_runner.get_model().modules():
        if hasattr(module, "_k_scale_float"):
            module._k_scale_float, module._v_scale_float = KEY_SCALE, VALUE_SCALE


@pytest.fixture(scope="module")
def start(make_module_llm: Callable[..., Any]) -> Callable[..., Any]:
    def start_engine(method: str, **arguments: Any) -> Any:
        options = {"additional_config": {"farspan": METHODS[method]}}
        llm = make_module_llm("llama", **{**SIZES, **options, **arguments})
        llm.collective_rpc(give_scales)
        return llm

    return start_engine


def rounded(heads: torch.Tensor, scale: float) -> torch.Tensor:
    """What float8 keeps of them."""
    return (heads / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


@pytest.fixture(scope="module")
def expected(start: Callable[..., Any]) -> Callable[[str], list[list[int]]]:
    """Tokens where keys and values are rounded before they are stored in float32."""
    from farspan.engine_ext import impl

    stock = impl.write_kv

    def write_rounded(key: torch.Tensor, value: torch.Tensor, *rest: Any) -> None:
        stock(rounded(key, KEY_SCALE), rounded(value, VALUE_SCALE), *rest)

    @cache
    def tokens(method: str) -> list[list[int]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(impl, "write_kv", write_rounded)
            return generate(start(method), PROMPTS, BUDGETS)

    return tokens


@pytest.mark.parametrize("method", ["dense", "flex", "block_sparse", "string"])
def test_fp8(start: Callable[..., Any], expected: Callable[[str], list[list[int]]], method: str) -> None:
    """In chunks, with cached prefixes, and with drafts that are verified."""
    tokens = expected(method)
    drafts = {"speculative_config": NGRAM} if method == "dense" else {}
    llm = start(method, kv_cache_dtype="fp8", **drafts)
    for _ in range(2):
        assert generate(llm, PROMPTS, BUDGETS) == tokens


def test_fp8_pages_in_host_memory(start: Callable[..., Any], expected: Callable[[str], list[list[int]]]) -> None:
    """One head of two is hot in the first layer, none in the second; slots hold half of the longest prompt."""
    tokens = expected("dense")
    llm = start("dense", **offloading(24, hot=[1, 0], kv_cache_dtype="fp8"))
    assert run_checked(llm, PROMPTS, BUDGETS) == tokens
    state = offload_state(llm)
    assert min(state["spilled"], state["staged"]) > 0
