"""The commands and options in README and docs are ones that our programs, make and vLLM understand."""

import ast
import itertools
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from farspan.cli import main, make_parser
from farspan.engine_ext.config import parse_config

from benchmarks.run import MODULES
from tests.test_docs import PAGES, ROOT, page_id

PROGRAMS = ("farspan", "make", "vllm", "python")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)


def commands_of(page: Path) -> Iterator[list[str]]:
    """What a page's code blocks, its lines in backticks and its prompts ("$ …") say to type, in words."""
    text = page.read_text()
    lines = re.findall(r"`((?:" + "|".join(PROGRAMS) + r") [^`\n]+)`", BLOCK.sub("", text))
    for language, block in BLOCK.findall(text):
        if language not in ("", "sh"):
            continue
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            lines += [line.removeprefix("$ ").partition("  #")[0]]
    for line in lines:
        words = shlex.split(line, comments=True) if line.count("'") % 2 == 0 and line.count('"') % 2 == 0 else []
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words.pop(0)
        # "python -m" alone is prose, and our log's lines begin like commands.
        if len(words) > 1 and words[0] in PROGRAMS and words[1:] != ["-m"] and words[1] != "attention":
            yield words


COMMANDS = [
    pytest.param(words, id=f"{page_id(page)}: {' '.join(words)}") for page in PAGES for words in commands_of(page)
]


def test_there_are_commands_of_every_program() -> None:
    words = [str(each.id) for each in COMMANDS]
    for program in (*PROGRAMS, "farspan plan", "farspan star serve", "vllm serve", "make bench ARGS"):
        assert any(f": {program}" in each for each in words), program


@pytest.mark.parametrize("words", COMMANDS)
def test_the_command_is_understood(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    check = {"farspan": check_farspan, "make": check_make, "vllm": check_vllm, "python": check_python}
    try:
        check[words[0]](words[1:])
    except SystemExit as ended:  # how argparse refuses, and how --version ends
        if ended.code:
            pytest.fail(capsys.readouterr().err)


def check_farspan(words: list[str]) -> None:
    (commands,) = (action for action in make_parser()._actions if action.dest == "command")
    assert commands.choices is not None
    assert words[0] in commands.choices or words[0].startswith("--")
    # Prose names a command without what it needs.
    if any(word.startswith("-") for word in words):
        make_parser().parse_args(words)


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert words[0] in targets
    for word in words[1:]:
        assert word.startswith("ARGS=")
        if words[0] == "bench":
            names = [each for each in word.removeprefix("ARGS=").split() if each.isidentifier()]
            assert set(names) <= {*MODULES, "DIR"}


def check_vllm(words: list[str]) -> None:
    from vllm.benchmarks.serve import add_cli_args
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if words[:2] == ["bench", "serve"]:
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        parser.parse_args(words[2:])
        return
    assert words[0] == "serve"
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(words[1:])
    assert parsed.attention_config is not None or parsed.attention_backend == "CUSTOM"
    if parsed.additional_config:
        parse_config(parsed.additional_config["farspan"])


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        if words[1] == "benchmarks.run":
            leading = itertools.takewhile(lambda word: not word.startswith("-"), words[2:])
            names = [each for each in leading if each.isidentifier()]
            assert set(names) <= {*MODULES}
    elif words[0] == "-c":
        compile(words[1], "-c", "exec")
    else:
        assert (ROOT / words[0]).exists()


def options_of(page: Path) -> Iterator[dict[str, Any]]:
    """The option trees of farspan that a page shows, as JSON or as Python."""
    text = page.read_text()
    for match in re.finditer(r'\{\\?"farspan": \{', text):
        depth = 0
        for end in range(match.start(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                break
        tree = text[match.start() : end + 1]
        if "…" not in tree and "..." not in tree:
            yield json.loads(tree) if "true" in tree or "false" in tree else ast.literal_eval(tree)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_shown_options_are_valid(page: Path) -> None:
    for tree in options_of(page):
        parse_config(tree["farspan"])


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_shown_programs_are_python(page: Path) -> None:
    for language, block in BLOCK.findall(page.read_text()):
        if language == "python":
            compile(block, page_id(page), "exec")


RUNNABLE = [
    each
    for each in COMMANDS
    if each.values[0][:2] in (["farspan", "plan"], ["farspan", "--version"], ["python", "-c"])
    or each.values[0][:3] == ["farspan", "star", "plan"]
]
"""Commands that need neither an engine nor files of the reader's."""


@pytest.mark.parametrize("words", [each for each in RUNNABLE if len(each.values[0]) > 2 or "--version" in str(each.id)])
def test_what_needs_no_engine_runs(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    """The bundled model stands for the reader's."""
    from farspan.needle import model_dir

    arguments = [str(model_dir()) if word in ("MODEL", "llama-8b") else word for word in words[1:]]
    if words[0] == "python":
        subprocess.run([sys.executable, *arguments], check=True)
    else:
        try:
            status = main(arguments)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0
        assert status == 0
    assert capfd.readouterr().out
