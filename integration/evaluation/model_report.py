"""The pages of `farspan report` for any model: what flex reads and keeps while an engine answers questions."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
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
from farspan.evaluation.report_settings import ReportSettings
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


def engine_options(settings: ReportSettings) -> dict[str, Any]:
    """The farspan options of the engine; a request sets its own gamma."""
    prefill = {"gamma": settings.gamma, "min_budget": settings.min_budget, "min_seq_len": 0, "min_chunk_len": 0}
    return {"prefill": {"method": "flex", "coverage_rows": COVERAGE_ROWS, **prefill}}


def questions_of(settings: ReportSettings) -> EvalSettings:
    """What is asked, as `farspan eval` has it."""
    return EvalSettings(
        model=settings.model,
        tasks=(*TASKS, CURVE_TASK),
        lengths=(settings.length,),
        out=settings.out,
        methods=("flex",),
        seed=settings.seed,
        count=max(settings.count, 1),
        chunk=settings.chunk or None,
        options=engine_options(settings),
        engine_args=settings.engine_args,
        chat_template=settings.chat_template,
        haystack=settings.haystack,
    )


def check_report(settings: ReportSettings) -> None:
    """Raise ConfigError for what cannot be asked."""
    check_settings(questions_of(settings))
    if not reads_selection(engine_options(settings), settings.engine_args):
        raise ConfigError("engine_args has a worker_extension_cls; the report needs that place for its own")


def model_sections(
    settings: ReportSettings, open_model: Callable[..., AbstractContextManager[Model]] = vllm_model
) -> list[Section]:
    """Ask and draw; also writes heads.csv and curve.csv."""
    tables = Tables(settings.out, fresh=True)
    panels: dict[str, list[dict[str, Any]]] = {}
    with open_model(questions_of(settings), engine_options(settings)) as model:
        assert model.selection is not None
        for task in TASKS:
            model.generate(samples_of(settings, task, 1))
            rows = by_layer_head(model.selection())
            if not rows:
                raise ConfigError("no chunk was prefilled by flex: nothing to draw; ask for a greater --length")
            panels[f"{task}, γ = {settings.gamma:g}"] = rows
            named = {"method": f"flex-g{settings.gamma:g} {task}", "length": settings.length}
            tables.add("heads.csv", HEAD_COLUMNS, (picked(HEAD_COLUMNS, {**named, **row}) for row in rows))
        curve = curve_rows(settings, model)
        tables.add("curve.csv", CURVE_COLUMNS, curve)
    section = accuracy_density_section(curve, settings.out)
    return [*head_sections(panels, settings.out), Section(section.title, curve_text(settings, curve), section.pictures)]


def curve_rows(settings: ReportSettings, model: Model) -> list[dict[str, Any]]:
    """Accuracy and density at several gammas, and densely."""
    assert model.selection is not None
    samples = samples_of(settings, CURVE_TASK, settings.count)
    dense = accuracy(samples, model.generate(samples, {"farspan.method": "dense"}))
    rows = []
    for gamma in CURVE_GAMMAS:
        model.selection()
        right = accuracy(samples, model.generate(samples, {"farspan.gamma": gamma}))
        heads = model.selection()
        if not heads or any(head["coverage"] is None for head in heads):
            raise ConfigError(
                f"length={settings.length} with min_budget={settings.min_budget}: no list leaves anything out. "
                "Ask for a greater --length, a lower --min-budget, or a larger --chunk"
            )
        values = (
            gamma,
            settings.min_budget,
            settings.length,
            settings.seed,
            settings.count,
            sum(head["density"] for head in heads) / len(heads),
            sum(head["coverage"] for head in heads) / len(heads),
            min(head["coverage"] for head in heads),
            right,
            dense,
        )
        rows.append(dict(zip(CURVE_COLUMNS, values, strict=True)))
    return rows


def curve_text(settings: ReportSettings, curve: Sequence[dict[str, Any]]) -> str:
    """What the curve shows, and whether anything follows from it."""
    dense = curve[0]["dense_accuracy"]
    points = "; ".join(
        f"γ {row['gamma']:g}: {100 * row['accuracy']:.0f} % at density {row['density']:.3f}, coverage "
        f"{row['coverage']:.3f} (worst head {row['coverage_worst_head']:.3f})"
        for row in curve
    )
    text = (
        f"{settings.count} questions of {CURVE_TASK}, {settings.length} tokens. Dense: {100 * dense:.0f} %. {points}."
    )
    if dense < STOCK_FAILS_BELOW:
        text += " The model itself fails this task at this length, so its accuracies say nothing about flex."
    return text


def samples_of(settings: ReportSettings, task: str, count: int) -> list[Any]:
    """Questions in the middle of whose text the answer lies."""
    return make_samples(questions_of(settings), Cell("flex", task, settings.length, 0.5, settings.seed, count))


def picked(columns: Sequence[str], row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a table that a row has."""
    return {column: row[column] for column in columns}
