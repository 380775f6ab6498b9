"""The tables of docs/star.md, from rows and from the scaling model: `python -m benchmarks.star_tables`, `--write`.

Measured: the latest rows of benchmark `star` on GPUs. Predicted: `farspan.star.scaling` with rates fitted to one of
these GPUs, beside the measured times and what the paper reports (arXiv 2411.17116, tables 1, 2 and 6). Answers: the
latest rows of each case.
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace

from farspan.scheduler.footprint import ModelShape
from farspan.scheduler.rates import LINKS, MEASURED, Rates, rates_of
from farspan.star.scaling import Cluster, fitted_rates

from benchmarks.record import ROOT, Row, read_rows
from tools.regions import Region

TABLES = Region(
    ROOT / "docs" / "star.md", "<!-- tables: python -m benchmarks.star_tables -->\n", "<!-- end of tables -->\n"
)
NAMES = {
    "fa3": "one GPU, FlashAttention 3",
    "tp2-fa3": "tensor parallel 2, FlashAttention 3",
    "ring": "ring attention, plain PyTorch",
    "farspan-star-n2": "Star, blocks of N/2 (exact), decode without graphs",
    "farspan-star-n4": "Star, blocks of N/4",
    "farspan-star-n8": "Star, blocks of N/8",
    "farspan-star-n4-g0.9": "Star, N/4, flex γ .9 inside",
    "farspan-star-n8-g0.9": "Star, N/8, flex γ .9 inside",
    "farspan-star-n4-shared": "Star, N/4, anchor shared",
    "farspan-star-n8-shared": "Star, N/8, anchor shared",
    "farspan-star-all": "all blocks visible (exact)",
    "farspan-star-all-g0.9": "all blocks visible, flex γ .9",
}
REAL_CASE = re.compile(r"n(?P<tokens>\d+)-(?P<label>.+)-(?:fp32|bf16)(?:-q(?P<questions>\d+))?$")
"""Of a checkpoint in benchmark `star_quality`; cases without the dtype are ablations."""
CUTS = {
    "dense": "dense",
    "star-n2": "N/2",
    "star-n4": "N/4",
    "star-n8": "N/8",
    "star-n16": "N/16",
    "star-n4-no-anchor": "N/4, no anchor",
    "star-n4-quarter-anchor": "N/4, quarter of an anchor",
}
TIMES = ("time", "exchanged")
HOSTS = (4, 8, 16, 32, 64)
N = 131072


def llama(
    num_layers: int, hidden_size: int, intermediate_size: int, num_heads: int, vocab_size: int = 128256
) -> ModelShape:
    """A Llama 3 with 8 KV heads of 128."""
    head = vocab_size * hidden_size
    return ModelShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=8,
        head_dim=128,
        vocab_size=vocab_size,
        intermediate_size=intermediate_size,
        embedding_params=head,
        head_params=head,
        is_tied=False,
        linear_params=num_layers * hidden_size * (2 * 128 * (num_heads + 8) + 3 * intermediate_size),
        expert_params=0,
        num_experts=0,
        experts_per_token=0,
        max_positions=1048576,
    )


LLAMA_8B, LLAMA_70B = llama(32, 4096, 14336, 32), llama(80, 8192, 28672, 64)
PAPER = (
    # Model, GPUs, hosts, thousands of tokens in all and of a block, the paper's speed-up over its ring.
    ("8B", 8, 4, 16, 4, 1.1), ("8B", 8, 4, 32, 8, 1.2), ("8B", 8, 4, 64, 16, 1.8), ("8B", 8, 4, 128, 32, 2.7),
    ("8B", 16, 8, 256, 32, 10.8), ("8B", 16, 8, 512, 32, 16.2), ("8B", 32, 16, 1024, 32, 16.9),
    ("70B", 8, 4, 16, 4, 1.7), ("70B", 8, 4, 32, 8, 2.0), ("70B", 16, 4, 64, 16, 4.7), ("70B", 32, 8, 128, 16, 8.7),
)  # fmt: skip
PAPER_SECONDS = {16: (7, 10, 9), 32: (10, 12, 10), 64: (18, 22, 12), 128: (None, 53, 20)}
"""Table 6: thousands of tokens -> seconds a sample on 8 A100 of one model's whole copy, its ring, and Star."""


def gpu_rows(rows: Sequence[Row]) -> list[Row]:
    """Those of all runs on the GPU that was measured last."""
    found = [row for row in rows if row.benchmark == "star" and row.gpu != "cpu" and row.metric in TIMES]
    return [row for row in found if row.gpu == found[-1].gpu]


def tokens_of(row: Row) -> int:
    match = re.match(r"n(\d+)-", row.case)
    assert match is not None, row.case
    return int(match[1])


def is_prefill(row: Row) -> bool:
    """Whether a row is the time to the first token, and not that of a part of it."""
    return row.metric == "time" and re.search(r"-(tpot(-eager)?|phase1)$", row.case) is None


def measured_table(rows: Sequence[Row]) -> str:
    """First token and time of a token, of all engines at all lengths: the latest rows of each."""
    first: dict[tuple[str, int], Row] = {}
    token: dict[tuple[str, int], Row] = {}
    exchanged: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = row.variant, tokens_of(row)
        if row.metric == "exchanged":
            exchanged[key] = row
        elif is_prefill(row):
            first[key] = row
        elif "-tpot" in row.case:
            token[key] = row
    lens = sorted({length for _, length in first})
    shape = rows[0].case.split("-", 1)[1].removeprefix("b1-")
    lines = [
        f"Two {rows[0].gpu}, {shape}, one request: seconds to the first token (times the speed of tensor parallel 2 in "
        "the same run); ms between tokens; MiB that hosts receive.",
        "",
        f"| | {' | '.join(f'{length // 1024}K' for length in lens)} | ms a token, longest | MiB, longest |",
        f"| --- |{' ---: |' * (len(lens) + 2)}",
    ]
    for variant, name in NAMES.items():
        mine = [length for length in lens if (variant, length) in first]
        if not mine:
            continue
        cells = []
        for length in lens:
            ours, peer = first.get((variant, length)), first.get(("tp2-fa3", length))
            cell = "" if ours is None else f"{float(ours.p50) / 1e3:.2f}"
            if ours and peer and ours.run_id == peer.run_id and variant not in ("tp2-fa3", "fa3"):
                cell += f" ({float(peer.p50) / float(ours.p50):.2f}×)"
            cells.append(cell)
        for column, form in ((token, ".2f"), (exchanged, ".0f")):
            last = [column[variant, length] for length in mine if (variant, length) in column][-1:]
            cells += [format(float(row.p50), form) for row in last] or [""]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rates_of_rows(rows: Sequence[Row]) -> tuple[Rates, str]:
    """Rates of the GPU that the rows were measured on, and where they are from."""
    found = {tokens_of(row): float(row.p50) / 1e3 for row in rows if row.variant == "fa3" and is_prefill(row)}
    if len(found) < 2:
        return MEASURED, "those of `farspan plan`"
    lens = ", ".join(f"{length // 1024}K" for length in sorted(found))
    return fitted_rates(shape_of(rows[0]), MEASURED, found), f"fitted to one GPU's times above at {lens}"


def shape_of(row: Row) -> ModelShape:
    """The 8B shape with as many layers as a row's case says."""
    match = re.search(r"-l(\d+)-", row.case)
    assert match is not None, row.case
    return replace(LLAMA_8B, num_layers=int(match[1]), linear_params=LLAMA_8B.linear_params * int(match[1]) // 32)


def prediction_table(rows: Sequence[Row], rates: Rates) -> str:
    """What the scaling model says of the two hosts that were measured."""
    measured: dict[tuple[str, int], float] = {}
    for row in rows:
        is_star = row.variant.startswith("farspan-star-")
        if (row.metric == "time" and row.case.endswith("-phase1")) if is_star else is_prefill(row):
            measured[row.variant, tokens_of(row)] = float(row.p50) / 1e3
    cluster = Cluster(shape_of(rows[0]), rates, LINKS["nvlink"], 2)

    def star(tokens: int, share: int, *, is_shared: bool = False) -> float:
        return cluster.star(tokens, tokens // share, is_shared=is_shared).prefill_s

    predicted = {
        "tp2-fa3": lambda n: cluster.tensor_parallel(n).prefill_s,
        "ring": lambda n: cluster.ring(n).prefill_s,
        "farspan-star-n4": lambda n: star(n, 4),
        "farspan-star-n8": lambda n: star(n, 8),
        "farspan-star-n4-shared": lambda n: star(n, 4, is_shared=True),
        "farspan-star-n8-shared": lambda n: star(n, 8, is_shared=True),
        "farspan-star-all": lambda n: cluster.visible_all(n).prefill_s,
    }
    lens = sorted({length for _, length in measured})
    lines = [
        "The same two GPUs: measured seconds (of Star its phase 1), and how many times as long as the model says.",
        "",
        f"| | {' | '.join(f'{length // 1024}K' for length in lens)} |",
        f"| --- |{' ---: |' * len(lens)}",
    ]
    for variant, seconds_of in predicted.items():
        found = {length: measured.get((variant, length)) for length in lens}
        cells = ["" if s is None else f"{s:.2f}, {s / seconds_of(length):.2f}×" for length, s in found.items()]
        if any(cells):
            lines.append(f"| {NAMES[variant]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def scaling_table(rates: Rates, source: str) -> str:
    """More hosts, over all links."""
    lines = [
        f"Predicted, 8B with 32 layers, 128K tokens, one GPU a host, blocks of N/hosts: seconds until the context is "
        f"read; ms a token of Star. Rates {source}: {rates.linear_tflops:.0f} TFLOP/s in linear layers, "
        f"{rates.attention_tflops:.0f} in attention.",
        "",
        "| link | hosts | Star | anchor shared | all visible | ring | tensor parallel | ms a token |",
        "| --- |" + " ---: |" * 7,
    ]
    for link in LINKS.values():
        for hosts in HOSTS:
            cluster = Cluster(LLAMA_8B, rates, link, hosts)
            ways = [
                cluster.star(N, None, is_shared=False),
                cluster.star(N, None, is_shared=True),
                cluster.visible_all(N),
                cluster.ring(N),
                cluster.tensor_parallel(N),
            ]
            cells = [f"{way.prefill_s:.2f}" for way in ways]
            lines.append(f"| {link.name} | {hosts} | {' | '.join(cells)} | {ways[0].token_s * 1e3:.1f} |")
    return "\n".join(lines) + "\n"


def paper_cluster(model: str, num_gpus: int, num_hosts: int) -> Cluster:
    """The paper's hosts: A100s, several of which share a host's work evenly."""
    rates, gpus = rates_of("A100"), num_gpus // num_hosts
    rates = replace(rates, linear_tflops=rates.linear_tflops * gpus, attention_tflops=rates.attention_tflops * gpus)
    # An A100's NVLink has two thirds of an H100's bandwidth.
    link = replace(LINKS["nvlink"], gbs=LINKS["nvlink"].gbs * 2 / 3)
    return Cluster(LLAMA_8B if model == "8B" else LLAMA_70B, rates, link, num_hosts)


def paper_table() -> str:
    """The paper's tables 1, 2 and 6 beside the model's predictions for the same hosts."""
    lines = [
        "Speed of Star over a ring on A100s: the paper's (tables 1 and 2), and predicted over an ideal ring.",
        "",
        "| model | GPUs, hosts | tokens, block | paper | predicted Star, ring | predicted |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for model, gpus, hosts, tokens, block, speed in PAPER:
        cluster = paper_cluster(model, gpus, hosts)
        star = cluster.star(tokens * 1024, block * 1024, is_shared=False).prefill_s
        ring = cluster.ring(tokens * 1024).prefill_s
        ours = f"{star:.2f}, {ring:.2f} s | {ring / star:.1f}×"
        lines.append(f"| {model} | {gpus}, {hosts} | {tokens}K, {block}K | {speed}× | {ours} |")
    lines += [
        "",
        "Seconds a sample, 8B on 8 A100 (table 6, answers included), and predicted for the prefill alone.",
        "",
        "| tokens | paper: one model, ring, Star | predicted: tensor parallel 8, ring, Star |",
        "| ---: | ---: | ---: |",
    ]
    for tokens, seconds in PAPER_SECONDS.items():
        cluster = paper_cluster("8B", 8, 4)
        whole = paper_cluster("8B", 8, 8).tensor_parallel(tokens * 1024).prefill_s
        star = cluster.star(tokens * 1024, tokens * 256, is_shared=False).prefill_s
        theirs = ", ".join("out of memory" if each is None else str(each) for each in seconds)
        lines.append(f"| {tokens}K | {theirs} | {whole:.2f}, {cluster.ring(tokens * 1024).prefill_s:.2f}, {star:.2f} |")
    return "\n".join(lines) + "\n"


def real_tables(rows: Sequence[Row]) -> str:
    """Accuracy and drift of checkpoints: a line a text and length, a column a way of cutting."""
    parts, ablations = [], ablation_runs(rows)
    for metric, title in (
        ("accuracy", "Right answers in %, questions of `farspan eval`."),
        ("drift", "Nats a token against dense attention, ± a standard error."),
    ):
        cells: dict[tuple[str, int], dict[str, str]] = {}
        counts: dict[tuple[str, int], str] = {}
        for row in rows:
            match = REAL_CASE.match(row.case)
            if row.benchmark != "star" or row.metric != metric or match is None or (row.run_id, row.case) in ablations:
                continue
            key = match["label"], int(match["tokens"])
            p50 = float(row.p50)
            text = f"{100 * p50:.0f}" if metric == "accuracy" else f"{p50:+.4f} ± {float(row.p80) - p50:.4f}"
            # Questions that one run asked are compared among themselves.
            if counts.setdefault(key, match["questions"] or "") != (match["questions"] or ""):
                counts[key], cells[key] = match["questions"], {}
            cells.setdefault(key, {})[row.variant] = text
        if not cells:
            continue
        variants = [each for each in CUTS if any(each in line for line in cells.values())]
        heading = ["", "tokens", *(["questions"] if metric == "accuracy" else []), *(CUTS[each] for each in variants)]
        lines = [title, "", f"| {' | '.join(heading)} |", "| --- |" + " ---: |" * (len(heading) - 1)]
        for (label, tokens), line in sorted(cells.items()):
            asked = [counts[label, tokens]] if metric == "accuracy" else []
            values = [f"`{label}`", f"{tokens // 1024}K", *asked, *(line.get(each, "") for each in variants)]
            lines.append(f"| {' | '.join(values)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def ablation_runs(rows: Sequence[Row]) -> set[tuple[str, str]]:
    """Runs and cases in which a checkpoint was read in ways that `real_tables` has no column for.

    They read fewer prompts than others, so that their rows are compared among themselves.
    """
    return {(row.run_id, row.case) for row in rows if row.benchmark == "star" and row.variant not in CUTS}


def answer_tables(rows: Sequence[Row]) -> str:
    """Accuracy and drift of the ablations: a line a way of cutting, a column a case."""
    parts, ablations = [], ablation_runs(rows)
    for metric, title, form in (
        ("accuracy", "Right answers in % (`-qN`: of N questions).", lambda p50, spread: f"{100 * p50:.1f}"),
        ("drift", "Nats a token against dense attention, ± a standard error.", lambda p50, e: f"{p50:+.4f} ± {e:.4f}"),
    ):
        found = [row for row in rows if row.benchmark == "star" and row.metric == metric]
        found = [row for row in found if REAL_CASE.match(row.case) is None or (row.run_id, row.case) in ablations]
        if not found:
            continue
        cells = {(row.variant, row.case): (float(row.p50), float(row.p80) - float(row.p50)) for row in found}
        cases, variants = (list(dict.fromkeys(key[i] for key in cells)) for i in (1, 0))
        lines = [title, "", f"| | {' | '.join(f'`{each}`' for each in cases)} |", "| --- |" + " ---: |" * len(cases)]
        for variant in variants:
            line = [form(*cells[variant, case]) if (variant, case) in cells else "" for case in cases]
            lines.append(f"| `{variant}` | {' | '.join(line)} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def all_tables(rows: Sequence[Row]) -> str:
    """What stands between the page's markers."""
    measured = gpu_rows(rows)
    rates, source = rates_of_rows(measured)
    parts = [f"### On two GPUs\n\n{measured_table(measured)}\n{prediction_table(measured, rates)}"] if measured else []
    parts.append(f"### On more hosts\n\n{scaling_table(rates, source)}")
    parts.append(f"### Beside the paper\n\n{paper_table()}")
    if answers := real_tables(rows):
        parts.append(f"### In answers of checkpoints\n\n{answers}")
    if answers := answer_tables(rows):
        parts.append(f"### In answers, with other anchors\n\n{answers}")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.exit(TABLES.serve("python -m benchmarks.star_tables", lambda: all_tables(read_rows())))
