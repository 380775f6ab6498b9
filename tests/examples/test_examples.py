"""The examples run, and the demo says what it promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ENV = {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | ENV, capture_output=True, text=True, check=False)


@pytest.mark.e2e
def test_demo_answers_with_the_stock_tokens() -> None:
    demo = run("examples/demo.py", "--length", "1024")
    assert demo.returncode == 0, demo.stdout + demo.stderr
    question, _, repository = demo.stdout.partition("Text of this repository")
    for name in ("vLLM's own", "farspan dense", "farspan flex"):
        assert re.search(rf"^{name} .* 4 of 4 ", question, flags=re.MULTILINE), question
    for text in (question, repository):
        assert re.search(r"^farspan dense .* yes ", text, flags=re.MULTILINE), text


@pytest.mark.e2e
def test_offline_example_answers() -> None:
    example = run("examples/offline.py")
    assert example.returncode == 0, example.stderr[-3000:]
    expected = re.search(r"^expected: (.*)$", example.stdout, flags=re.MULTILINE)
    assert expected is not None
    for method in ("flex", "dense"):
        line = re.search(rf"^{method}: (.*)$", example.stdout, flags=re.MULTILINE)
        assert line is not None, example.stdout
        assert set(expected[1].split()) <= set(line[1].split())


@pytest.mark.ray
@pytest.mark.e2e
def test_star_demo_answers_in_blocks() -> None:
    demo = run("examples/star_demo.py", "--length", "1024")
    assert demo.returncode == 0, demo.stdout + demo.stderr[-3000:]
    assert re.search(r"^exact: 4 of 4 right", demo.stdout, flags=re.MULTILINE), demo.stdout
    # Two blocks on two hosts see all of the context.
    assert re.search(r"^blocks of N/2: 4 of 4 right", demo.stdout, flags=re.MULTILINE), demo.stdout
    for share in (4, 8):
        assert f"blocks of N/{share}: " in demo.stdout


@pytest.mark.e2e
@pytest.mark.ray
def test_engines_under_ray_answer_a_file(tmp_path: Path) -> None:
    prompts, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the grass is {word}"}) + "\n" for word in ("green", "dry")))
    options = ["--engines", "1", "--host-memory", "0.2", "--gpus-per-engine", "0", "--max-tokens", "4"]
    example = run("examples/offload_batch.py", str(prompts), str(answers), "--max-model-len", "2048", *options)
    assert example.returncode == 0, example.stderr[-3000:]
    found = [json.loads(line) for line in answers.read_text().splitlines()]
    assert sorted(answer["number"] for answer in found) == [0, 1]
    assert all(answer["text"] for answer in found)


def test_demo_refuses_an_unknown_option() -> None:
    demo = run("examples/demo.py", "--lenght", "10")
    assert demo.returncode == 2
    assert "--lenght" in demo.stderr
