"""Models that differ from the plain Llama beside attention, with every method.

vLLM's CPU build has no adapters for experts, so that these are not models of test_engine_features.
"""

from typing import Any

import pytest

from tests.integration.test_engine_features import MANY, METHODS, PROMPT, ask, engine_arguments, tokens_of

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

PROMPTS = [*MANY[:3], PROMPT]
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256, "rope_theta": 10000.0,
}  # fmt: skip


def check_every_method(make_llm: Any, architecture: str, **arguments: Any) -> None:
    """Methods that read every key give the tokens of vLLM's own backend, string its own in any chunks."""

    def tokens(method: str | None, *, is_dense: bool = False, **changes: Any) -> list[list[int]]:
        backend = None if method is None else "CUSTOM"
        sizes = {**engine_arguments(method), "max_num_seqs": 16}
        llm = make_llm(architecture, backend, **{**sizes, **arguments, **changes})
        found = tokens_of(ask(llm, PROMPTS, extra_args={"farspan.method": "dense"} if is_dense else None))
        llm.llm_engine.engine_core.shutdown()
        return found

    expected = tokens(None)
    for method in METHODS.keys() - {"string"}:
        assert tokens(method) == expected, method
    assert tokens("flex", is_dense=True) == expected
    shifted = tokens("string")
    assert shifted != expected
    assert tokens("string", max_num_batched_tokens=48) == shifted


def test_mixture_of_experts(make_llm: Any) -> None:
    check_every_method(make_llm, "mixtral")


def test_llama3_positions(make_llm: Any) -> None:
    overrides = {"rope_parameters": LLAMA3, "max_position_embeddings": 2048}
    check_every_method(make_llm, "llama", hf_overrides=overrides)
