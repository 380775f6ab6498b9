"""The benchmark runner's contract: what it writes, what it refuses, and which results its check accepts."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from farspan.engine_ext.errors import ConfigError

from benchmarks import fp8_drift, peers
from benchmarks.engine import TINY_LLAMA, EngineSpec, Request, measure_in_turns
from benchmarks.gate import attend_rows, check_attention, sample_rows
from benchmarks.inputs import TINY, PagedBatch, make_paged_batch
from benchmarks.real import Inputs
from benchmarks.record import COLUMNS, DATA, BenchmarkError, Environment, Recorder, append_rows, read_rows
from benchmarks.tables import Table, format_table, latest_run, peers_before

CONTRACT = "run_id,date,commit,gpu,driver,torch,triton,vllm,benchmark,case,variant,metric,unit,p20,p50,p80"
ENVIRONMENT = Environment("20261122-abc", "2026-11-22", "0123", "some GPU", "1.2", "2.11", "3.6", "0.32")


def test_columns_are_the_contract() -> None:
    assert ",".join(COLUMNS) == CONTRACT


def test_rows_survive_the_file(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, ENVIRONMENT)
    recorder.add("decode", "n100", "farspan", "time", "ms", [3.0, 1.0, 2.0])
    recorder.add("decode", "n100", "fa3", "time", "ms", [5.0])
    recorder.add("ttft", "n100", "fa3", "time", "ms", [5.0])
    assert read_rows(tmp_path) == recorder.rows
    assert [row.p50 for row in recorder.rows] == ["2", "5", "5"]
    assert (recorder.rows[0].p20, recorder.rows[0].p80) == ("1.4", "2.6")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decode.csv", "ttft.csv"]
    assert (tmp_path / "decode.csv").read_text().count("run_id") == 1


def test_of_a_density_the_mean_is_recorded(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, ENVIRONMENT)
    recorder.add("ttft", "n100", "farspan-g0.9", "density", "fraction", [0.01, 0.01, 0.01, 0.97])
    recorder.add("ttft", "n100", "farspan-g0.9", "coverage", "fraction", [0.91, 0.91, 0.91, 0.99])
    assert [row.p50 for row in read_rows(tmp_path)] == ["0.25", "0.91"]
    assert recorder.rows[0].p20 == "0.01"


def test_a_table_shows_the_latest_run_of_its_cases() -> None:
    table = Table("ttft", "time", "", cases="n100-", variants="farspan$")
    recorder = Recorder(None, ENVIRONMENT)
    for run_id, case, variant in (("1", "n100-a", "farspan"), ("2", "n100-a", "fa3"), ("3", "n200-a", "farspan")):
        recorder.environment = replace(ENVIRONMENT, run_id=run_id)
        recorder.add("ttft", case, variant, "time", "ms", [1.0])
    assert [row.run_id for row in latest_run(recorder.rows, table)] == ["1"]


def test_a_peer_that_a_run_left_out_is_shown_with_the_ratio_of_its_own_run() -> None:
    table = Table("prefill_dense", "time", "", case_by_case=True)
    recorder = Recorder(None, ENVIRONMENT)
    for run_id, times in (
        ("1", {"fa3": 3.0, "fa4": 2.0, "sdpa": 9.0}),
        ("2", {"fa3": 2.0, "fa4": 4.0}),
        ("3", {"farspan": 1.0, "fa3": 1.0}),
        # Without a baseline there is no ratio.
        ("4", {"triton_attn": 5.0}),
        ("5", {"farspan": 1.0, "fa3": 1.0}),
    ):
        recorder.environment = replace(ENVIRONMENT, run_id=run_id)
        for variant, ms in times.items():
            recorder.add("prefill_dense", "n100", variant, "time", "ms", [ms])
    rows = recorder.rows
    lines = format_table(latest_run(rows, table), table, peers_before(rows, table)).splitlines()
    assert lines[-1] == "| `n100` | 1 | 1 | [4, 0.50×] | [9, 0.33×] | 1.00× |"
    assert "runs 5, 2, 1" in lines[0]
    # Without peers that were left out nothing is said about brackets.
    assert not any("brackets" in line for line in format_table(latest_run(rows, table), table).splitlines())


def test_a_heading_names_every_gpu_and_version_of_its_rows() -> None:
    recorder = Recorder(None, ENVIRONMENT)
    for run_id, vllm in (("1", "0.32"), ("2", "0.32"), ("3", "0.33")):
        recorder.environment = replace(ENVIRONMENT, run_id=run_id, vllm=vllm)
        recorder.add("ttft", f"n{run_id}00", "farspan", "time", "ms", [1.0])
    heading, *_ = format_table(recorder.rows, Table("ttft", "time", "First token")).splitlines()
    assert heading == (
        "**First token**, ms (some GPU, vLLM 0.32, torch 2.11, Triton 3.6; runs 1, 2; "
        "some GPU, vLLM 0.33, torch 2.11, Triton 3.6; run 3)"
    )


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Recorder(None, ENVIRONMENT).add("decode", "n100", "farspan", "time", "ms", [3.0])
    assert not list(tmp_path.iterdir())


def test_peers_that_are_missing_have_a_reason_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"vllm.vllm_flash_attn": "no operators", "flashinfer": "no flashinfer"}
    monkeypatch.setattr(peers, "why_missing", reasons.get)
    assert peers.missing() == "fa3 and triton_attn are not here (no operators); flashinfer is not here (no flashinfer)"


class FakeWrapper:
    """FlashInfer's contract of both wrappers, in plain PyTorch: what `plan` is given decides what `run` attends to."""

    planned: ClassVar[list[str]] = []

    def __init__(self, workspace: torch.Tensor, layout: str, **kwargs: bool) -> None:
        assert layout == "HND"
        self.is_decode = kwargs == {"use_tensor_cores": True}

    def plan(self, *arguments: Any, causal: bool = False, sm_scale: float, q_data_type: torch.dtype) -> None:
        self.planned.append("decode" if self.is_decode else "prefill")
        assert causal is not self.is_decode
        assert (q_data_type, sm_scale) == (TINY.dtype, TINY.scale)
        if self.is_decode:
            arguments = (torch.arange(len(arguments[0])), *arguments)
        self.query_starts, self.starts, self.pages, self.last, *heads = arguments
        assert heads == [TINY.num_q_heads, TINY.num_kv_heads, TINY.head_dim, TINY.page_size]

    def run(self, query: torch.Tensor, cache: tuple[torch.Tensor, torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        lens = (self.starts.diff() - 1) * TINY.page_size + self.last
        for index, length in enumerate(lens.tolist()):
            tokens = slice(*self.query_starts[index : index + 2].tolist())
            pages = self.pages[None, slice(*self.starts[index : index + 2].tolist())]
            counts = [tokens.stop - tokens.start]
            alone = PagedBatch(
                TINY, query[tokens], torch.cat(cache, dim=-1), pages, torch.tensor([length]),
                torch.tensor([0, *counts]), counts, [length],
            )  # fmt: skip
            out[tokens] = attend_rows(alone, 0, torch.arange(counts[0]), torch.float32)[0]
        return out


@pytest.mark.parametrize(
    ("query_lens", "kind"), [((1, 1), "decode"), ((40, 7), "prefill"), ((1, 3), "prefill")], ids=str
)
def test_flashinfer_is_planned_by_its_own_contract(
    query_lens: tuple[int, int], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=FakeWrapper, BatchPrefillWithPagedKVCacheWrapper=FakeWrapper
    )
    monkeypatch.setitem(sys.modules, "flashinfer", fake)
    monkeypatch.setattr(FakeWrapper, "planned", [])
    batch = make_paged_batch(query_lens, [48, 33], TINY)
    check_attention(batch, peers.flashinfer(batch)(), name="flashinfer")
    assert FakeWrapper.planned == [kind]


def test_fp8_drift_fails_where_this_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM's own may be left out."""

    def read_all(inputs: object, options: object, cache: dict[str, str]) -> dict[int, list[object]]:
        if cache["kv_cache_dtype"] == "fp8" and options == refused:
            raise ConfigError("no fp8 here")
        return {}

    monkeypatch.setattr(fp8_drift, "read_all", read_all)
    inputs, refused = Inputs("model", (), "label", (1024,), 1, 0), fp8_drift.BACKENDS["vllm"]
    fp8_drift.measure(Recorder(None, ENVIRONMENT), inputs)
    refused = fp8_drift.BACKENDS["farspan"]
    with pytest.raises(BenchmarkError, match="farspan with kv_cache_dtype='fp8': no fp8 here"):
        fp8_drift.measure(Recorder(None, ENVIRONMENT), inputs)


@pytest.mark.parametrize(
    ("benchmark", "metric", "unit", "samples"),
    [
        ("decoding", "time", "ms", [1.0]),
        ("decode", "latency", "ms", [1.0]),
        ("decode", "time", "s", [1.0]),
        ("decode", "time", "ms", []),
        ("decode", "time", "ms", [0.0]),
        ("decode", "time", "ms", [float("nan")]),
    ],
    ids=["benchmark", "metric", "unit", "empty", "zero", "nan"],
)
def test_rows_off_the_contract_are_refused(benchmark: str, metric: str, unit: str, samples: list[float]) -> None:
    with pytest.raises(BenchmarkError):
        Recorder(None, ENVIRONMENT).add(benchmark, "n100", "farspan", metric, unit, samples)


def test_files_with_other_columns_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "decode.csv").write_text("a,b\n")
    recorder = Recorder(None, ENVIRONMENT)
    recorder.add("decode", "n100", "farspan", "time", "ms", [3.0])
    with pytest.raises(BenchmarkError, match="columns"):
        append_rows(recorder.rows, tmp_path)
    assert (tmp_path / "decode.csv").read_text() == "a,b\n"


def test_committed_rows_keep_the_contract() -> None:
    for row in read_rows(DATA):
        assert float(row.p20) <= float(row.p80), row
        # For densities p50 is a mean, not a quantile.
        assert row.metric == "density" or float(row.p20) <= float(row.p50) <= float(row.p80), row
        # A CPU's speed is no claim of ours; answers are the same everywhere.
        assert row.gpu != "cpu" or row.metric not in ("time", "rate", "bandwidth", "peak_gpu_memory"), row
        assert row.commit, row
        replace(row)  # hashable, complete


@pytest.mark.parametrize("query_len", [1, 40, 100])
def test_gate_passes_the_truth_and_stops_a_wrong_result(query_len: int) -> None:
    batch = make_paged_batch([query_len, 3], [100, 33], TINY)
    outs, lses = zip(
        *(attend_rows(batch, r, torch.arange(n), torch.float32) for r, n in enumerate([query_len, 3])), strict=True
    )
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    assert check_attention(batch, out, lse) < 1e-6
    row = int(sample_rows(batch, 0, 1)[-1])
    wrong = out.clone()
    wrong[row] *= 1.01
    with pytest.raises(BenchmarkError, match="relative error"):
        check_attention(batch, wrong, lse)
    with pytest.raises(BenchmarkError, match="LSE"):
        check_attention(batch, out, lse + 0.01)
    with pytest.raises(BenchmarkError):
        check_attention(batch, torch.full_like(out, float("nan")))


def test_causal_flops_count_the_triangle() -> None:
    whole = make_paged_batch([100], [100], TINY)
    halves = [make_paged_batch([50], [length], TINY) for length in (50, 100)]
    assert whole.causal_flops == sum(half.causal_flops for half in halves)
    assert whole.causal_flops == 4 * 64 * 4 * 5050


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.run", *arguments]
    return subprocess.run(command, cwd=DATA.parent.parent, capture_output=True, text=True, check=False)


def test_runner_names_what_it_knows() -> None:
    run = run_cli("prefil_dense")
    assert run.returncode == 2
    assert "prefil_dense" in run.stderr
    assert "prefill_dense" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a GPU")
def test_runner_says_what_to_do_without_a_gpu() -> None:
    run = run_cli("decode")
    assert run.returncode == 1
    assert "--dry-run" in run.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a dry run is for machines without a GPU")
def test_kernel_benchmarks_run_dry() -> None:
    run = run_cli("prefill_dense", "decode", "--dry-run")
    assert run.returncode == 0, run.stderr
    for name in ("farspan", "sdpa"):
        assert name in run.stdout


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("arguments", "timeout_s", "reason"),
    [({"no_such_argument": 1}, 100, "no_such_argument"), ({}, 0.1, "did not answer in time")],
    ids=["fails", "late"],
)
def test_an_engine_that_does_not_start_says_why(arguments: dict[str, Any], timeout_s: float, reason: str) -> None:
    specs = {name: EngineSpec([Request(10)], TINY_LLAMA, engine=arguments) for name in ("one", "other")}
    with pytest.raises(BenchmarkError, match=reason):
        measure_in_turns(specs, timeout_s=timeout_s)


def test_collect_adds_a_run_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import run

    data = tmp_path / "data"
    data.mkdir()
    monkeypatch.setattr(run, "DATA", data)
    Recorder(tmp_path / "new", ENVIRONMENT).add("decode", "n100", "farspan", "time", "ms", [3.0])
    assert run.collect(tmp_path / "new") == 1
    assert run.collect(tmp_path / "new") == 0
    assert len(read_rows(data)) == 1
