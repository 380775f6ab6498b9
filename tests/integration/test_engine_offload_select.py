"""Selective decode of cold heads through vLLM: all of the mass gives exact tokens, and less is counted and audited."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.integration.test_engine_offload import MAX_LEN, PAGE, PROMPTS, offload_state, offloading, run_checked
from tests.integration.test_engine_tokens import generate, make_prompts, stock_tokens

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

__all__ = ["stock_tokens"]


@pytest.fixture(autouse=True)
def _few_recent_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of these short requests too, most pages may be left out."""
    monkeypatch.setattr("farspan.kernels.page_choice_reference.SELECT_RECENT_TOKENS", 32)
    monkeypatch.setattr("farspan.engine_ext.offload.selection.AUDIT_EVERY", 3)


def selecting(num_slots: int, coverage: float, *, certified: bool = False, **arguments: Any) -> dict[str, Any]:
    """Arguments of an engine with so many slots, whose decode is selective."""
    made = offloading(num_slots, **arguments)
    options = made["additional_config"]["farspan"]["offload"]
    options["cold_decode"] = {"method": "select", "coverage": coverage, "certified": certified}
    num_cold, blocks = 4, made["num_gpu_blocks_override"]
    bounds = num_cold * (PAGE * 32 + 2 * 64 * 4)
    num_reqs, max_pages, group = 16, -(-MAX_LEN // PAGE) + 1, 2
    buffers = num_reqs * max_pages * (4 + 2 * (4 + 8 * group)) + num_reqs * num_cold * group * (64 * 4 + 8)
    made["kv_cache_memory_bytes"] += blocks * bounds + buffers
    return made


def metrics_of(llm: Any) -> dict[str, float]:
    prefix = "vllm:farspan_offload_"
    return {each.name.removeprefix(prefix): each.value for each in llm.get_metrics() if each.name.startswith(prefix)}


def test_all_of_the_mass_gives_exact_tokens(make_llm: Callable[..., Any], stock_tokens: Any) -> None:
    """Chunked prefill, prefix hits and preemption, with blocks that come again."""
    llm = make_llm(**selecting(14, 1.0, blocks=60, enable_prefix_caching=True))
    assert offload_state(llm)["num_slots"] == 14
    assert run_checked(llm, PROMPTS) == stock_tokens("llama", PROMPTS)
    prompts = make_prompts((200, 210, 220, 190, 90), seed=9)
    budgets = [60, 50, 55, 60, 80]
    expected = stock_tokens("llama", prompts, budgets)
    assert run_checked(llm, prompts, budgets) == expected
    assert run_checked(llm, prompts, budgets) == expected
    assert min(offload_state(llm)["spilled"], offload_state(llm)["loaded"]) > 0


@pytest.mark.parametrize("certified", [False, True], ids=["estimates", "bounds"])
def test_what_is_kept_is_counted_and_audited(make_llm: Callable[..., Any], certified: bool) -> None:
    coverage = 0.8
    llm = make_llm(**selecting(12, coverage, certified=certified, disable_log_stats=False))
    prompts = make_prompts((700, 650), seed=3)
    tokens = run_checked(llm, prompts, 30)
    assert all(len(each) == 30 for each in tokens)
    told = metrics_of(llm)
    rows = told["select_audited"]
    assert rows > 0
    assert told["select_kept"] / rows >= coverage - 0.02
    assert told["select_certified"] <= told["select_kept"] + 1e-6
    assert told["select_least_certified"] <= told["select_least_kept"] + 1e-6
    assert told["bytes_from_host"] > 0
    assert told["select_bytes_on_host"] > 0
    if certified:
        assert told["select_certified"] / rows >= coverage
        assert told["select_least_certified"] >= coverage - 1e-6
    (read, on_host) = llm.collective_rpc("selected_pages")[0]
    assert read <= on_host
    assert certified or read < on_host


def test_nothing_on_the_host_is_exact(make_llm: Callable[..., Any], stock_tokens: Any) -> None:
    llm = make_llm(**selecting(160, 0.5))
    assert generate(llm, PROMPTS) == stock_tokens("llama", PROMPTS)
    assert llm.collective_rpc("selected_pages") == [[0, 0]]
