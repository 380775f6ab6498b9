"""What `flex_ttft` runs when it is told which shapes, lengths and variants."""

from typing import Any

import pytest

from benchmarks.engine import EngineResult, Timing
from benchmarks.flex_ttft import SHAPES, engines, ratio, requests_of, run
from benchmarks.record import BenchmarkError, Environment, Recorder


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"shapes": ["llama70b"]}, "known are qwen0.5b, qwen1.5b, llama8b-16layers, llama8b"),
        ({"variants": ["farspan-g0.5"]}, "known are fa3, fa3-again, farspan, farspan-g0.95, farspan-g0.9"),
        ({"variants": ["farspan-g0.9"]}, "held against a dense one"),
        ({"variants": ["farspan-g0.9", "fa3-again"]}, "held against a dense one"),
    ],
)
def test_what_cannot_be_compared_is_refused(given: dict[str, Any], sentence: str) -> None:
    recorder = Recorder(None, Environment("r", "2026-11-28", "c", "cpu", "", "2", "3", "0.32"))
    with pytest.raises(BenchmarkError, match=sentence):
        run(recorder, **given)


def test_the_control_is_no_side_of_the_ratio() -> None:
    times = {"fa3": (20.0, 30.0), "fa3-again": (10.0, 12.0), "farspan-g0.95": (20.0, 33.0)}
    results = {
        name: EngineResult(0.0, [Timing(1024, ms, [], [], {}) for ms in samples]) for name, samples in times.items()
    }
    assert ratio(results, 1024, "farspan-g0.95") == pytest.approx(26.5 / 25)
    assert ratio(results, 1024, "fa3-again", 0.0) == 0.5


def test_an_engine_has_room_for_its_longest_prompt() -> None:
    requests = requests_of([4096, 1024], dry_run=False, repeats=2)
    assert [(each.prompt_len, each.repeats) for each in requests] == [(1024, 2), (4096, 2)]
    made = engines(SHAPES["llama8b"], requests, False, ["fa3", "farspan-g0.9"])
    assert [spec.backend for spec in made.values()] == ["FLASH_ATTN", "CUSTOM"]
    room = {spec.engine["kv_cache_memory_bytes"] // (2 * 2 * 32 * 8 * 128) for spec in made.values()}
    assert all(4096 < num_tokens < 13000 for num_tokens in room)


def test_turns_follow_a_cached_prefix() -> None:
    requests = requests_of([8192], dry_run=False, turns=[2048, 512])
    assert [(each.prompt_len, each.cached_len) for each in requests] == [(8704, 8192), (10240, 8192)]
    assert all(spec.engine["enable_prefix_caching"] for spec in engines(SHAPES["qwen0.5b"], requests, False).values())
    whole = engines(SHAPES["qwen0.5b"], requests_of([8192], dry_run=False), False)
    assert not any(spec.engine["enable_prefix_caching"] for spec in whole.values())
    with pytest.raises(BenchmarkError, match="two prompts have the same length"):
        requests_of([1024, 4096], dry_run=False, turns=[1024, 4096])
