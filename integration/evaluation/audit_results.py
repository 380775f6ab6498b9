"""The results of `farspan audit`: rows of `audit.csv`, the table that a person reads, and which gamma it recommends."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from farspan.evaluation.reading import by_layer_head
from farspan.evaluation.report_plots import tokens as length_name

DRIFT_LIMIT = -0.005
"""Nats/token of drift that a recommended gamma may have, after two standard errors in its favour."""
COVERAGE_SLACK = 0.05
"""No head of a recommended gamma may keep less than gamma by more than this."""
SURE_ERROR = 0.001
"""Nats/token: a standard error of the drift from which on twice as much text would hardly change the verdict."""
BLOCK_TOKENS = 128
"""Log-probs of neighbours depend on each other, so the drift's standard error is that of means over so many tokens."""


@dataclass(frozen=True)
class Change:
    """How log-probs and greedy tokens of some prompts differ from those of dense prefill."""

    drift: float
    """Mean change of the log-prob of the text's own tokens, nats/token; below 0 is worse."""
    drift_error: float
    """Standard error of the drift, from means over BLOCK_TOKENS tokens."""
    changed: float
    """Share of the places at which the most likely token is another one."""
    num_tokens: int


@dataclass(frozen=True)
class Kept:
    """What the heads of a model read and kept, over some prompts of one length."""

    density: float
    """Blocks read over causal blocks, mean over heads."""
    coverage: float
    """Share of the attention mass kept on rows that did not choose, mean over heads."""
    worst_head: float
    heads_below_01: float
    """Share of the heads below gamma - 0.01."""
    heads_below_05: float
    chunks_below_05: float
    """Share of heads x chunks below gamma - 0.05."""


@dataclass(frozen=True)
class AuditRow:
    """One gamma at one length."""

    length: int
    prompts: int
    gamma: float
    density: float
    coverage: float
    worst_head: float
    heads_below_01: float
    heads_below_05: float
    chunks_below_05: float
    drift: float
    drift_error: float
    changed: float
    scored_tokens: int
    speedup: float
    """Time to the first token, dense over sparse."""
    speed_source: str

    @property
    def meets_drift(self) -> bool:
        """Whether the drift is not below the limit, as far as the text can tell."""
        return self.drift + 2 * self.drift_error >= DRIFT_LIMIT

    @property
    def keeps_heads(self) -> bool:
        return self.worst_head >= self.gamma - COVERAGE_SLACK

    @property
    def verdict(self) -> str:
        """In a few words, as the table has it."""
        missed = [] if self.meets_drift else ["drift"]
        missed += [] if self.keeps_heads else ["a head"]
        if missed:
            return f"MISSED: {' and '.join(missed)}"
        return "met" if self.is_sure else "met so far"

    @property
    def is_sure(self) -> bool:
        """Whether more text would hardly change what is said of the drift."""
        return self.drift - 2 * self.drift_error >= DRIFT_LIMIT or self.drift_error <= SURE_ERROR


CSV_COLUMNS = (*(field.name for field in fields(AuditRow)), "verdict")
HEAD_COLUMNS = ("length", "gamma", "layer", "head", "density", "coverage")


def csv_row(row: AuditRow) -> dict[str, Any]:
    return {**asdict(row), "verdict": row.verdict}


def change_of(dense: Sequence[torch.Tensor], sparse: Sequence[torch.Tensor], changed: Sequence[torch.Tensor]) -> Change:
    """Compare prompts; each [tokens]: log-probs in nats, dense and sparse, and whether the greedy token is another."""
    deltas = [after.double() - before.double() for before, after in zip(dense, sparse, strict=True)]
    blocks = torch.stack([block.mean() for delta in deltas for block in delta.split(BLOCK_TOKENS) if len(block) >= 64])
    delta = torch.cat(deltas)
    error = float(blocks.std() / len(blocks) ** 0.5) if len(blocks) > 1 else float("inf")
    return Change(float(delta.mean()), error, float(torch.cat(list(changed)).double().mean()), len(delta))


def mean_heads(prompts: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Any]]:
    """Means over prompts of the rows of `read_selection`, one row a head; heads of several ranks counted on.

    Their `chunk_coverage` are joined. Prompts without a row that counts are left out.
    """
    merged: dict[tuple[int, int], dict[str, list[Any]]] = {}
    for rows in prompts:
        for row in by_layer_head(rows):
            head = merged.setdefault((row["layer"], row["head"]), {})
            for column in ("density", "coverage", "chunk_coverage"):
                head.setdefault(column, []).append(row[column])
    return [
        {
            "layer": layer,
            "head": head,
            "density": mean(values["density"]),
            "coverage": mean([each for each in values["coverage"] if each is not None]),
            "chunk_coverage": [each for chunk in values["chunk_coverage"] for each in chunk],
        }
        for (layer, head), values in sorted(merged.items())
    ]


def kept_of(heads: Sequence[Mapping[str, Any]], gamma: float) -> Kept:
    """Summarise the rows of `mean_heads`."""
    coverage = [head["coverage"] for head in heads]
    chunks = [value for head in heads for value in head["chunk_coverage"]]
    return Kept(
        density=mean([head["density"] for head in heads]),
        coverage=mean(coverage),
        worst_head=min(coverage),
        heads_below_01=mean([value < gamma - 0.01 for value in coverage]),
        heads_below_05=mean([value < gamma - 0.05 for value in coverage]),
        chunks_below_05=mean([value < gamma - 0.05 for value in chunks]),
    )


def recommend(rows: Iterable[AuditRow]) -> tuple[float | None, str]:
    """The gamma with the smallest density among those that meet the rule at every length, and the sentences for it.

    The rule: drift + 2 standard errors >= DRIFT_LIMIT, and no head below gamma - COVERAGE_SLACK. Gammas that meet it
    only within those errors come after those whose drift itself does: with little text nearly every gamma meets it.
    """
    by_gamma: dict[float, list[AuditRow]] = {}
    for row in rows:
        by_gamma.setdefault(row.gamma, []).append(row)
    fitting = {
        gamma: mean([row.density for row in mine])
        for gamma, mine in by_gamma.items()
        if all(row.meets_drift and row.keeps_heads for row in mine)
    }
    rule = (
        f"drift + 2 standard errors at least {DRIFT_LIMIT:g} nats/token and no head below gamma - {COVERAGE_SLACK:g}, "
        "at every length"
    )
    if not fitting:
        larger = round(1 - (1 - max(by_gamma)) / 2, 4)
        return None, (
            f"No gamma of these meets the rule ({rule}). Try a larger one (--gammas {larger:g}), or prefill densely."
        )
    itself = {gamma for gamma in fitting if all(row.drift >= DRIFT_LIMIT for row in by_gamma[gamma])}
    gamma = min(itself or fitting, key=lambda each: fitting[each])
    best = by_gamma[gamma]
    passed_over = [f"{each:g}" for each in sorted(fitting) if fitting[each] < fitting[gamma]]
    sentences = [
        f"Recommended: gamma {gamma:g}, which reads {fitting[gamma]:.1%} of the blocks and meets the rule: {rule}.",
        f'For an engine: {{"farspan": {{"preset": "balanced", "prefill": {{"gamma": {gamma:g}}}}}}}.',
    ]
    if passed_over:
        sentences.append(
            f"Sparser, but meeting it only within the uncertainty of the drift: gamma {', '.join(passed_over)}."
        )
    unsure = [row for row in best if not row.is_sure]
    if unsure:
        needed = max(row.scored_tokens * (row.drift_error / SURE_ERROR) ** 2 for row in unsure)
        sentences.append(
            f"The drift is uncertain by {max(row.drift_error for row in unsure):.4f} nats/token; more text would tell: "
            f"about {needed:,.0f} scored tokens bring that to {SURE_ERROR:g}, now there are "
            f"{min(row.scored_tokens for row in unsure):,}."
        )
    slow = [length_name(row.length) for row in best if row.speedup <= 1]
    if slow:
        sentences.append(f"At {', '.join(slow)} it saves no time: leave those prompts dense.")
    return gamma, " ".join(sentences)


def format_table(rows: Sequence[AuditRow]) -> str:
    """A text table, one line a gamma and length."""
    names = ("length", "gamma", "density", "coverage", "worst head", "heads <g-.01", "chunks <g-.05")
    header = f"{'drift, nats/token':>20}{'changed':>10}{'speed-up':>10}  verdict"
    lines = ["".join(f"{name:>14}" for name in names) + header]
    for row in rows:
        cells = (
            length_name(row.length), f"{row.gamma:g}", f"{row.density:.3f}", f"{row.coverage:.3f}",
            f"{row.worst_head:.3f}", f"{row.heads_below_01:.1%}", f"{row.chunks_below_05:.1%}",
        )  # fmt: skip
        drift = f"{row.drift:+.4f} ± {row.drift_error:.4f}"
        line = "".join(f"{cell:>14}" for cell in cells) + f"{drift:>20}{row.changed:>10.2%}{row.speedup:>9.2f}x"
        lines.append(f"{line}  {row.verdict}")
    return "\n".join(lines)


def rounded(row: AuditRow) -> AuditRow:
    """With fractions of five digits, as the table of the folder has them."""
    values: dict[str, Any] = {
        key: round(value, 5) if isinstance(value, float) else value for key, value in asdict(row).items()
    }
    return AuditRow(**values)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
