"""`farspan plan` answers from a configuration alone, and says what is wrong with a question."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from farspan.cli import main
from farspan.engine_ext.config import OffloadOptions
from farspan.model_shape import read_model
from farspan.planning import Planner, PlanSettings
from farspan.scheduler.placement import EngineLimits, decide_sizes

from tests.integration.test_model_shape import LLAMA_8B, MIXTRAL, QWEN_05B, folder
from tools.capacity_example import EXAMPLE, example_output

GIB = 2**30


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return folder(tmp_path / "llama", LLAMA_8B, max_position_embeddings=2**21)


def plan(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 0) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == status
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_json_says_what_fits(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan(capsys, llama, "--gpu-memory", "24GB", "--host-memory", "200", "--context", "512K")
    assert answer["fits"]
    assert answer["host_bytes"] == 200 * GIB
    assert answer["usable_bytes"] == int(0.92 * 24e9)
    parts = ("weight_bytes", "activation_bytes", "cuda_bytes", "kv_bytes")
    assert sum(answer[part] for part in parts) == answer["usable_bytes"]
    assert answer["without_offload"]["longest_context"] == pytest.approx(30_000, rel=0.15)
    assert [each["fits"] for each in answer["without_offload"]["predictions"]] == [False]
    offload = answer["with_offload"]
    assert (offload["longest_context"], offload["limited_by"]) == (200 * GIB // 2**17 - 128, "host memory")
    assert (offload["hbm_bytes_per_token"], offload["host_bytes_per_token"]) == (0, 2**17)
    (prediction,) = offload["predictions"]
    assert prediction["context"] == 512 * 1024
    assert 0 < prediction["share_in_hbm"] < 0.1
    # Read from host memory at 49.8 GB/s, but for that share.
    least_ms = 512 * 1024 * 2**17 / 49.8e6 * (1 - prediction["share_in_hbm"])
    assert least_ms < prediction["token_ms"] < least_ms + 10


@pytest.mark.parametrize("context", [131072, 512 * 1024])
@pytest.mark.parametrize(("gpu_gb", "hot_heads"), [(24, 0), (80, 0), (80, 2)])
def test_the_engine_has_the_sizes_of_the_plan(llama: str, context: int, gpu_gb: int, hot_heads: int) -> None:
    settings = PlanSettings(
        model=llama, gpu_memory=gpu_gb * 10**9, host_memory=200 * GIB, context=context, hot_heads=hot_heads
    )
    planner = Planner(settings, read_model(llama))
    assert planner.offloaded is not None
    planned = planner.sizes(planner.offloaded, context, planner.step, is_whole_host=True)
    assert planned is not None
    options = OffloadOptions(host_memory=200, hot_heads=hot_heads)
    limits = EngineLimits(max_model_len=context, max_num_seqs=16, max_num_batched_tokens=planner.step)
    sizes = decide_sizes(options, planner.offloaded, limits, planner.kv_bytes, planner.host_bytes)
    assert (sizes.num_blocks, sizes.num_slots) == (planned.num_blocks, planned.num_slots)
    assert sizes.staging_pages == planned.staging_pages
    assert sizes.group_size == max(planned.group_size, 1)


def test_offload_costs_nothing_where_everything_fits(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    stock = plan(capsys, llama, "--gpu-memory", "24GB")["without_offload"]["longest_context"]
    answer = plan(capsys, llama, "--gpu-memory", "24GB", "--host-memory", "200", "--context", str(stock))
    (without,), (offloaded,) = (answer[side]["predictions"] for side in ("without_offload", "with_offload"))
    assert (offloaded["share_in_hbm"], offloaded["staging_bytes"], offloaded["waiting_s"]) == (1, 0, 0)
    assert offloaded["host_bytes"] == (stock // 128 + 1) * 2**24
    # Slots for the whole request come first; the stubs of further blocks take what those leave.
    assert offloaded["max_requests"] > 5 * without["max_requests"]
    for name in ("first_token_s", "token_ms"):
        assert offloaded[name] == pytest.approx(without[name])


def test_shorter_steps_make_room_and_wait(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [llama, "--gpu-memory", "17", "--gpu-memory-utilization", "1", "--host-memory", "200"]
    answer = plan(capsys, *arguments, "--context", "1M")
    assert answer["max_num_batched_tokens"] == 4096
    (prediction,) = answer["with_offload"]["predictions"]
    # Buffers for a span of the context leave room for long steps; those for all of it do not.
    assert 0 < prediction["waiting_s"] < 0.06 * prediction["first_token_s"]
    assert 4096 < prediction["span_len"] < prediction["context"] / 2
    assert prediction["staging_bytes"] == 2 * prediction["span_len"] * 512
    shorter = plan(capsys, *arguments, "--context", "1M", "--max-num-batched-tokens", "1024")
    (prediction,) = shorter["with_offload"]["predictions"]
    assert prediction["span_len"] == prediction["context"]
    assert prediction["waiting_s"] > 0.5 * prediction["first_token_s"]
    forced = plan(capsys, *arguments, "--context", "1M", "--max-num-batched-tokens", "8192", status=1)
    assert not forced["fits"]


def test_ranks_share_heads_weights_and_host_memory(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    one = plan(capsys, llama, "--host-memory", "400", "--context", "64K")
    two = plan(capsys, llama, "--host-memory", "400", "--context", "64K", "--tensor-parallel-size", "2")
    assert two["weight_bytes"] == one["weight_bytes"] // 2
    assert two["host_bytes"] == one["host_bytes"] // 2
    assert (one["num_kv_heads"], two["num_kv_heads"]) == (8, 4)
    assert two["with_offload"]["host_bytes_per_token"] == one["with_offload"]["host_bytes_per_token"] // 2
    assert two["without_offload"]["predictions"][0]["token_ms"] < one["without_offload"]["predictions"][0]["token_ms"]


def test_options_reach_the_plan(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan(
        capsys,
        *(llama, "--gpu", "rtx 4090", "--host-memory", "64", "--concurrency", "2", "--dtype", "float16"),
        *("--block-size", "32", "--hot-heads", "2", "--group-size", "2", "--weights", "5", "--tflops", "130"),
        *("--hbm-gbs", "800", "--pcie-gbs", "20", "--hf-overrides", '{"max_position_embeddings": 65536}'),
    )
    assert answer["settings"]["gpu"] == "RTX4090"
    assert answer["settings"]["gpu_memory"] == 24564 * 2**20
    assert (answer["dtype"], answer["max_positions"], answer["weight_bytes"]) == ("float16", 65536, 5 * GIB)
    assert answer["weight_source"] == "as given"
    rates = answer["rates"]
    assert (rates["linear_tflops"], rates["attention_tflops"], rates["kv_gbs"], rates["host_gbs"]) == (
        130,
        130,
        800,
        20,
    )
    assert "the vendor's figures" in answer["rate_source"]
    assert answer["rate_source"].endswith("but for --tflops, --hbm-gbs, --pcie-gbs")
    assert answer["with_offload"]["limited_by"] == "the model's positions"
    assert answer["with_offload"]["hbm_bytes_per_token"] == 2**17 // 4
    for each in answer["with_offload"]["predictions"]:
        assert (each["hot_heads"], each["group_size"]) == (2, 2 if each["share_in_hbm"] < 1 else 0)


def test_float32_has_no_measured_prefill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = folder(tmp_path, QWEN_05B)
    answer = plan(capsys, name, "--dtype", "float32", "--context", "8K")
    (prediction,) = answer["without_offload"]["predictions"]
    assert prediction["first_token_s"] is None
    assert prediction["token_ms"] > 0
    assert main(["plan", name, "--dtype", "float32", "--context", "8K"]) == 0
    assert "unknown" in capsys.readouterr().out
    answer = plan(capsys, name, "--dtype", "float32", "--context", "8K", "--tflops", "50")
    assert answer["without_offload"]["predictions"][0]["first_token_s"] > 0


def test_experts_make_weights_large_and_tokens_fast(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = plan(capsys, folder(tmp_path, MIXTRAL), "--gpu", "H200", "--context", "4K")
    (prediction,) = answer["without_offload"]["predictions"]
    everything_ms = 1e3 * answer["weight_bytes"] / (answer["rates"]["weight_gbs"] * 1e9)
    assert prediction["token_ms"] < 0.4 * everything_ms


def test_the_table_has_both_ways_and_what_to_start(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", llama, "--gpu-memory", "24GB", "--host-memory", "200GiB"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^Longest context, tokens +31,872 +1,638,272$", text, flags=re.MULTILINE)
    assert re.search(r"^1,638,272 +1 +0 +\d+ +1 % +1 ", text, flags=re.MULTILINE)
    assert "does not fit" not in text
    assert text.rstrip().endswith(
        "--max-model-len 1638272 --max-num-seqs 1 --max-num-batched-tokens 8192 --block-size 128 --attention-backend "
        """CUSTOM --additional-config '{"farspan": {"offload": {"host_memory": 200}}}'"""
    )
    assert main(["plan", llama, "--gpu-memory", "24GB"]) == 0
    text = capsys.readouterr().out
    assert "With offload" not in text
    assert text.rstrip().endswith("--max-num-batched-tokens 8192 --block-size 128")


def test_what_to_start_has_what_was_asked(llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Options of ours where the context fits by them alone, with the host memory that it needs."""
    asked = ["--tensor-parallel-size", "2", "--gpu-memory", "24GB", "--host-memory", "100.5", "--hot-heads", "2"]
    asked += ["--gpu-memory-utilization", "0.9", "--group-size", "1", "--context"]
    started = []
    for context in ("4K", "300K"):
        assert main(["plan", llama, *asked, context]) == 0
        started.append(capsys.readouterr().out.rstrip().splitlines()[-1])
    assert started[0].endswith("--block-size 128 --tensor-parallel-size 2 --gpu-memory-utilization 0.9")
    options = json.loads(started[1].split("--additional-config '")[1].removesuffix("'"))
    # 131,072 bytes a token, of which six of eight heads are cold.
    assert options == {"farspan": {"offload": {"host_memory": 29, "hot_heads": 2, "group_size": 1}}}
    overrides = '{"max_position_embeddings": 4194304}'
    changed = ["--dtype", "float16", "--hf-overrides", overrides, "--context", "4K"]
    assert main(["plan", llama, "--gpu-memory", "24GB", *changed]) == 0
    words = shlex.split(capsys.readouterr().out.rstrip().splitlines()[-1])
    assert words[-4:] == ["--dtype", "float16", "--hf-overrides", overrides]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu-memory", "24", "--context", "512K"], "does not fit with 1 request at once; .*Give --host-memory"),
        (["--gpu-memory", "24", "--context", "2M", "--host-memory", "100"], "Give more host memory"),
        (["--gpu-memory", "17.25", "--context", "2M", "--host-memory", "999"], "Take a larger GPU"),
        (["--gpu-memory", "16.5", "--gpu-memory-utilization", "0.92"], "Not even one page fits"),
    ],
    ids=["no-host", "little-host", "little-gpu", "nothing"],
)
def test_what_does_not_fit_says_what_to_do(
    llama: str, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["plan", llama, *arguments]) == 1
    assert re.search(sentence, capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu-memory", "12"], r"the weights take 15\.0 GiB of each GPU, of which 11\.0 GiB may be used"),
        (["--context", "4M"], r"--context is 4,194,304 tokens.*end at 2,097,152.*--hf-overrides"),
        (["--concurrency", "0"], r"--concurrency is 0; it must be above 0"),
        (["--concurrency", "-3"], r"--concurrency is -3; it must be above 0"),
        (["--tensor-parallel-size", "3"], r"does not divide 32 query heads and 8 KV heads"),
        (["--tensor-parallel-size", "0"], r"--tensor-parallel-size is 0; it must be above 0"),
        (["--gpu-memory-utilization", "1.5"], r"allowed: above 0, up to 1"),
        (["--gpu-memory-utilization", "nan"], r"allowed: above 0, up to 1"),
        (["--pcie-gbs", "nan"], r"--pcie-gbs is nan; it must be above 0"),
        (["--tflops", "inf"], r"--tflops is inf; it must be above 0"),
        (["--host-memory", "9", "--hot-heads", "8"], r"--hot-heads is 8; allowed: 0 to 7"),
        (
            ["--host-memory", "9", "--hot-heads", "3", "--tensor-parallel-size", "2"],
            r"--hot-heads is 3; allowed: 0 to 6 of the 8 KV heads of a layer, in multiples of 2",
        ),
        (["--host-memory", "9", "--hot-heads", "-1"], r"--hot-heads is -1; allowed: 0 to 7"),
        (["--host-memory", "9", "--group-size", "3"], r"--group-size is 3; allowed for these heads: 1, 2, 4, 8"),
        (["--hot-heads", "2"], r"--hot-heads .* without --host-memory"),
        (["--group-size", "2"], r"--group-size .* without --host-memory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_questions_get_a_sentence(
    llama: str, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(["plan", llama, *arguments]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert re.search(sentence, streams.err), streams.err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--gpu-memory", "-24"], "must be above 0, in GiB or with one of the units"),
        (["--gpu-memory", "0"], "must be above 0"),
        (["--gpu-memory", "24G"], "units MB, GB, TB, MiB, GiB, TiB"),
        (["--host-memory", "much"], "not 'much'"),
        (["--context", "128KiB"], "must be a whole number of tokens"),
        (["--context", "0"], "must be a whole number of tokens above 0"),
        (["--context", "1.5"], "must be a whole number of tokens"),
        (["--gpu", "TPU"], "must be one of H100, H200"),
        (["--dtype", "int8"], "invalid choice"),
        (["--block-size", "100"], "invalid choice"),
        (["--hf-overrides", "[]"], "must be a JSON object"),
        (["--hf-overrides", "{"], "not JSON"),
        (["--group-size", "few"], "must be a whole number or auto"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_malformed_arguments_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["plan", "anything", *arguments])
    assert exit_.value.code == 2
    assert sentence in capsys.readouterr().err


def test_unknown_quantization_asks_for_the_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = folder(tmp_path, LLAMA_8B, quantization_config={"quant_method": "new"})
    assert main(["plan", name]) == 2
    assert "quantized by new, whose size is not known here. Give --weights" in capsys.readouterr().err
    answer = plan(capsys, name, "--weights", "6GB")
    assert answer["weight_bytes"] == 6 * 10**9


def test_plan_runs_without_vllm(llama: str) -> None:
    code = (
        "import sys; sys.modules['vllm'] = None; from farspan.cli import main; "
        f"sys.exit(main(['plan', {llama!r}, '--host-memory', '64', '--json']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["fits"]


def test_the_documented_example_is_what_the_command_prints() -> None:
    assert EXAMPLE.is_current(example_output()), "run: python -m tools.capacity_example --write"
