"""Wrong command lines of every program: one sentence and an exit status, never a traceback. None starts an engine."""

import importlib
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan import __version__
from farspan.cli import main as farspan
from farspan.command import Terminated, chain_of, run_command, sentence_of
from farspan.engine_ext.errors import ConfigError

EVAL_ROW = "method,task,length,depth,seed,count,accuracy,density,coverage,coverage_worst,note\n"
EVAL_IDENTITY = '{"model": "needle", "chunk": null, "engine_args": {}, "options": {}}'
LLAMA = '{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "max_position_embeddings": 4096}'
FILES: dict[str, str | bytes] = {
    "a-file": "",
    "damaged-json/eval.json": "{",
    "other-json/eval.json": "[]",
    "empty-json/eval.json": "{}",
    "no-json/eval.csv": EVAL_ROW,
    "other-csv/eval.json": EVAL_IDENTITY,
    "other-csv/eval.csv": "a,b\n1,2\n",
    "cut-csv/eval.json": EVAL_IDENTITY,
    "cut-csv/eval.csv": EVAL_ROW + "dense,niah_single,1024,,0,3,1.0,,,,\ndense,niah_si",
    "word-csv/eval.json": EVAL_IDENTITY,
    "word-csv/eval.csv": EVAL_ROW + "dense,niah_single,long,,0,3,1.0,,,,\n",
    "binary-csv/eval.json": EVAL_IDENTITY,
    "binary-csv/eval.csv": b"\xb4\xff\x00",
    "no-model/config.json": "{",
    "list-model/config.json": "[]",
    "words-model/config.json": '{"max_position_embeddings": "many"}',
    "unknown-model/config.json": "{}",
    "half-model/config.json": LLAMA,
    "empty.csv": "",
    "binary.csv": b"\xb4\xff\x00",
    "word.csv": EVAL_ROW + "flex,x,long,0.5,0,4,1.0,,,,\n",
    "heads.csv": "layer,head,density,query_aware,divergence,coverage\n0,0,x,1,0.1,\n",
    "sweep.csv": "min_budget,density,accuracy\n0,0.1,1\n",
    "a-folder.csv/inside": "",
    "rows/decode.csv": "a,b\n1,2\n",
    "binary-rows/decode.csv": b"\xb4\xff\x00",
}
SWEEP = "benchmarks.needle_training.sweep"
TRAIN = "benchmarks.needle_training.train"
DISTANCE = "benchmarks.needle_training.distance"
HEADS = "farspan.needle.heads"
WRONG: list[tuple[str, str, str, int]] = [
    # program, arguments, what it says, exit status
    ("farspan", "", "the following arguments are required: COMMAND", 2),
    ("farspan", "evil", "invalid choice: 'evil'", 2),
    ("farspan", "eval --out a-file", "--out a-file is no folder that can be written to (File exists)", 2),
    ("farspan", "eval --out a-file/x", "--out a-file/x is no folder that can be written to (Not a directory)", 2),
    ("farspan", "eval --out /proc/x", "--out /proc/x is no folder that can be written to", 2),
    ("farspan", "eval --out damaged-json", "damaged-json/eval.json is damaged: it is not JSON", 2),
    ("farspan", "eval --out other-json", "other-json/eval.json is damaged: it holds no JSON object", 2),
    ("farspan", "eval --out empty-json", "empty-json/eval.json is damaged: it lacks one of", 2),
    ("farspan", "eval --out no-json", "no-json/eval.json is missing", 2),
    ("farspan", "eval --out other-csv", "other-csv/eval.csv does not have the columns method,task", 2),
    ("farspan", "eval --out cut-csv", "cut-csv/eval.csv ends in the middle of a line", 2),
    ("farspan", "eval --out word-csv", "word-csv/eval.csv, line 2, cannot be read", 2),
    ("farspan", "eval --out binary-csv", "binary-csv/eval.csv is no CSV file", 2),
    ("farspan", "eval --model nowhere", "model='nowhere' is not a folder with a config.json", 2),
    ("farspan", "eval --model no-model", "no-model/config.json is damaged: it is not JSON", 2),
    ("farspan", "eval --model list-model", "list-model/config.json is damaged: it holds no JSON object", 2),
    ("farspan", "eval --model words-model", "max_position_embeddings='many' in words-model/config.json", 2),
    ("farspan", "eval --count nan", "argument --count: invalid int value", 2),
    ("farspan", "eval --depths nan", "depth=nan", 2),
    ("farspan", "eval --depths top", "must be numbers separated by commas", 2),
    ("farspan", "eval --lengths 99999999999999999999", "lengths are in tokens, at least 256", 2),
    ("farspan", "eval --options {", "not JSON", 2),
    ("farspan", 'eval --options {"dense":1}', "options of method 'dense' are 1", 2),
    ("farspan", 'eval --options {"dense":null}', "options of method 'dense' are None", 2),
    ("farspan", 'eval --options {"prefill":{"method":"magic"}}', "prefill.method='magic'", 2),
    (
        "farspan",
        'eval --engine-args {"hf_overrides":{"max_position_embeddings":"x"}}',
        "max_position_embeddings='x' in engine_args",
        2,
    ),
    ("farspan", 'eval --engine-args {"no_such":1}', "vLLM refuses the engine of model 'needle': EngineArgs", 2),
    ("farspan", 'eval --engine-args {"dtype":"float3"}', "vLLM refuses the engine of model 'needle': literal", 2),
    ("farspan", 'eval --engine-args {"max_num_seqs":0}', "max_num_seqs: Input should be greater", 2),
    (
        "farspan",
        'eval --engine-args {"block_size":7}',
        "farspan eval: block_size=7; farspan supports multiples of 16",
        2,
    ),
    ("farspan", "eval --model unknown-model --lengths 512", "Should have a `model_type` key", 2),
    ("farspan", "eval --model half-model --lengths 512", "half-model", 2),
    ("farspan", "eval --model no-such/model --lengths 512", "no-such/model", 2),
    (
        "farspan",
        "report /nope",
        "farspan report: error: unrecognized arguments: /nope. To name a model: --model /nope",
        2,
    ),
    ("farspan", "star serve --what", "farspan star: error: unrecognized arguments: --what.", 2),
    ("farspan", "report --out a-file", "--out a-file is no folder that can be written to", 2),
    ("farspan", "report --from-csv ,", "must be files separated by commas", 2),
    ("farspan", "report --from-csv missing.csv", "from_csv='missing.csv' is not there", 2),
    ("farspan", "report --from-csv a-folder.csv", "from_csv='a-folder.csv' is not there", 2),
    ("farspan", "report --from-csv empty.csv", "from_csv='empty.csv' has no rows", 2),
    ("farspan", "report --from-csv binary.csv", "binary.csv is no CSV file", 2),
    ("farspan", "report --from-csv word.csv", "word.csv, line 2, cannot be read", 2),
    ("farspan", "report --from-csv heads.csv", "from_csv='heads.csv' has a cell that is no number", 2),
    ("farspan", "report --from-csv sweep.csv", "from_csv='sweep.csv' has the columns", 2),
    ("farspan", "report --gamma nan", "report.gamma=nan", 2),
    ("farspan", "report --min-budget 5", "report.min_budget=5", 2),
    ("farspan", "report --chunk -3", "chunk=-3", 2),
    ("farspan", "report --model other", "model='other' is not a folder with a config.json", 2),
    ("farspan", "star --hosts 0", "hosts=0; allowed: a whole number from 1", 2),
    ("farspan", "star --context missing.txt", "--context missing.txt: ", 2),
    ("farspan", "star sing", "invalid choice: 'sing'", 2),
    (HEADS, "--out a-file/h.csv", "a-file is no folder", 2),
    (HEADS, "--out h.csv --model nowhere", "nowhere/config.json: No such file or directory", 2),
    (HEADS, "--out h.csv --lengths x", "must be whole numbers separated by commas", 2),
    (HEADS, "--out h.csv --lengths 10", "prompts have at least 256 tokens", 2),
    (HEADS, "--out h.csv --device tpu", "torch has no device 'tpu' here", 2),
    (SWEEP, "--out a-file", "--out a-file is no folder", 2),
    (SWEEP, "--out s --lengths x", "must be whole numbers separated by commas", 2),
    (SWEEP, "--out s --lengths 100", "prompts have at least 256 tokens", 2),
    (SWEEP, "--out s --tasks nothing", "tasks=['nothing']; known are", 2),
    (SWEEP, "--out s --gammas 2", "sweep.gamma=2.0", 2),
    (SWEEP, "--out s --count 0", "count and workers are at least 1", 2),
    (SWEEP, "--out s --model nowhere", "nowhere/config.json: No such file or directory", 2),
    (TRAIN, "--out a-file", "--out a-file is no folder", 2),
    (TRAIN, "--out t --max-minutes x", "invalid float value", 2),
    (TRAIN, "--out t --device cuda:99", "torch has no device 'cuda:99' here", 2),
    (DISTANCE, "--out a-file/x.csv", "a-file is no folder", 2),
    (DISTANCE, "--out d.csv --count 0", "count at least 1", 2),
    ("benchmarks.run", "nothing", "no benchmark named nothing", 2),
    ("benchmarks.run", "decode --dry-run --date yesterday", "must be a date YYYY-MM-DD", 2),
    ("benchmarks.run", "--collect nowhere", "no folder with CSV files", 1),
    ("benchmarks.run", "--collect rows", "rows/decode.csv does not have the columns run_id", 1),
    ("benchmarks.run", "--collect binary-rows", "binary-rows/decode.csv is no CSV file", 1),
    ("benchmarks.compare_revisions", "--base nowhere --dry-run", "is no checkout of this repository", 2),
    ("benchmarks.compare_revisions", "--base ROOT --base-adapter none.py --dry-run", "none.py is no file", 2),
    ("benchmarks.plot_block_sparse", "--data nowhere", "no rows of prefill_block_sparse", 1),
    ("benchmarks.plot_block_sparse", "--out a-file/x.png", "a-file is no folder", 2),
    ("tools.lock", "--what", "unrecognized arguments: --what", 2),
    ("tools.typecheck", "--what", "unrecognized arguments: --what", 2),
    ("examples.demo", "--length 100", "length=100; prompts have 256 to 130944 tokens", 2),
    ("examples.demo", "--length -1", "length=-1; prompts have 256 to 130944 tokens", 2),
    ("examples.demo", "--length x", "invalid int value: 'x'", 2),
    ("examples.client", "--url x", "unrecognized arguments", 2),
    ("examples.lm_eval_tasks", "org/model", 'lm-eval is not installed. pip install "lm_eval[vllm,ruler]"', 2),
    ("examples.client", "http://127.0.0.1:1/v1", "No server answers at http://127.0.0.1:1/v1", 1),
]
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What earlier runs left, as the current directory."""
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_program(program: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a program in this process; returns its exit status, with what it says on stderr."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    entry: Callable[[], int | None] = farspan if program == "farspan" else importlib.import_module(program).main
    try:
        return entry() or 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("program", "arguments", "message", "status"), WRONG, ids=[f"{each[0]} {each[1]}" for each in WRONG]
)
def test_a_wrong_command_line_gets_a_sentence(
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    program: str,
    arguments: str,
    message: str,
    status: int,
) -> None:
    # vLLM's loggers keep the stream that an earlier test has closed, and would complain with a traceback.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    assert run_program(program, arguments.replace("ROOT", str(ROOT)).split(), monkeypatch) == status
    said = capfd.readouterr().err
    assert message in said
    assert "Traceback" not in said
    sentence = said.rstrip().splitlines()[-1]
    if program == "farspan" and status == 2:
        assert sentence.startswith(("farspan: error: ", "farspan eval: ", "farspan report: ", "farspan star: "))
    assert {path: path.read_bytes() for path in before} == before, "it changed what an earlier run left"


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what to do without a GPU")
@pytest.mark.parametrize("arguments", ["decode", "--out a-file"])
def test_benchmarks_without_a_gpu(
    files: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], arguments: str
) -> None:
    assert run_program("benchmarks.run", arguments.split(), monkeypatch) == 1
    assert "benchmarks need a CUDA GPU" in capfd.readouterr().err


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        farspan(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"farspan {__version__}\n"


@pytest.mark.parametrize("arguments", ["eval", "report --from-csv word.csv"])
def test_matplotlib_is_missed_before_anything_is_done(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str
) -> None:
    from farspan import command

    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert farspan([*arguments.split(), "--out", "new"]) == 2
    assert "matplotlib, which is not installed. Install farspan's extra `report`" in capsys.readouterr().err
    assert not (files / "new").exists()


def test_a_failed_start_leaves_the_folder_free(files: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What was not evaluated does not forbid another model the folder."""
    for model in ("unknown-model", "half-model"):
        assert farspan(["eval", "--model", model, "--lengths", "512", "--out", "new"]) == 2
        assert "choose another --out" not in capfd.readouterr().err


def test_faults_keep_their_traceback() -> None:
    def divide() -> None:
        raise ZeroDivisionError("a fault of ours")

    with pytest.raises(ZeroDivisionError):
        run_command("program", divide)


@pytest.mark.parametrize(
    ("stop", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated"), (signal.SIGHUP, 129, "terminated")],
)
def test_a_signal_ends_the_program_and_its_children(
    capsys: pytest.CaptureFixture[str], stop: signal.Signals, status: int, word: str
) -> None:
    import multiprocessing
    import time

    cleaned = []

    def work() -> None:
        child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(600,))
        child.start()
        try:
            os.kill(os.getpid(), stop)
            time.sleep(600)
        finally:
            cleaned.append(child)

    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    assert run_command("program", work) == status
    assert capsys.readouterr().err == f"program: {word}\n"
    (child,) = cleaned
    assert not child.is_alive()
    assert {each: signal.getsignal(each) for each in before} == before


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ConfigError("x=1;\n allowed: 2."), "x=1; allowed: 2."),
        (FileNotFoundError(2, "No such file or directory", "x"), "x: No such file or directory"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("Engine core initialization failed. See above."), "vLLM's engine did not start; its log above"),
        (KeyError("x"), None),
        (RuntimeError("x"), None),
    ],
    ids=["ours", "file", "disk", "engine", "key", "runtime"],
)
def test_what_an_exception_says(error: Exception, sentence: str | None) -> None:
    said = sentence_of(error)
    assert said is sentence is None or (said is not None and sentence is not None and said.startswith(sentence))


def test_a_refusal_is_found_behind_other_exceptions() -> None:
    from pydantic import BaseModel, model_validator

    class Checked(BaseModel):
        @model_validator(mode="after")
        def refuse(self) -> Any:
            raise ConfigError("the sentence")

    try:
        Checked()
    except ValueError as error:
        assert sentence_of(RuntimeError("outside")) is None
        wrapped = RuntimeError("outside")
        wrapped.__cause__ = error
        assert sentence_of(wrapped) == "the sentence"
        assert [type(each).__name__ for each in chain_of(wrapped)][:2] == ["RuntimeError", "ValidationError"]


def test_terminated_is_no_exception_that_libraries_swallow() -> None:
    assert not issubclass(Terminated, Exception)


@pytest.mark.parametrize("program", ["examples/offline.py", "examples/client.py", "examples/demo.py"])
def test_examples_have_help(program: str) -> None:
    run = subprocess.run([sys.executable, program, "--help"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: ")


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_that_meets_a_destructor_is_not_lost(name: str, status: int) -> None:
    """Python drops exceptions that are raised there."""
    program = f"""
import os, signal, sys, time
from farspan.command import run_command

class Late:
    def __del__(self):
        os.kill(os.getpid(), signal.{name})
        time.sleep(0.01)

def work():
    Late()
    time.sleep(20)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(run_command("late", work))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert ended.returncode == status, ended.stderr
    assert ended.stderr in ("late: terminated\n", "late: interrupted\n")
