"""What `python -m tools.soak` calls a leak."""

from pathlib import Path

import pytest
from farspan.engine_ext.errors import ConfigError

from tools import soak
from tools.soak import ALLOWED_GROWTH, Held, gpu_mib, growth, run, too_much


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


def test_gpu_memory_that_nobody_tells_of_is_no_zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(soak, "GPU_DEVICE", tmp_path / "nvidiactl")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    program.write_text('#!/bin/sh\ncase "$*" in *--id=0,1) echo 1200; echo 34;; esac\n')
    program.chmod(0o755)
    assert gpu_mib() == 1234
    program.write_text("#!/bin/sh\nexit 9\n")
    assert gpu_mib() == 0
    (tmp_path / "nvidiactl").touch()
    with pytest.raises(ConfigError, match="does not tell how much GPU memory is used"):
        gpu_mib()


def test_too_few_requests_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    with pytest.raises(ConfigError, match="--requests 5; allowed: at least 20"):
        run(argparse.Namespace(model=None, requests=5, concurrency=1, seed=0, server=[]))
    with pytest.raises(ConfigError, match="--concurrency 0; allowed: at least 1"):
        run(argparse.Namespace(model=None, requests=20, concurrency=0, seed=0, server=[]))
