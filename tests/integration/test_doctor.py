"""`farspan doctor` finds what is wrong, says what to do, and never fails itself."""

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from farspan import doctor
from farspan.cli import main
from farspan.doctor import Check, examine, guarded, judge_probe
from farspan.vllm_compat import BACKEND


def only(monkeypatch: pytest.MonkeyPatch, *checks: Check) -> None:
    monkeypatch.setattr(doctor, "EXAMINATIONS", (lambda: list(checks),))


def failure(checks: list[Check]) -> Check:
    """The one failed check, which has advice."""
    (failed,) = [check for check in checks if check.outcome == "failed"]
    assert failed.advice
    return failed


def test_exit_status_and_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fine, bad = Check("a", "ok", "as it should be"), Check("b", "failed", "broken", "Mend it.")
    only(monkeypatch, fine, Check("c", "note", "not here"))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("\nNothing failed.\n")
    only(monkeypatch, fine, bad)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "failed  b: broken\n        -> Mend it.\n" in out
    assert out.endswith("failed: b\n")
    assert main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found[1] == {"name": "b", "outcome": "failed", "finding": "broken", "advice": "Mend it."}


def test_a_check_that_fails_itself_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def check_the_moon() -> list[Check]:
        raise RuntimeError("no signal")

    assert failure(guarded(check_the_moon)).finding.endswith("RuntimeError: no signal")
    monkeypatch.setattr(doctor, "EXAMINATIONS", (check_the_moon, doctor.check_python))
    assert [check.outcome for check in examine()] == ["failed", "ok"]


@pytest.fixture
def listed_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A driver that lists a GPU, and a torch that sees none; returns the fake nvidia-smi."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA H100 80GB HBM3, 580.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return program


@pytest.mark.parametrize(
    ("visible", "cuda", "advice"),
    [("", "13.0", "Unset CUDA_VISIBLE_DEVICES"), (None, None, "Install a torch with CUDA"), (None, "13.0", "driver")],
    ids=["hidden", "cpu-torch", "old-driver"],
)
def test_a_gpu_that_torch_does_not_see(
    listed_gpu: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, cuda: str | None, advice: str
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    failed = failure(doctor.check_gpu())
    assert "H100" in failed.finding
    assert advice in failed.advice


def test_no_gpu_is_no_failure(listed_gpu: Path) -> None:
    listed_gpu.write_text("#!/bin/sh\nexit 9\n")
    assert [check.outcome for check in doctor.check_gpu()] == ["note"]
    listed_gpu.unlink()
    assert [check.outcome for check in doctor.check_gpu()] == ["note"]


def test_old_gpus_are_refused(listed_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = [
        SimpleNamespace(name="V100", major=7, minor=0, total_memory=2**34),
        SimpleNamespace(name="H100", major=9, minor=0, total_memory=2**36),
    ]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties[index])
    checks = doctor.check_gpu()
    assert "compute capability 7.0" in failure(checks).finding
    assert checks[1].finding == "H100, 64.0 GiB, compute capability 9.0"
    assert checks[2].finding.startswith("580.1;")


def test_vllm_must_be_there_in_a_supported_version(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = "farspan.vllm_compat.versions.vllm_version"
    monkeypatch.setattr(versions, lambda: "0.31.0")
    assert "vLLM 0.31.0" in failure(doctor.check_vllm()).finding
    monkeypatch.setattr(versions, lambda: "0.33.1")
    assert [check.outcome for check in doctor.check_vllm()] == ["ok"]

    def missing() -> str:
        raise ImportError("No module named 'vllm'")

    monkeypatch.setattr(versions, missing)
    assert "pip install" in failure(doctor.check_vllm()).advice


def test_a_plugin_that_vllm_cannot_find_or_may_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "probe", dict)
    monkeypatch.setenv("VLLM_PLUGINS", "another, farspan_not")
    assert "Add farspan" in failure(doctor.check_plugin()).advice
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda **_: [])
    assert "pip install farspan" in failure(doctor.check_plugin()).advice


def test_what_the_processes_answer_is_judged() -> None:
    good = {"front end": BACKEND, "worker": BACKEND}
    assert [check.outcome for check in judge_probe(good)] == ["ok", "ok"]
    failed = failure(judge_probe(good | {"worker": "other.plugin.backend.Backend"}))
    assert "vLLM's worker" in failed.name
    assert "Another plugin" in failed.advice
    assert "p.register()" in failure(judge_probe(good | {"front end": "ValueError: must be registered"})).advice
    assert [check.outcome for check in judge_probe({"front end": "no answer"})] == ["failed", "failed"]


def test_processes_that_hang_or_end_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.01)
    assert doctor.probe() == {"front end": "no answer after 0.01 s"}

    def ended(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(returncode=-9, stdout="", stderr="line\nKilled\n")

    monkeypatch.setattr(subprocess, "run", ended)
    assert doctor.probe() == {"front end": "ended with status -9: Killed"}


@pytest.mark.e2e
def test_the_plugin_is_seen_in_real_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert doctor.probe() == {"front end": BACKEND, "worker": BACKEND}


def test_kernels_agree_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [check.outcome for check in doctor.check_kernels()] == ["ok"]
    if torch.cuda.is_available():
        return
    from farspan.kernels import cpu_attention

    stock = cpu_attention.cpu_attention

    def off_by_little(*arguments: Any, out: torch.Tensor, **options: Any) -> None:
        stock(*arguments, out=out, **options)
        out[0, 0, 0] += 0.01

    monkeypatch.setattr(cpu_attention, "cpu_attention", off_by_little)
    assert failure(doctor.check_kernels()).finding == "in PyTorch, wrong by 0.01"
    monkeypatch.setattr(cpu_attention, "cpu_attention", lambda *_, out, **__: out.fill_(float("nan")))
    assert "wrong by nan" in failure(doctor.check_kernels()).finding


def test_memory_that_cannot_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.check_memory()[0].outcome == "ok"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (8 * 2**20, 8 * 2**20))
    failed = failure(doctor.check_memory())
    assert "memlock limit: 8 MiB" in failed.finding
    assert "ulimit -l unlimited" in failed.advice
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    assert [check.outcome for check in doctor.check_memory()] == ["ok", "note"]
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (doctor.resource.RLIM_INFINITY,) * 2)
    assert doctor.check_memory()[1].finding == "64 MiB pinned; memlock limit: unlimited"


def test_ray_and_nccl_are_needed_by_few(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise doctor.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    assert doctor.check_distributed()[-1].outcome == "note"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    for num_gpus, outcome in ((1, "note"), (2, "failed")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=num_gpus: count)
        assert doctor.check_distributed()[0].outcome == outcome


def test_options_of_this_machine() -> None:
    found = {check.name: check.finding for check in doctor.check_options() if check.outcome == "ok"}
    assert found["prefill.method"] == "dense, flex, block_sparse"
    assert found["kernel"].startswith("auto (")
