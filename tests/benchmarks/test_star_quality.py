"""What blocks cost in answers, on the bundled model: the same questions for all, and which of them a run asks."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.evaluation.ruler import make_ruler_sample
from farspan.needle import model_dir

from benchmarks import star
from benchmarks.plain_llama import PlainLlama
from benchmarks.real import Inputs, write_questions
from benchmarks.record import BenchmarkError, Environment, Recorder
from benchmarks.star_quality import Answers, measure, tokens_of
from tests.integration.test_ruler import TEMPLATE, Letters

ENVIRONMENT = Environment("20261128-abc", "2026-11-28", "0123", "cpu", "", "2.11", "3.6", "0.32")


@pytest.mark.parametrize("task", ["niah_single", "niah_multiquery", "variable_tracking"])
def test_the_query_is_the_question_and_what_follows_it(task: str) -> None:
    tokenizer = Letters()
    tokenizer.chat_template = TEMPLATE
    sample = make_ruler_sample(task, 1500, 3, tokenizer)
    tokens, query_len = tokens_of(tokenizer, sample)
    query = tokenizer.decode(tokens[-query_len:].tolist())
    assert tokenizer.decode(tokens.tolist()) == sample.prompt
    assert query.startswith(sample.question)
    assert "<assistant>" in query
    assert all(answer in tokenizer.decode(tokens[:-query_len].tolist()) for answer in sample.answers)


def inputs_of(folder: Path, **more: Any) -> Inputs:
    texts = (write_questions(folder / "text"),)
    return Inputs("needle", texts, "needle", lengths=(512,), prompts=1, questions=1, **more)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it reads in 16 bits")
def test_a_checkpoint_is_read_and_asked_in_every_way(tmp_path: Path) -> None:
    recorder = Recorder(None, ENVIRONMENT)
    measure(recorder, inputs_of(tmp_path, variants=("star-n2", "star-n4")))
    drifts = {row.variant: float(row.p50) for row in recorder.rows if row.metric == "drift"}
    assert set(drifts) == {"star-n2", "star-n4"}
    # Two blocks see the whole context.
    assert abs(drifts["star-n2"]) < 1e-6
    right = {(row.case, row.variant): float(row.p50) for row in recorder.rows if row.metric == "accuracy"}
    assert right["n512-niah_single-needle-fp32-q1", "dense"] == 1.0
    assert right["n512-niah_multi-needle-fp32-q3", "star-n2"] == right["n512-niah_multi-needle-fp32-q3", "dense"]
    assert len(right) == 9


def test_it_asks_nothing_more_when_its_time_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, asked = Recorder(None, ENVIRONMENT), []
    monkeypatch.setattr(Answers, "ask", lambda self, sample: asked.append(sample))
    measure(recorder, inputs_of(tmp_path, variants=("star-n4",), seconds=0.0))
    assert not asked
    assert [row.metric for row in recorder.rows] == ["drift"]
    with pytest.raises(BenchmarkError, match=r"star-n3.*known are dense, star-n2"):
        measure(recorder, inputs_of(tmp_path, variants=("star-n3",)))


def test_it_asks_only_the_kinds_that_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, asked = Recorder(None, ENVIRONMENT), []
    monkeypatch.setattr(Answers, "ask", lambda self, sample: asked.append(sample.task))
    inputs = replace(inputs_of(tmp_path, kinds=("variable_tracking",)), prompts=0)
    measure(recorder, inputs)
    assert asked == ["variable_tracking"]
    with pytest.raises(BenchmarkError, match=r"kinds \['qa'\]; known are niah_single"):
        measure(recorder, replace(inputs, kinds=("qa",)))


def test_positions_that_are_scaled_are_refused(tmp_path: Path) -> None:
    config = (model_dir() / "config.json").read_text().replace("{", '{"rope_scaling": {"factor": 8.0},', 1)
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").symlink_to(model_dir() / "model.safetensors")
    with pytest.raises(BenchmarkError, match="rope_scaling"):
        PlainLlama.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("cases", "wanted"),
    [
        (
            "",
            {(65536, "fa3"), (65536, "farspan-star-n4-g0.9")}
            | {
                (n, name)
                for n in (65536, 524288)
                for name in ("tp2-fa3", "farspan-star-n4-shared", "farspan-star-n8-g0.9")
            },
        ),
        (r"n524288-\S+ (fa3|farspan-star-n4-shared)$", {(524288, "fa3"), (524288, "farspan-star-n4-shared")}),
    ],
    ids=["all", "chosen"],
)
def test_star_measures_what_is_chosen(cases: str, wanted: set[tuple[int, str]]) -> None:
    bench: Any = object.__new__(star.Bench)
    bench.recorder, bench.label = Recorder(None, ENVIRONMENT, cases=cases), "llama8b-l8-bf16"
    bench.is_chosen, bench.cases = bool(cases), [star.Case(65536, 1), star.Case(524288, 1)]
    names = ("fa3", "tp2-fa3", "farspan-star-n4-shared", "farspan-star-n8-g0.9", "farspan-star-n4-g0.9")
    assert {(case.length, name) for case in bench.cases for name in names if bench.wants(case.length, name)} == wanted
