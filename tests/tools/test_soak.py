"""What `python -m tools.soak` calls a leak."""

import pytest
from farspan.engine_ext.errors import ConfigError

from tools.soak import ALLOWED_GROWTH, Held, growth, run, too_much


def test_steady_growth_is_a_leak_and_a_first_step_is_not() -> None:
    leaking = [Held(1000 + 10 * part, 100 + part, 50, 0) for part in range(20)]
    grown = growth(leaking)
    assert grown == Held(100, 10, 0, 0)
    assert [sentence.split()[0] for sentence in too_much(grown)] == ["host_mib"]
    warming_up = [Held(500, 80, 40, 0)] * 4 + [Held(1000, 100, 50, 0)] * 16
    assert growth(warming_up) == Held(0, 0, 0, 0)
    assert too_much(ALLOWED_GROWTH) == []


def test_a_single_high_reading_is_no_leak() -> None:
    readings = [Held(1000, 100, 50, 0)] * 19 + [Held(9000, 900, 90, 0)]
    assert too_much(growth(readings)) == []


def test_too_few_requests_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    with pytest.raises(ConfigError, match="--requests 5; allowed: at least 20"):
        run(argparse.Namespace(model=None, requests=5, concurrency=1, seed=0, server=[]))
    with pytest.raises(ConfigError, match="--concurrency 0; allowed: at least 1"):
        run(argparse.Namespace(model=None, requests=20, concurrency=0, seed=0, server=[]))
