"""A mixture of experts gives the tokens of vLLM's own backend. vLLM's CPU build has no adapters for experts."""

from typing import Any

import pytest

from tests.integration.test_engine_features import MANY, PROMPT, ask, engine_arguments, tokens_of

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

PROMPTS = [*MANY[:3], PROMPT]


def test_mixture_of_experts(make_llm: Any) -> None:
    """Densely and sparsely in one engine, and with cold heads in another."""
    expected = tokens_of(ask(make_llm("mixtral", None, **engine_arguments(None)), PROMPTS))
    flex = make_llm("mixtral", **engine_arguments("flex"))
    assert tokens_of(ask(flex, PROMPTS)) == expected
    assert tokens_of(ask(flex, PROMPTS, extra_args={"farspan.method": "dense"})) == expected
    assert tokens_of(ask(make_llm("mixtral", **engine_arguments("offload")), PROMPTS)) == expected
