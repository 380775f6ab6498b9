"""The examples run, and the demo says what it promises."""

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
ENV = {"OMP_WAIT_POLICY": "PASSIVE", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
NOT_COMPILED = {"TORCHDYNAMO_DISABLE": "1", "VLLM_USE_AOT_COMPILE": "0"}
"""Compiling the model takes vLLM most of a minute on a CPU; one example does so for all."""


def run(*arguments: str, env: Mapping[str, str] = NOT_COMPILED) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **ENV, **env}, capture_output=True, text=True, check=False
    )


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
    example = run("examples/offline.py", env={})
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
    texts = ("the grass is green", "the grass is dry", "grass " * 2100)
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    # An earlier job has answered the first one, and was ended within a line.
    answers.write_text('{"number": 0, "text": "kept"}\n{"number": 1, "te')
    options = ["--engines", "1", "--host-memory", "0.2", "--gamma", "0.9", "--max-tokens", "4"]
    example = run("examples/ray_batch.py", str(prompts), str(answers), "--max-model-len", "2048", *options)
    assert example.returncode == 1, example.stderr[-3000:]
    assert "1 of 3 prompts have answers" in example.stdout
    found = {answer["number"]: answer for answer in map(json.loads, answers.read_text().splitlines())}
    assert found[0]["text"] == "kept"
    assert found[1]["text"]
    # Too long a prompt spoils its own answer alone.
    assert "2048" in found[2]["error"]


@pytest.mark.parametrize("asked", [None, "3"])
def test_engines_share_the_memory_of_a_machine_without_gpus(asked: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself vLLM asks for 92 % of it, which a second engine is refused."""
    from examples.ray_batch import Engine

    found: list[str | None] = []
    fake = SimpleNamespace(LLM=lambda *args, **kwargs: found.append(os.environ.get("VLLM_CPU_KVCACHE_SPACE")))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    # Set first, so that it is put back.
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", asked or "")
    if asked is None:
        monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")
    Engine("model", {}, None)
    assert found == [asked or "1"]


def test_the_star_job_asks_its_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a submitted job runs, up to the hosts: the cluster is the one around it, and hosts go to all machines."""
    from examples import star_job
    from tests.integration.star.test_command import TIMES

    asked: dict[str, Any] = {}

    class Llm(contextlib.AbstractContextManager[Any]):
        def __init__(self, model: str, hosts: int, **arguments: Any) -> None:
            asked.update(model=model, hosts=hosts, **arguments)

        def generate(self, context: str, query: str, params: Any) -> Any:
            asked.update(context=context, query=query, max_tokens=params.max_tokens)
            return star_job_output(TIMES)

        def __exit__(self, *error: object) -> None:
            asked["closed"] = True

    context = tmp_path / "report.txt"
    context.write_text("costs rose")
    monkeypatch.setattr(star_job, "StarLLM", Llm)
    options = ["--hosts", "4", "--tensor-parallel-size", "2", "--query", "why?", "--max-model-len", "4096"]
    monkeypatch.setattr(sys, "argv", ["star_job.py", "org/model", "--context", str(context), *options])
    assert star_job.main() == 0
    assert "They rose." in capsys.readouterr().out
    engine = {"tensor_parallel_size": 2, "max_model_len": 4096, "address": "auto", "strategy": "SPREAD"}
    question = {"context": "costs rose", "query": "why?", "max_tokens": 512}
    assert asked == {"model": "org/model", "hosts": 4, "closed": True} | engine | question


def star_job_output(times: Any) -> Any:
    """An answer without any host."""
    from farspan.star.output import StarOutput

    return StarOutput([7], "They rose.", "stop", None, None, times, 5)


def test_lm_eval_gets_our_options_and_its_scores_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With stand-ins for lm-eval; tests/integration/test_lm_eval.py starts an engine with such arguments."""
    from farspan.engine_ext.config import FlexPrefill, parse_config

    from examples import lm_eval_tasks

    engines: list[dict[str, Any]] = []
    ended: list[int] = []
    asked: list[tuple[Any, ...]] = []

    class VLLM:
        def __init__(self, pretrained: str, **arguments: Any) -> None:
            assert len(ended) == len(engines)
            engines.append(arguments | {"pretrained": pretrained})
            core = SimpleNamespace(shutdown=lambda: ended.append(1))
            self.model = SimpleNamespace(llm_engine=SimpleNamespace(engine_core=core))

    def simple_evaluate(model: VLLM, tasks: list[str], limit: int, task_manager: dict[str, Any]) -> Any:
        asked.append((tasks, limit, task_manager["metadata"]["max_seq_lengths"]))
        scores = {"alias": "niah", "4096,none": 1 - len(engines) / 8, "8192,none": -1.0, "4096_stderr,none": 0.1}
        return {"results": {"niah_single_1": scores}}

    def stand_in(name: str, **contents: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)

    stand_in("lm_eval", simple_evaluate=simple_evaluate)
    stand_in("lm_eval.models")
    stand_in("lm_eval.models.vllm_causallms", VLLM=VLLM)
    stand_in("lm_eval.tasks", TaskManager=dict)
    options = ["--lengths", "4096,8192", "--limit", "5", "--max-model-len", "9000", "--gammas", "0.95,0.9"]
    monkeypatch.setattr(sys, "argv", ["lm_eval_tasks.py", "org/model", *options])
    assert lm_eval_tasks.main() == 0
    assert asked == [(["niah_single_1"], 5, (4096, 8192))] * 3
    assert len(ended) == 3
    gammas = []
    for engine in engines:
        assert (engine["pretrained"], engine["max_model_len"]) == ("org/model", 9000)
        if engine.get("attention_backend") == "CUSTOM":
            prefill = parse_config(engine["additional_config"]["farspan"]).prefill
            assert isinstance(prefill, FlexPrefill)
            gammas.append(prefill.gamma)
    assert gammas == [0.95, 0.9]
    header, scores = capsys.readouterr().out.splitlines()
    assert header.split("  ")[-1].strip() == "flex γ 0.9"
    assert scores.split() == ["niah_single_1", "4096", "0.875", "0.750", "0.625"]


class Stub:
    """In place of an engine."""

    def __init__(self, starts: bool = True) -> None:
        if not starts:
            raise ValueError("no such model")

    def ready(self) -> None:
        pass

    def answer(self, prompts: list[str], max_tokens: int) -> list[str]:
        if "die" in prompts:
            os._exit(1)
        if "refuse" in prompts:
            raise ValueError("too long")
        return [prompt.upper()[:max_tokens] for prompt in prompts]


@pytest.fixture(scope="module")
def stub() -> Iterator[Any]:
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, ignore_reinit_error=True)
    yield ray.remote(num_cpus=1)(Stub)
    ray.shutdown()


@pytest.mark.faults
@pytest.mark.ray
def test_dead_engines_are_replaced_and_their_prompts_asked_once_more(stub: Any) -> None:
    from examples.ray_batch import Job

    started, answers = [], []

    def start() -> Any:
        started.append(stub.remote())
        return started[-1]

    prompts = dict(enumerate(["one", "die", "two", "refuse", "three", "four"]))
    Job(start, prompts, 2, 3, answers.append).run(2)
    found = {answer["number"]: answer for answer in answers}
    assert len(answers) == len(found) == len(prompts)
    texts = {number: answer["text"] for number, answer in found.items() if "text" in answer}
    assert texts == {0: "ONE", 2: "TWO", 4: "THR", 5: "FOU"}
    assert "died" in found[1]["error"]
    assert "for the second time" in found[1]["error"]
    assert found[3]["error"].endswith("too long")
    # With prompt 0, then alone.
    assert len(started) in (3, 4)


@pytest.mark.faults
@pytest.mark.ray
def test_engines_that_do_not_start_end_the_job(stub: Any) -> None:
    from farspan.engine_ext.errors import ConfigError

    from examples.ray_batch import Job

    with pytest.raises(ConfigError, match=r"did not start.*no such model"):
        Job(lambda: stub.remote(starts=False), {0: "one"}, 2, 3, print).run(1)


@pytest.mark.e2e
def test_many_documents_get_one_question(tmp_path: Path) -> None:
    example = run("examples/long_documents.py", "--generated", "2", "--generated-len", "1500", "--always-sparse")
    assert example.returncode == 0, example.stderr[-3000:]
    lines = re.findall(r"^generated \d, expected (.*) \(1500 tokens\): (.*)$", example.stdout, flags=re.MULTILINE)
    assert len(lines) == 2, example.stdout
    for expected, answer in lines:
        assert set(expected.split()) <= set(answer.split())
    assert re.search(r"^sparse: read \d+ % of the blocks", example.stdout, flags=re.MULTILINE)


def test_documents_shorter_than_a_span_have_no_coverage() -> None:
    from examples.long_documents import what_was_read

    short: list[dict[str, Any]] = [{"density": 1.0, "coverage_min": None}] * 2
    assert what_was_read(short) == "sparse: read 100 % of the blocks, kept at least 100 % of the attention mass"
    long: list[dict[str, Any]] = [{"density": 0.5, "coverage_min": 0.75}, {"density": 0.25, "coverage_min": 0.5}]
    assert what_was_read(long) == "sparse: read 38 % of the blocks, kept at least 50 % of the attention mass"
    assert what_was_read([]).startswith("dense: ")


def test_demo_refuses_an_unknown_option() -> None:
    demo = run("examples/demo.py", "--lenght", "10")
    assert demo.returncode == 2
    assert "--lenght" in demo.stderr
