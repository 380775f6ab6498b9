"""The benchmark of servers: what it sends, what it reads from `vllm bench serve`, and what it says."""

import contextlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run, serve
from benchmarks.engine import LLAMA_8B, TINY_LLAMA
from benchmarks.record import BenchmarkError, Environment, Recorder

WORKLOAD = serve.Workload(2, 1024, 8192, 3)
RESULT: dict[str, Any] = {
    "completed": 2,
    "duration": 2.0,
    "errors": ["", ""],
    "output_lens": [3, 3],
    "ttfts": [0.5, 1.0],
    "latencies": [0.7, 1.0],
}


def recorder(cases: str = "") -> Recorder:
    return Recorder(None, Environment("r", "2026-11-28", "c", "cpu", "", "2", "3", "0.32"), cases=cases)


def test_lengths_are_spread_over_the_whole_span() -> None:
    arguments = WORKLOAD.arguments(seed=5)
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    mean, spread = int(given["--random-input-len"]), json.loads(given["--random-range-ratio"])
    assert (round(mean * (1 - spread["input"])), round(mean * (1 + spread["input"]))) == (1024, 8192)
    assert spread["output"] == 0
    assert (WORKLOAD.name, serve.Workload(10, 5, 5, 2).name) == ("2x1024to8192", "10x5")


def test_times_are_read_per_request() -> None:
    found = serve.measured(RESULT, WORKLOAD)
    assert found.total_ms == 2000
    assert found.ttft_ms == [500, 1000]
    # All tokens of the second request were read at once.
    assert found.tpot_ms == pytest.approx([100])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [({"completed": 1, "errors": ["", "no route"]}, "no route"), ({"output_lens": [3, 2]}, r"outputs of \[2, 3\]")],
)
def test_requests_that_failed_are_no_measurement(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(BenchmarkError, match=sentence):
        serve.measured(RESULT | change, WORKLOAD)


def test_the_goal_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    slow = serve.Measured(2100.0, [500, 1000], [100])
    found = recorder()
    serve.record(found, WORKLOAD, "x", {"fa3": [serve.measured(RESULT, WORKLOAD)], "farspan": [slow]})
    assert "total 1.050, ttft 1.000, tpot 1.000; goal 1.02 MISSED" in capsys.readouterr().out
    assert {row.case for row in found.rows} >= {"total-2x1024to8192-x", "tpot-p99-2x1024to8192-x"}


def test_times_between_tokens_may_be_missing(capsys: pytest.CaptureFixture[str]) -> None:
    """The client may read all tokens of every request at once."""
    at_once = serve.measured(RESULT | {"latencies": RESULT["ttfts"]}, WORKLOAD)
    assert at_once.tpot_ms == []
    found = recorder()
    serve.record(found, WORKLOAD, "x", {"fa3": [serve.measured(RESULT, WORKLOAD)], "farspan": [at_once]})
    told = capsys.readouterr().out
    assert "tpot left out" in told
    assert "total 1.000, ttft 1.000; goal 1.02 reached" in told
    assert ("farspan", "tpot-2x1024to8192-x") not in {(row.variant, row.case) for row in found.rows}


def test_two_servers_get_two_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the system offers a port again, on which the first server does not listen yet."""
    offered = iter([5000, 5000, 5001])

    class Socket(contextlib.nullcontext[Any]):
        def __init__(self) -> None:
            super().__init__(self)

        def bind(self, address: Any) -> None:
            assert address == ("127.0.0.1", 0)

        def getsockname(self) -> tuple[str, int]:
            return "127.0.0.1", next(offered)

    monkeypatch.setattr(serve.socket, "socket", Socket)
    assert [serve.free_port(), serve.free_port()] == [5000, 5001]


def test_a_server_leaves_no_process_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not its core either, where it ends without it."""
    server, pid = tmp_path / "server", tmp_path / "pid"
    server.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {pid}.new\nmv {pid}.new {pid}\nexec sleep 600\n")
    server.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(server))
    with serve.Server("x", [], time.monotonic() + 60):
        while not pid.exists():
            time.sleep(0.01)
        core = Path(f"/proc/{pid.read_text().strip()}/stat")
        assert core.exists()
    deadline = time.monotonic() + 10
    while is_alive(core) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(core)


def is_alive(stat: Path) -> bool:
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_unknown_variants_are_refused() -> None:
    with pytest.raises(BenchmarkError, match=r"known are fa3, farspan, farspan-g0\.95"):
        serve.run(recorder(), ["farspan-g0.5"])


@pytest.mark.parametrize("dry_run", [True, False], ids=["dry", "gpu"])
def test_words_are_tokens_that_vllm_takes(tmp_path: Path, dry_run: bool) -> None:
    """A prompt decoded and encoded again has as many tokens, and no more characters than vLLM allows for its length."""
    from vllm.tokenizers import get_tokenizer

    model, max_len = (TINY_LLAMA, serve.DRY_MAX_MODEL_LEN) if dry_run else (LLAMA_8B, serve.MAX_MODEL_LEN)
    serve.write_words_model(tmp_path, model)
    tokenizer = get_tokenizer(str(tmp_path))
    for workload in serve.cases(dry_run):
        tokens = [model["vocab_size"] - 1 - index % 100 for index in range(workload.longest)]
        text = tokenizer.decode(tokens)
        assert tokenizer.encode(text, add_special_tokens=False) == tokens
        max_input_tokens = max_len - workload.output_len
        assert workload.longest <= max_input_tokens
        assert len(text) <= max_input_tokens * tokenizer.max_chars_per_token


def test_cases_are_chosen_by_their_names() -> None:
    chosen = recorder("d64|n131072")
    assert [chosen.wants(case) for case in ("n8192-d64", "n131072-d128", "n8192-d128")] == [True, True, False]
    assert recorder().wants("anything")


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        ("serve --dry-run --cases nowhere", 1, "'nowhere' is in no name of a case of serve"),
        ("host_side --dry-run --cases n1", 1, "host_side runs all of its cases"),
        ("serve --dry-run --cases (", 2, "is no regular expression"),
    ],
)
def test_cases_that_cannot_be_chosen_are_said(
    arguments: str, status: int, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run", *arguments.split()])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    try:
        found = run.main()
    except SystemExit as ended:
        found = int(ended.code or 0)
    assert found == status
    assert sentence in capsys.readouterr().err
