"""Shifted positions through vLLM on the CPU."""

from typing import Any

import pytest

from tests.integration.test_engine_tokens import generate, launches, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

PROMPTS = make_prompts((63, 700, 1000), seed=21)


def engine(make_llm: Any, string: dict[str, Any], **kwargs: Any) -> Any:
    options = {"farspan": {"string": string}}
    return make_llm(additional_config=options, max_num_seqs=16, **{"max_num_batched_tokens": 2048, **kwargs})


def test_a_shift_beyond_the_prompts_changes_nothing(make_llm: Any) -> None:
    llm = engine(make_llm, {"shift": 2000})
    assert generate(llm, PROMPTS) == generate(make_llm("llama", None, enable_prefix_caching=False), PROMPTS)
    assert launches(llm)["decode"] > 0


def test_shifted_tokens_depend_on_neither_chunks_nor_prefix_hits(make_llm: Any) -> None:
    shift = {"shift": 256, "window": 32}
    expected = generate(engine(make_llm, shift), PROMPTS)
    plain = generate(make_llm("llama", None, enable_prefix_caching=False), PROMPTS)
    # The first prompt is shorter than the shift.
    assert expected[0] == plain[0]
    assert expected[1:] != plain[1:]
    llm = engine(make_llm, shift, max_num_batched_tokens=100, block_size=32)
    assert generate(llm, PROMPTS) == expected
    assert generate(llm, PROMPTS) == expected


def test_logit_scale(make_llm: Any) -> None:
    scaled = generate(engine(make_llm, {"shift": 2000, "logit_scale": 1.5}), PROMPTS)
    assert scaled != generate(engine(make_llm, {"shift": 2000}), PROMPTS)
