"""How benchmark `stages` tells where a request's time went."""

import pytest

from benchmarks.engine import EngineResult, Request, Timing
from benchmarks.record import Environment, Recorder
from benchmarks.stages import record
from benchmarks.stages_worker import device_ms, stage_of


@pytest.mark.parametrize(
    ("kernel", "stage"),
    [
        ("hopper_log_sums_kernel", "log-sums"),
        ("log_sums_kernel", "log-sums"),
        ("choice_kernel", "choice"),
        ("_write_kv_kernel", "kv-write"),
        ("void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16>", "kv-write"),
        ("void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90", "attention"),
        ("hopper_prefill_kernel", "attention"),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopB_TNT", "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "linear"),
        ("void vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>", "rest"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
    ],
)
def test_kernels_have_stages(kernel: str, stage: str) -> None:
    assert stage_of(kernel) == stage


def test_stages_of_the_last_chunk() -> None:
    """Two chunks of two layers; the last begins where its first layer writes keys."""
    events, at = [], 0.0
    for chunk in range(2):
        for _ in range(2):
            for kernel, spent in (("_write_kv_kernel", 1.0), ("choice_kernel", 2.0), ("gemm", 10.0 * (chunk + 1))):
                events.append((kernel, at, at + spent))
                at += spent + 0.5
    found = device_ms(reversed(events), num_layers=2)
    assert found["layers"] == 4
    assert found["all/linear"] == pytest.approx(0.060)
    assert found["last/linear"] == pytest.approx(0.040)
    assert found["last/choice"] == pytest.approx(0.004)
    assert found["last/idle"] == pytest.approx(0.0025)
    assert device_ms([], 2) == {"layers": 0.0}


def test_rows_of_a_request(capsys: pytest.CaptureFixture[str]) -> None:
    """Device times are those of a layer; a stage without any has no row."""
    recorder = Recorder(None, Environment("r", "2026-11-28", "c", "cpu", "", "2", "3", "0.32"))
    stages = {"layers": 8.0, "all/linear": 6.0, "all/idle": 0.0, "last/linear": 3.0}
    result = EngineResult(0.0, [Timing(512, 20.0, [], [], {}, stages=stages)])
    record(recorder, "n512-b1-m-bf16", "farspan-g0.9", result, Request(512, stages="device"), num_layers=4)
    assert {row.case: row.p50 for row in recorder.rows} == {
        "n512-b1-m-bf16-all-linear": "1.5",
        "n512-b1-m-bf16-last-linear": "0.75",
    }
    assert "first token 20.0 ms" in capsys.readouterr().out
