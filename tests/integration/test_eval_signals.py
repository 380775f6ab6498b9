"""A `farspan eval` that is ended leaves no process behind, and keeps what it has evaluated."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from farspan.evaluation.results import read_csv

pytestmark = pytest.mark.e2e

ENGINE = '{"enforce_eager": true, "dtype": "float32"}'
TIMEOUT_S = 240


def processes_of(session: int) -> list[psutil.Process]:
    """The processes of a session, zombies left out."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def wait_until(is_so: Callable[[], bool], process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.mark.parametrize(
    ("stop", "when", "status"),
    [(signal.SIGTERM, "starting", 143), (signal.SIGINT, "asking", 130)],
    ids=["term-starting", "int-asking"],
)
def test_nothing_is_left_behind(tmp_path: Path, stop: signal.Signals, when: str, status: int) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    # The second cell takes half a minute and more: the signal comes before its end.
    arguments = ["eval", "--tasks", "niah_single", "--lengths", "256,8192", "--count", "3", "--engine-args", ENGINE]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "farspan.cli", *arguments, "--out", str(out)],
            env=os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        if when == "starting":
            # The engine has a process of its own, and its worker another.
            wait_until(lambda: b"Loading safetensors checkpoint shards" in log.read_bytes(), process, log)
            assert len(processes_of(process.pid)) >= 2
        else:
            wait_until((out / "eval.csv").exists, process, log)
        process.send_signal(stop)
        assert process.wait(60) == status, log.read_text()
        deadline = time.monotonic() + 20
        while left := processes_of(process.pid):
            assert time.monotonic() < deadline, [each.cmdline() for each in left]
            time.sleep(0.2)
    finally:
        for each in processes_of(process.pid):
            each.kill()
        process.wait()
    word = "terminated" if stop is signal.SIGTERM else "interrupted"
    # Python's resource tracker, which outlives us by a moment, may say what vLLM has not released.
    assert f"\nfarspan eval: {word}\n" in log.read_text()
    assert "Traceback" not in log.read_text()
    if when == "asking":
        (cell,) = read_csv(out / "eval.csv")
        assert cell.length == 256
