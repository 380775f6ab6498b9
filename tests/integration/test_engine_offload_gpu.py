"""Cold KV heads on a GPU: decode from host memory in CUDA graphs, staging on a second stream, nobody waits."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.test_engine_guards import GRAPHS, watch_waits
from tests.integration.test_engine_offload import BLOCKS, PROMPTS, offload_state, offloading, one_by_one, run_checked
from tests.integration.test_engine_tokens import generate

pytestmark = [pytest.mark.gpu, pytest.mark.e2e, pytest.mark.filterwarnings("default")]

IN_GRAPHS = {"enforce_eager": False, "compilation_config": GRAPHS}
FLEX = {"prefill": {"method": "flex", "gamma": 0.9, "min_seq_len": 0, "min_chunk_len": 0, "min_budget": 0}}


def plain(num_tokens: int = 64, **arguments: Any) -> dict[str, Any]:
    """The same engine without offload."""
    made = offloading(BLOCKS, tokens=num_tokens, **arguments)
    del made["kv_cache_memory_bytes"]
    made["additional_config"]["farspan"].pop("offload")
    return made


@pytest.mark.parametrize(
    ("options", "kv_cache_dtype"),
    [({"kernel": "triton"}, "auto"), (FLEX, "auto"), ({"kernel": "triton"}, "fp8")],
    ids=["dense", "flex", "fp8"],
)
def test_tokens_in_graphs(make_llm: Callable[..., Any], options: dict[str, Any], kv_cache_dtype: str) -> None:
    """In float32 with the pages of both heads in few slots, in some and in all: the tokens of no offload."""
    reference = make_llm(**plain(farspan=options, kv_cache_dtype=kv_cache_dtype), **IN_GRAPHS)
    expected = one_by_one(reference, PROMPTS)
    reference.llm_engine.engine_core.shutdown()
    for num_slots in (9, 40, BLOCKS):
        llm = make_llm(**offloading(num_slots, farspan=options, kv_cache_dtype=kv_cache_dtype), **IN_GRAPHS)
        assert one_by_one(llm, PROMPTS) == expected, num_slots
        batched = run_checked(llm, PROMPTS)
        assert options == FLEX or batched == expected, num_slots
        state = offload_state(llm)
        assert (min(state["spilled"], state["staged"]) > 0) == (num_slots < BLOCKS)
        llm.llm_engine.engine_core.shutdown()


def test_hot_and_cold_heads(make_llm: Callable[..., Any]) -> None:
    """One of four heads hot, by FlashAttention 3 in bfloat16, in small groups."""
    arguments = {"dtype": "bfloat16", **IN_GRAPHS}
    reference = make_llm("qwen3", **plain(**arguments))
    expected = generate(reference, PROMPTS)
    reference.llm_engine.engine_core.shutdown()
    llm = make_llm("qwen3", **offloading(12, heads=4, hot=1, group_size=2, **arguments))
    found = run_checked(llm, PROMPTS)
    # Launches over fewer heads may round differently.
    same = sum(a == b for ours, theirs in zip(found, expected, strict=True) for a, b in zip(ours, theirs, strict=True))
    assert same >= 0.7 * sum(map(len, expected))
    assert offload_state(llm)["spilled"] > 0


def test_attention_never_waits_for_the_device(make_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.engine_ext.impl import FarspanImpl
    from farspan.engine_ext.metadata import FarspanMetadataBuilder
    from farspan.engine_ext.offload.cache import ColdCache

    llm = make_llm(**offloading(12))
    per_step = ((FarspanMetadataBuilder, "build"), (ColdCache, "follow"))
    calls = watch_waits(monkeypatch, *per_step, (FarspanImpl, "forward"))
    generate(llm, PROMPTS, 30)
    assert min(calls.values()) > 0
    assert len(calls) == 3
    state = offload_state(llm)
    assert min(state["spilled"], state["staged"]) > 0
