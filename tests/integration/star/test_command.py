"""What `farspan star` shows, and what it refuses before any host starts."""

import io
from pathlib import Path
from typing import Any

import pytest
from farspan.cli import main
from farspan.star.command import Bar, describe, split_question
from farspan.star.llm import StarLLM
from farspan.star.output import Progress, StarOutput, StarTimes

from tests.engine_ext.star.hosts import Layout

TIMES = StarTimes(
    phase_1_s=2.0,
    first_token_s=2.5,
    total_s=3.0,
    token_s=[0.01, 0.03],
    exchanged_bytes=3 * 2**20,
    host_s=[1.5, 2.0],
    restart_s=0.0,
)


class Terminal(io.StringIO):
    """A stream that is one."""

    def isatty(self) -> bool:
        """It is."""
        return True


def test_the_bar_counts_blocks() -> None:
    stream = io.StringIO()
    bar = Bar(stream)
    for done in (0, 0, 2, 4):
        bar.show(Progress("phase 1", done, 4, []))
    bar.show(Progress("phase 2", 4, 4, [1, 2, 3]))
    bar.end()
    lines = stream.getvalue().splitlines()
    assert [line.split()[-2] for line in lines[:3]] == ["0/4", "2/4", "4/4"]
    assert lines[1].count("█") == lines[1].count("░") == 15
    assert lines[3] == "phase 2: 3 tokens"


def test_on_a_terminal_it_stays_on_one_line() -> None:
    stream = Terminal()
    bar = Bar(stream)
    bar.show(Progress("phase 1", 1, 4, []))
    bar.end()
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K")


def test_where_the_time_went() -> None:
    shards: Any = Layout(2, 128, 32, 32, (3, 1)).shards()
    text = describe(StarOutput([1], "", "stop", None, shards, TIMES))
    assert "128 tokens of context in blocks of 32, anchor 32" in text
    assert "host 0: 3 blocks in 1.50 s, host 1: 1 block in 2.00 s" in text
    assert "first token after 2.50 s, then 20.0 ms a token; 3.00 MiB exchanged" in text
    assert describe(StarOutput([1], "", "stop", None, None, TIMES)).startswith("exact attention on one host")


def test_a_generated_prompt_is_split_before_its_question() -> None:
    assert split_question("note: a b. question: a answer: a") == ("note: a b.", "question: a answer: a")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--hosts", "0"], "hosts=0; allowed: a whole number from 1"),
        (["--context", "nowhere.txt"], "--context nowhere.txt: "),
        (["--model", "somewhere"], "--context is missing"),
        (["--options", '{"string": {}}'], "without string: both move positions"),
        (["--engine-args", '{"pipeline_parallel_size": 2}'], "pipeline_parallel_size=2; allowed: 1"),
        (["--block-len", "100"], "block_len=100; allowed: a multiple of"),
        (["--length", "100"], "--length 100; prompts have at least 256 tokens"),
        (["--max-tokens", "0"], "vLLM refuses --max-tokens or --temperature"),
        (["serve", "--model", "nowhere"], "model='nowhere' has no tokenizer that can be read"),
        (["--timeout", "0"], "star.timeout_s=0.0; allowed: a number of seconds"),
        (["--engine-args", '{"hosts": 3}'], "--engine-args has 'hosts'; allowed: arguments of vllm.LLM that"),
        (
            ["--address", "127.0.0.1:1"],
            "the Ray cluster at '127.0.0.1:1' cannot be used ([Errno 111] Connection refused)",
        ),
    ],
    ids=[
        "hosts",
        "file",
        "no-context",
        "string",
        "tp",
        "block",
        "length",
        "tokens",
        "model",
        "timeout",
        "own",
        "address",
    ],
)
def test_mistakes_are_sentences(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["star", *arguments]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("action", "option"),
    [("ask", "--port=1"), ("serve", "--query=why?"), ("plan", "--hosts=8"), ("plan", '--options={"kernel": "fa3"}')],
)
def test_options_without_effect_are_refused(action: str, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["star", action, option])
    assert f"{option.partition('=')[0]} has no effect with {action}. Leave it out." in capsys.readouterr().err


def test_every_option_reaches_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of StarLLM's that the command line has."""
    given: dict[str, Any] = {}

    class Told(Exception):
        pass

    def start(*arguments: Any, **more: Any) -> Any:
        given.update(more)
        raise Told

    start.__init__ = StarLLM.__init__  # type: ignore[attr-defined]
    monkeypatch.setattr("farspan.star.command.StarLLM", start)
    told = {"block_len": 256, "anchor_len": 128, "anchor": "share", "visibility": "all", "timeout_s": 7.0}
    told |= {"start_timeout_s": 70.0, "graphs": True, "address": "auto", "strategy": "SPREAD", "seed": 3}
    options = [f"--{name.removesuffix('_s').replace('_', '-')}={value}" for name, value in told.items()]
    options[options.index("--graphs=True")] = "--graphs"
    options[-1] = '--engine-args={"seed": 3}'
    with pytest.raises(Told):
        main(["star", *options])
    assert {name: given[name] for name in told} == told


def test_a_context_can_come_from_a_file(tmp_path: Path) -> None:
    from farspan.star.command import StarCommand, read_question

    (tmp_path / "context.txt").write_text("words")
    command = StarCommand(
        model="m", hosts=2, context=tmp_path / "context.txt", query="why?", length=0, max_tokens=1, temperature=0.0,
        block_len=None, anchor_len=None, timeout_s=1.0, address=None, strategy="PACK", options={}, engine={},
    )  # fmt: skip
    assert read_question(command) == ("words", "why?", "")
