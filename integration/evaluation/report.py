"""`farspan report`: what flex prefill reads and keeps, as one HTML page without anything beside it.

For the bundled needle model everything is computed here, by the engine's own selection and kernels; any other model
answers questions in an engine, which adds up what it reads. Or the page is drawn from tables: those of `farspan eval`,
and rows of `farspan.metrics.read_selection` written as CSV.
"""

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farspan.command import make_folder
from farspan.engine_ext.config import FlexPrefill
from farspan.engine_ext.errors import ConfigError
from farspan.evaluation.report_sections import Section, accuracy_density_section, head_sections
from farspan.evaluation.report_settings import ReportSettings
from farspan.evaluation.results import ACCURACY_COLUMNS, read_csv
from farspan.tables import Tables, read_rows

if TYPE_CHECKING:
    from farspan.evaluation.needle_answers import Answers, Variant
    from farspan.evaluation.report_plots import HeadMask
    from farspan.needle.paged import PagedNeedle

HTML_NAME = "report.html"
TASKS = ("niah_multikey_2", "variable_tracking")
NIAH_LENGTHS = (1024, 2048, 4096)
NIAH_DEPTHS = (0.0, 0.5, 1.0)
# Accuracy against density: short enough for a CPU, long enough that budgets bite.
CURVE_LENGTH = 4096
CURVE = ((0.8, 0), (0.99, 0), (0.95, 384), (0.95, 512), (0.95, 1024))
"""(gamma, min budget in tokens)."""
MAX_MASKS = 6
ROWS = 16
"""Query rows of a prompt on which coverage is measured."""
MIN_TOKENS = 512


def run_report(settings: ReportSettings) -> Path:
    """Write the page and its pictures and tables into `settings.out`; returns the page.

    Raises ConfigError for an option out of range or a table that is none of those known.
    """
    import matplotlib

    matplotlib.use("Agg")
    if not settings.from_csv:
        check_settings(settings)
    if settings.model != "needle" and not settings.from_csv:
        title, sections = other_model(settings)
    elif settings.from_csv:
        make_folder(settings.out)
        title = "Flex prefill: " + ", ".join(path.name for path in settings.from_csv)
        sections = [section for path in settings.from_csv for section in sections_of_csv(path, settings.out)]
    else:
        make_folder(settings.out)
        title = f"Flex prefill of the needle model, {settings.length} tokens, γ = {settings.gamma:g}"
        sections = needle_sections(settings)
    page = settings.out / HTML_NAME
    page.write_text(render(title, sections))
    return page


def other_model(settings: ReportSettings) -> tuple[str, list[Section]]:
    """Title and sections of a model that an engine runs."""
    from farspan.evaluation.model_report import check_report, model_sections

    check_report(settings)
    make_folder(settings.out)
    title = f"Flex prefill of {settings.model}, {settings.length} tokens, γ = {settings.gamma:g}"
    return title, model_sections(settings)


def render(title: str, sections: list[Section]) -> str:
    """The page, with its pictures inside."""
    parts = []
    for section in sections:
        images = "".join(
            f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,'
            f'{base64.b64encode(path.read_bytes()).decode()}">'
            for path in section.pictures
        )
        parts.append(
            f"<section><h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>{images}</section>"
        )
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "h1{font-size:1.6rem}h2{font-size:1.2rem;margin-top:2.2rem}p{max-width:46rem}img{max-width:100%;display:block}"
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>\n"
    )


def needle_sections(settings: ReportSettings) -> list[Section]:
    """Run the needle model and draw every picture; also writes heads.csv, sweep.csv and accuracy.csv."""
    import torch
    from farspan.evaluation.needle_answers import HEAD_COLUMNS, Variant
    from farspan.evaluation.report_plots import draw_masks
    from farspan.needle import model_dir
    from farspan.needle.network import load_network
    from farspan.needle.paged import PagedNeedle

    device = "cuda" if torch.cuda.is_available() else "cpu"
    net = load_network(model_dir(), device, torch.bfloat16 if device == "cuda" else torch.float32)
    model = PagedNeedle(net, max(settings.length, CURVE_LENGTH, *NIAH_LENGTHS) + 256)
    tables = Tables(settings.out, fresh=True)

    def variant(min_budget: int) -> Variant:
        prefill = FlexPrefill(
            selection="flexprefill",
            gamma=settings.gamma,
            tau=settings.tau,
            min_budget=min_budget,
            min_seq_len=0,
            min_chunk_len=0,
        )
        return Variant(prefill, settings.chunk)

    asked = variant(settings.min_budget)
    panels, answers = {}, {}
    # Without a budget of its own first: what gamma alone asks for. The same run twice is one panel.
    for task, budget in dict.fromkeys([(TASKS[0], 0), *((task, settings.min_budget) for task in TASKS)]):
        each = variant(budget)
        name = f"{task}, min budget {budget}"
        answers[name] = answer_one(model, each, task, settings.length, settings.seed)
        panels[name] = answers[name].heads
        named = {"method": f"{each.name} {task}", "length": settings.length, "seed": settings.seed}
        tables.add("heads.csv", HEAD_COLUMNS, ({**named, **head} for head in answers[name].heads))
    shown = f"{TASKS[0]}, min budget {settings.min_budget}"
    masks = pick_masks(answers[shown])
    sections = head_sections(panels, settings.out)
    sections.append(
        Section(
            "Blocks that single heads read",
            f"One head a layer, the one that reads most, for {shown}; then query-aware heads. The first and the "
            "diagonal block are always read.",
            (draw_masks(masks, settings.out / "masks.png"),),
        )
    )
    rows = curve_rows(model, tables, settings.seed)
    sections.append(accuracy_density_section(rows, settings.out))
    return [*sections, niah_section(model, tables, asked, settings)]


def check_settings(settings: ReportSettings) -> None:
    """Raise ConfigError for a number out of range."""
    if settings.model == "needle" and not MIN_TOKENS <= settings.length <= 131072:
        raise ConfigError(f"length={settings.length}; the needle model takes {MIN_TOKENS} to 131072 tokens")
    FlexPrefill(selection="flexprefill", gamma=settings.gamma, tau=settings.tau, min_budget=settings.min_budget).check(
        "report"
    )
    if settings.chunk < 0 or settings.seed < 0:
        raise ConfigError(f"chunk={settings.chunk}, seed={settings.seed}; neither can be negative")
    if settings.count < 1:
        raise ConfigError(f"count={settings.count}; it must be at least 1")


def answer_one(model: "PagedNeedle", variant: "Variant", task: str, length: int, seed: int) -> "Answers":
    """One question of a task, with its lists and its coverage."""
    from farspan.evaluation.needle_answers import ask, to_question
    from farspan.needle.evaluate import encode_sample

    question = to_question(task, *encode_sample(task, length, seed, 0.5), str(model.device))
    return ask(model, variant, [question], ROWS, keep_lists=True)


def pick_masks(answers: "Answers") -> "list[HeadMask]":
    """The densest head of every layer, then query-aware ones, the densest first; at most `MAX_MASKS`."""
    from farspan.engine_ext.pass_maker import TILE_SIZE
    from farspan.evaluation.report_plots import HeadMask

    ordered = sorted(answers.heads, key=lambda row: -row["density"])
    first = {row["layer"]: row for row in reversed(ordered)}
    picked = [first[layer] for layer in sorted(first)]
    picked += [row for row in ordered if row["query_aware"] > 0.5 and row not in picked]
    masks = []
    for row in picked[:MAX_MASKS]:
        pattern = "query-aware" if row["query_aware"] > 0.5 else "vertical-slash"
        title = (
            f"layer {row['layer']} head {row['head']}, {pattern}\ndensity {row['density']:.3f}, "
            f"coverage {row['coverage']:.3f}"
        )
        masks.append(HeadMask(title, answers.listed[row["layer"]][row["head"]], TILE_SIZE))
    return masks


def curve_rows(model: "PagedNeedle", tables: Any, seed: int) -> list[dict[str, Any]]:
    """Rows of sweep.csv for the accuracy against density."""
    from farspan.engine_ext.config import DensePrefill
    from farspan.evaluation.needle_answers import SWEEP_COLUMNS, Variant, ask, sweep_row, to_question
    from farspan.needle.evaluate import encode_sample

    tasks = ("niah_single", "niah_multikey_2")
    questions = [to_question(t, *encode_sample(t, CURVE_LENGTH, seed, None), str(model.device)) for t in tasks]
    dense = ask(model, Variant(DensePrefill(), 0), questions, 0)
    rows = []
    for gamma, min_budget in CURVE:
        variant = Variant(
            FlexPrefill(selection="flexprefill", gamma=gamma, min_budget=min_budget, min_seq_len=0, min_chunk_len=0), 0
        )
        rows.append(sweep_row(variant, CURVE_LENGTH, seed, ask(model, variant, questions, 0), dense, None))
        tables.add("sweep.csv", SWEEP_COLUMNS, rows[-1:])
    return rows


def niah_section(model: "PagedNeedle", tables: Any, variant: "Variant", settings: ReportSettings) -> Section:
    """Needle in a haystack over depth and length, one question a cell."""
    from farspan.evaluation.needle_answers import ask, to_question
    from farspan.evaluation.plots import draw_plots
    from farspan.needle.evaluate import encode_sample

    for length in NIAH_LENGTHS:
        for depth in NIAH_DEPTHS:
            raw = encode_sample("niah_single", length, settings.seed, depth)
            right = ask(model, variant, [to_question("niah_single", *raw, str(model.device))], 0).right
            values = (variant.name, "niah_single", length, depth, settings.seed, 1, float(right[0]))
            tables.add("accuracy.csv", ACCURACY_COLUMNS, [dict(zip(ACCURACY_COLUMNS, values, strict=True))])
    pictures = draw_plots(read_csv(settings.out / "accuracy.csv"), settings.out)
    heatmaps = tuple(path for path in pictures if path.name.startswith("heatmap"))
    return Section("Needle in a haystack", f"{variant.name}, one question a cell.", heatmaps)


def sections_of_csv(path: Path, out: Path) -> list[Section]:
    """What one table shows: accuracy (`farspan eval`), a sweep, or heads. Raises ConfigError for any other."""
    if not path.is_file():
        raise ConfigError(f"from_csv={str(path)!r} is not there; name a table such as eval.csv, sweep.csv or heads.csv")
    rows: list[dict[str, Any]] = list(read_rows(path))
    try:
        return sections_of_rows(path, rows, out)
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"from_csv={str(path)!r} has a cell that is no number ({error}). Mend its row.") from error


def sections_of_rows(path: Path, rows: list[dict[str, Any]], out: Path) -> list[Section]:
    """As `sections_of_csv`, of the rows of the file. Raises ValueError for a cell that is no number."""
    columns = set(rows[0]) if rows else set()
    if not rows:
        raise ConfigError(f"from_csv={str(path)!r} has no rows")
    if {"density", "accuracy", "min_budget", "length", "dense_accuracy"} <= columns:
        return [accuracy_density_section(rows, out)]
    if {"density", "layer", "head", "query_aware", "divergence", "coverage"} <= columns:
        panels: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            panels.setdefault(", ".join(row[key] for key in ("method", "length") if key in row), []).append(row)
        return head_sections(dict(list(panels.items())[:3]), out)
    if set(ACCURACY_COLUMNS) <= columns:
        from farspan.evaluation.plots import draw_plots

        pictures = tuple(draw_plots(read_csv(path), out))
        return [Section("Accuracy", f"{path.name}: accuracy against prompt length, and by needle depth.", pictures)]
    raise ConfigError(
        f"from_csv={str(path)!r} has the columns {sorted(columns)}; known are the tables of farspan eval (eval.csv), "
        "benchmarks.needle_training.sweep (sweep.csv, heads.csv) and farspan.metrics.read_selection"
    )
