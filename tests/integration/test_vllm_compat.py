"""Wrapping vLLM's functions, and what builders learn from a runner."""

import functools
import threading
from types import SimpleNamespace
from typing import Any

import pytest
from farspan.engine_ext.config import DensePrefill, parse_config
from farspan.engine_ext.plan import StepPlan
from farspan.vllm_compat.offload import warn_of_ordinary_memory
from farspan.vllm_compat.runner import RunnerSource, RunnerState, running, running_runner, state_of
from farspan.vllm_compat.wrapping import wrap_once

FLEX = {"prefill": {"method": "flex", "gamma": 0.95}}
CONFIG = parse_config(FLEX)


def adding_one(stock: Any) -> Any:
    def value(*args: Any) -> int:
        return int(stock(*args)) + 1

    return value


def test_wrapping_twice_wraps_once() -> None:
    class Owner:
        def value(self) -> int:
            return 0

    wrap_once(Owner, "value", adding_one)
    wrap_once(Owner, "value", adding_one)
    assert Owner().value() == 1


def test_the_wrapper_of_another_does_not_pass_for_ours() -> None:
    class Owner:
        def value(self) -> int:
            return 0

    Owner.value = functools.wraps(Owner.value)(adding_one(Owner.value))  # type: ignore[method-assign]
    wrap_once(Owner, "value", adding_one)
    assert Owner().value() == 2


def test_subclasses_and_class_methods_are_wrapped() -> None:
    class Owner:
        @classmethod
        def value(cls) -> int:
            return 0

    class Heir(Owner):
        pass

    wrap_once(Owner, "value", adding_one)
    wrap_once(Heir, "value", adding_one)
    assert (Owner.value(), Heir.value(), Heir().value()) == (1, 2, 2)


def step(finished: tuple[str, ...] = (), **new: dict[str, Any] | None) -> Any:
    """A SchedulerOutput with these new requests and their extra args."""
    requests = [
        SimpleNamespace(
            req_id=req_id, prompt_token_ids=[7] * (10 + index), sampling_params=SimpleNamespace(extra_args=extra_args)
        )
        for index, (req_id, extra_args) in enumerate(new.items())
    ]
    return SimpleNamespace(finished_req_ids=set(finished), scheduled_new_reqs=requests)


def test_requests_are_decoded_when_they_arrive() -> None:
    state = RunnerState(CONFIG)
    state.update(step(a={"farspan.method": "dense"}, b=None))
    assert state.overrides == {"a": DensePrefill()}
    state.update(step(finished=("a",)))
    assert state.overrides == {}


def test_a_later_chunk_without_overrides_keeps_none() -> None:
    state = RunnerState(CONFIG)
    state.update(step(a={"farspan.gamma": 0.8}))
    state.update(step(a=None))
    assert state.overrides == {}


def test_a_bad_override_does_not_end_the_worker(caplog: pytest.LogCaptureFixture) -> None:
    state = RunnerState(CONFIG)
    state.update(step(a={"farspan.gamma": 7}))
    assert state.overrides == {}
    assert "request a prefills by the engine's options: farspan.gamma=7" in caplog.text


def test_memory_that_cannot_be_pinned_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    logger = SimpleNamespace(warning=lambda text, *values: told.append(text % values))
    monkeypatch.setattr("vllm.logger.init_logger", lambda name: logger)
    warn_of_ordinary_memory("cuda")
    assert not told
    warn_of_ordinary_memory("cpu")
    assert len(told) == 1
    assert "as the platform 'cpu' has none that can be pinned" in told[0]


def make_source(runner: Any, *, is_v2: bool) -> RunnerSource:
    source = RunnerSource.__new__(RunnerSource)
    source.engine_prefill, source.is_v2 = CONFIG.prefill, is_v2
    cache_config = SimpleNamespace(block_size=128)
    runner.vllm_config = SimpleNamespace(additional_config={"farspan": FLEX}, cache_config=cache_config)
    return source


def test_prefills_in_batch_order_with_padding() -> None:
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["b", "a"]))
    source = make_source(runner, is_v2=False)
    state_of(runner).update(step(a={"farspan.method": "dense"}, b=None))
    common = SimpleNamespace(num_reqs=4)
    with running(runner):
        assert source.prefills(common) == [CONFIG.prefill, DensePrefill(), CONFIG.prefill, CONFIG.prefill]
    assert source.prefills(common) == [CONFIG.prefill] * 4


def test_prefills_of_runner_v2_follow_the_indices() -> None:
    runner = SimpleNamespace(req_states=SimpleNamespace(index_to_req_id={3: "a", 0: "b"}))
    source = make_source(runner, is_v2=True)
    state_of(runner).update(step(a={"farspan.method": "dense"}, b=None))
    with running(runner):
        found = source.prefills(SimpleNamespace(num_reqs=3, req_idx=[3, 0, 7]))
    assert found == [DensePrefill(), CONFIG.prefill, CONFIG.prefill]


def test_prompt_lens_are_those_of_whole_prompts() -> None:
    runner = SimpleNamespace(input_batch=SimpleNamespace(req_ids=["b", "a"]))
    source = make_source(runner, is_v2=False)
    state_of(runner).update(step(a=None, b=None))
    common = SimpleNamespace(num_reqs=3)
    assert source.prompt_lens(common) == [None] * 3
    with running(runner):
        assert source.prompt_lens(common) == [11, 10, None]
        # What a step brings later is no new prompt; what ends is forgotten.
        state_of(runner).update(step(finished=("b",)))
        assert source.prompt_lens(common) == [None, 10, None]


def test_the_plan_is_that_of_the_step() -> None:
    runner = SimpleNamespace()
    source = make_source(runner, is_v2=False)
    assert source.plan() is None
    output = step()
    output.farspan_plan = StepPlan(step=3)
    state_of(runner).update(output)
    with running(runner):
        assert source.plan() == StepPlan(step=3)
        state_of(runner).update(step())
        assert source.plan() is None


def test_runners_of_other_threads_are_not_seen() -> None:
    seen = []
    with running("mine"):
        thread = threading.Thread(target=lambda: seen.append(running_runner()))
        thread.start()
        thread.join()
        assert running_runner() == "mine"
    assert seen == [None]
