"""Models of which some layers have a sliding window: those are vLLM's own backend's, the others ours."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from farspan.vllm_compat.platform import leave_window_layers

from tests.integration.test_engine_tokens import generate, make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

PROMPTS = make_prompts((1, 129, 300, 1500), seed=9)
LONG = make_prompts((1500,), seed=10)[0]
DENSE = {"method": "dense"}
FLEX = {"method": "flex", "gamma": 0.3, "min_budget": 0, "min_seq_len": 0, "min_chunk_len": 0}


def engine(make_llm: Callable[..., Any], prefill: dict[str, Any], chunk_len: int = 700, **kwargs: Any) -> Any:
    return make_llm(
        "interleaved",
        max_num_batched_tokens=chunk_len,
        max_num_seqs=4,
        additional_config={"farspan": {"prefill": prefill}},
        **kwargs,
    )


def test_tokens_are_those_of_the_stock_backend(make_llm: Callable[..., Any]) -> None:
    """Also after a prefix hit that is longer than the window, and where blocks outside the window were freed."""
    stock = make_llm("interleaved", None, enable_prefix_caching=False)
    twice = [*PROMPTS, [*LONG[:1100], *PROMPTS[1]]]
    expected = [generate(stock, prompts) for prompts in (twice, [LONG])]
    llm = engine(make_llm, DENSE)
    (found,) = llm.collective_rpc("attention_launches")
    assert sorted(found) == ["CPUAttentionBackendImpl", "FarspanImpl"]
    assert [generate(llm, [LONG]), generate(llm, twice)] == expected[::-1]


def test_flex_is_sparse_in_the_layers_that_see_all(make_llm: Callable[..., Any]) -> None:
    # All prompts in one step: where a chunk cuts a tile, that tile is exact, and where it does goes by their order.
    whole = {"chunk_len": 2048, "enable_prefix_caching": False}
    llm, exact = (engine(make_llm, prefill, **whole) for prefill in (FLEX, DENSE))
    sparse = generate(llm, PROMPTS)
    assert sparse != generate(exact, PROMPTS)
    assert generate(llm, PROMPTS[::-1])[::-1] == sparse


@pytest.mark.parametrize(
    ("backend", "by_kind", "expected"),
    [
        ("CUSTOM", {}, {"sliding_window": "CPU_ATTN"}),
        ("CUSTOM", {"sliding_window": "TRITON_ATTN"}, {"sliding_window": "TRITON_ATTN"}),
        (None, {"full_attention": "CUSTOM"}, {"full_attention": "CUSTOM"}),
        ("TRITON_ATTN", {"full_attention": "CUSTOM"}, {"full_attention": "CUSTOM"}),
    ],
    ids=["ours", "named", "left-to-vllm", "another"],
)
def test_window_layers_have_the_backend_that_the_user_names(
    backend: str | None, by_kind: dict[str, str], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    chosen = {kind: AttentionBackendEnum[name] for kind, name in by_kind.items()}
    attention = SimpleNamespace(backend=backend and AttentionBackendEnum[backend], backend_per_kind=chosen)
    text_config = SimpleNamespace(layer_types=["full_attention", "sliding_attention"])
    model = SimpleNamespace(hf_text_config=text_config, disable_sliding_window=False)
    leave_window_layers(SimpleNamespace(attention_config=attention, model_config=model))
    assert {kind: each.name for kind, each in chosen.items()} == expected


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"additional_config": {"farspan": {"string": {}}}}, "string"),
        ({"additional_config": {"farspan": {"offload": {}}}}, "offload"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "--speculative-config",
        ),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype"),
    ],
    ids=["string", "offload", "drafts", "fp8"],
)
def test_what_must_reach_all_layers_is_refused(make_llm: Callable[..., Any], asked: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"layers with a sliding window, .* Leave out {named}"):
        make_llm("interleaved", **asked)
