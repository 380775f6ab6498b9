"""Speculative decoding on a GPU: drafts are verified in CUDA graphs, with the tokens that there are without drafts."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.test_engine_speculation import BUDGETS, DRAFTS, NGRAM, PROMPTS, SIZES, counted
from tests.integration.test_engine_tokens import generate

pytestmark = [pytest.mark.gpu, pytest.mark.e2e, pytest.mark.filterwarnings("default")]

GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [5, 10, 20, 35, 80]}
IN_GRAPHS = {"enforce_eager": False, "compilation_config": GRAPHS, "disable_log_stats": False, **SIZES}
STRING = {"string": {"shift": 64, "window": 16}}


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the steps that verify drafts of all requests, and the launches of such steps outside of graphs."""
    from farspan.engine_ext import impl
    from farspan.engine_ext.metadata import FarspanMetadataBuilder
    from farspan.engine_ext.passes import Decode

    counts: Counter[str] = Counter()
    stock_build, stock_attend = FarspanMetadataBuilder.build, impl.attend

    def build(self: Any, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> Any:
        common = common_attn_metadata
        is_uniform = common.num_actual_tokens == common.num_reqs * (DRAFTS + 1)
        counts["steps"] += common.max_query_len == DRAFTS + 1 and is_uniform
        return stock_build(self, common_prefix_len, common_attn_metadata, fast_build)

    def attend(each: Any, *rest: Any) -> Any:
        counts["launches"] += isinstance(each.work, Decode) and each.work.query_len > 1
        return stock_attend(each, *rest)

    monkeypatch.setattr(FarspanMetadataBuilder, "build", build)
    monkeypatch.setattr(impl, "attend", attend)
    return counts


@pytest.mark.parametrize("options", [{"kernel": "triton"}, STRING], ids=["dense", "string"])
def test_tokens_in_graphs(
    make_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """In float32, one request at a time and all together: the tokens of the same backend without drafts.

    No other backend is compared: TRITON_ATTN multiplies float32 as tf32, and changes tokens of near ties.
    """
    ours = {"additional_config": {"farspan": options}, **IN_GRAPHS}
    reference = make_llm(**ours)
    expected = generate(reference, PROMPTS, BUDGETS)
    reference.llm_engine.engine_core.shutdown()
    llm = make_llm(speculative_config=NGRAM, **ours)
    counts = watch_steps(monkeypatch)
    assert [generate(llm, [prompt], [budget])[0] for prompt, budget in zip(PROMPTS, BUDGETS, strict=True)] == expected
    print("alone:", counts, counted(llm))
    # Outside of graphs only the two layers of steps with fewer drafts, or with chunks as short, are launched.
    assert counts["steps"] > counts["launches"]
    assert generate(llm, PROMPTS, BUDGETS) == expected
    print("together:", counts, counted(llm))
    assert counted(llm)["vllm:spec_decode_num_accepted_tokens"] > 0
