"""The scheduler with plans schedules as vLLM's own, and its plan reaches the worker."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integration.test_engine_tokens import generate, make_prompts

pytestmark = [pytest.mark.filterwarnings("default")]

FACTORY = "farspan.scheduler.scheduler.make_scheduler"
PROMPTS = make_prompts((1, 129, 700))
MAX_TOKENS = 12


@pytest.mark.parametrize("is_async", [False, True])
def test_factory_follows_async_scheduling(is_async: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from farspan.scheduler import scheduler
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler

    monkeypatch.setattr(Scheduler, "__init__", lambda self, *args, **kwargs: None)
    monkeypatch.setattr(AsyncScheduler, "__init__", lambda self, *args, **kwargs: None)
    made = scheduler.make_scheduler(
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=is_async)), block_size=16
    )
    assert isinstance(made, Scheduler)
    assert isinstance(made, AsyncScheduler) is is_async


def test_block_copies_end_an_engine_with_cold_heads() -> None:
    """A copy of vLLM's would leave out the cold pages of the block."""
    from farspan.scheduler.scheduler import PlannedSteps

    output = SimpleNamespace(kv_cache_block_copies=[(1, 2)])
    with pytest.raises(RuntimeError, match="vLLM copies blocks whose cold KV heads it does not know"):
        PlannedSteps()._plan_residency(SimpleNamespace(), output)  # type: ignore[arg-type]


@pytest.mark.e2e
def test_tokens_and_plans(make_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    stock = make_llm()
    expected = generate(stock, PROMPTS, MAX_TOKENS)
    assert stock.collective_rpc("planned_step") == [None]
    stock.llm_engine.engine_core.shutdown()
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    llm = make_llm(scheduler_cls=FACTORY)
    assert generate(llm, PROMPTS, MAX_TOKENS) == expected
    (first,) = llm.collective_rpc("planned_step")
    assert first >= MAX_TOKENS
    generate(llm, PROMPTS[:1], MAX_TOKENS)
    (second,) = llm.collective_rpc("planned_step")
    assert second >= first + MAX_TOKENS
