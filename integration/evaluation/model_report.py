"""The pages of `farspan report` for any model: what flex reads and keeps while an engine answers questions."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from farspan.engine_ext.errors import ConfigError
from farspan.evaluation.evaluate import (
    EvalSettings,
    Model,
    accuracy,
    check_settings,
    make_samples,
    reads_selection,
    vllm_model,
)
from farspan.evaluation.reading import by_layer_head
from farspan.evaluation.report_sections import Section, accuracy_density_section, head_sections
from farspan.evaluation.results import STOCK_FAILS_BELOW, Cell
from farspan.tables import Tables

TASKS = ("niah_single", "niah_multikey_2", "variable_tracking")
"""One question of each is drawn head by head."""
CURVE_TASK = "niah_multikey_1"
CURVE_GAMMAS = (0.7, 0.8, 0.9, 0.95, 0.98)
COVERAGE_ROWS = 16
HEAD_COLUMNS = (
    "method", "length", "rank", "layer", "head", "density", "density_min", "coverage", "coverage_min",
    "query_aware", "divergence",
)  # fmt: skip
CURVE_COLUMNS = (
    "gamma", "min_budget", "length", "seed", "count", "density", "coverage", "coverage_worst_head", "accuracy",
    "dense_accuracy",
)  # fmt: skip


@dataclass(frozen=True)
class ModelReport:
    """What to ask which model; see `farspan report --help`."""

    model: str
    length: int
    gamma: float
    min_budget: int
    chunk: int | None
    seed: int
    count: int
    """Questions of each point of accuracy against density."""
    out: Path
    engine_args: dict[str, Any] = field(default_factory=dict)
    chat_template: bool = True
    haystack: tuple[Path, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The farspan options of the engine; a request sets its own gamma."""
        prefill = {"gamma": self.gamma, "min_budget": self.min_budget, "min_seq_len": 0, "min_chunk_len": 0}
        return {"prefill": {"method": "flex", "coverage_rows": COVERAGE_ROWS, **prefill}}

    @property
    def questions(self) -> EvalSettings:
        """The same as `farspan eval` has it."""
        return EvalSettings(
            model=self.model,
            tasks=(*TASKS, CURVE_TASK),
            lengths=(self.length,),
            out=self.out,
            methods=("flex",),
            seed=self.seed,
            count=max(self.count, 1),
            chunk=self.chunk,
            options=self.options,
            engine_args=self.engine_args,
            chat_template=self.chat_template,
            haystack=self.haystack,
        )

    def check(self) -> None:
        """Raise ConfigError for what cannot be asked."""
        check_settings(self.questions)
        if not reads_selection(self.options, self.engine_args):
            raise ConfigError("engine_args has a worker_extension_cls; the report needs that place for its own")


def model_sections(
    report: ModelReport, open_model: Callable[..., AbstractContextManager[Model]] = vllm_model
) -> list[Section]:
    """Ask and draw; also writes heads.csv and curve.csv."""
    tables = Tables(report.out, fresh=True)
    panels: dict[str, list[dict[str, Any]]] = {}
    with open_model(report.questions, report.options) as model:
        assert model.selection is not None
        for task in TASKS:
            model.generate(samples_of(report, task, 1))
            rows = by_layer_head(model.selection())
            if not rows:
                raise ConfigError("no chunk was prefilled by flex: nothing to draw; ask for a greater --length")
            panels[f"{task}, γ = {report.gamma:g}"] = rows
            named = {"method": f"flex-g{report.gamma:g} {task}", "length": report.length}
            tables.add("heads.csv", HEAD_COLUMNS, (picked(HEAD_COLUMNS, {**named, **row}) for row in rows))
        curve = curve_rows(report, model)
        tables.add("curve.csv", CURVE_COLUMNS, curve)
    section = accuracy_density_section(curve, report.out)
    return [*head_sections(panels, report.out), Section(section.title, curve_text(report, curve), section.pictures)]


def curve_rows(report: ModelReport, model: Model) -> list[dict[str, Any]]:
    """Accuracy and density at several gammas, and densely."""
    assert model.selection is not None
    samples = samples_of(report, CURVE_TASK, report.count)
    dense = accuracy(samples, model.generate(samples, {"farspan.method": "dense"}))
    rows = []
    for gamma in CURVE_GAMMAS:
        model.selection()
        right = accuracy(samples, model.generate(samples, {"farspan.gamma": gamma}))
        heads = model.selection()
        if not heads or any(head["coverage"] is None for head in heads):
            raise ConfigError(
                f"length={report.length} with min_budget={report.min_budget}: no list leaves anything out. "
                "Ask for a greater --length, a lower --min-budget, or a larger --chunk"
            )
        values = (
            gamma,
            report.min_budget,
            report.length,
            report.seed,
            report.count,
            sum(head["density"] for head in heads) / len(heads),
            sum(head["coverage"] for head in heads) / len(heads),
            min(head["coverage"] for head in heads),
            right,
            dense,
        )
        rows.append(dict(zip(CURVE_COLUMNS, values, strict=True)))
    return rows


def curve_text(report: ModelReport, curve: Sequence[dict[str, Any]]) -> str:
    """What the curve shows, and whether anything follows from it."""
    dense = curve[0]["dense_accuracy"]
    points = "; ".join(
        f"γ {row['gamma']:g}: {100 * row['accuracy']:.0f} % at density {row['density']:.3f}, coverage "
        f"{row['coverage']:.3f} (worst head {row['coverage_worst_head']:.3f})"
        for row in curve
    )
    text = f"{report.count} questions of {CURVE_TASK}, {report.length} tokens. Dense: {100 * dense:.0f} %. {points}."
    if dense < STOCK_FAILS_BELOW:
        text += " The model itself fails this task at this length, so its accuracies say nothing about flex."
    return text


def samples_of(report: ModelReport, task: str, count: int) -> list[Any]:
    """Questions in the middle of whose text the answer lies."""
    return make_samples(report.questions, Cell("flex", task, report.length, 0.5, report.seed, count))


def picked(columns: Sequence[str], row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a table that a row has."""
    return {column: row[column] for column in columns}
