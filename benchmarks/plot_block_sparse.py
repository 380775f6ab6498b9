"""Draw our block-sparse times and the paper's, from the CSV: `python -m benchmarks.plot_block_sparse`.

Also prints the ratios at every length. The last run in the CSV is used.
"""

import argparse
import sys
from pathlib import Path

from farspan.command import make_folder, need_matplotlib, run_command

from benchmarks.prefill_block_sparse import LENGTHS, NAME, Case
from benchmarks.record import DATA, ROOT, BenchmarkError, Row, read_rows

PROGRAM = "python -m benchmarks.plot_block_sparse"
# FlashAttention, arXiv 2205.14135, appendix E, A100 40GB, forward, in ms, by length from 128 to 65536.
PAPER_MS = {
    # Table 18: no masking.
    False: {
        "torch": [0.21, 0.22, 0.43, 1.27, 4.32, 16.47, 67.77],
        "dense": [0.08, 0.09, 0.18, 0.68, 2.40, 8.42, 35.54, 134.03, 535.95, 2147.05],
        "sparse": [0.56, 0.52, 0.63, 0.61, 0.61, 0.96, 1.69, 3.02, 5.69, 11.77],
    },
    # Table 12: padding masks.
    True: {
        "torch": [0.30, 0.30, 0.63, 1.93, 7.08, 27.45, 112.90],
        "dense": [0.03, 0.04, 0.17, 0.68, 2.28, 8.40, 33.55, 134.11, 537.50, 2150.88],
        "sparse": [0.05, 0.04, 0.05, 0.11, 0.35, 0.68, 1.33, 2.54, 5.34, 10.73],
    },
}
LABELS = {
    "torch": "PyTorch attention",
    "sdpa": "SDPA flash",
    "fa3": "FlashAttention 3",
    "farspan": "farspan, dense",
    "farspan-butterfly": "farspan, butterfly",
    "farspan-sparse": "farspan, block-sparse",
}
Times = dict[str, dict[int, float]]
"""Milliseconds (median) by variant and length."""


def last_run(rows: list[Row]) -> list[Row]:
    """The rows of this benchmark's last run."""
    rows = [row for row in rows if row.benchmark == NAME]
    if not rows:
        raise BenchmarkError(f"no rows of {NAME}; run it first: python -m benchmarks.run {NAME}")
    return [row for row in rows if row.run_id == rows[-1].run_id]


def times_of(rows: list[Row], padded: bool) -> Times:
    """Our times for the cases of table 12 (padded) or 18."""
    found: Times = {}
    for length in LENGTHS:
        name = Case(length, padded=padded).name
        for row in rows:
            if row.case == name and row.metric == "time":
                found.setdefault(row.variant, {})[length] = float(row.p50)
    return found


def ratios(times: Times, base: str, variant: str = "farspan-sparse") -> dict[int, float]:
    """By length, how many times faster `variant` is than `base`."""
    return {n: times[base][n] / ms for n, ms in times.get(variant, {}).items() if n in times.get(base, {})}


def print_ratios(times: Times, padded: bool) -> None:
    """One line per length: how many times faster than our dense kernel, FlashAttention 3, and dense in the paper."""
    print(f"block-sparse against …, {'with padding (table 12)' if padded else 'no masking (table 18)'}")
    print(f"{'length':>8}{'our dense':>12}{'FA3':>10}{'paper dense':>13}")
    paper = PAPER_MS[padded]
    for index, length in enumerate(LENGTHS):
        ours = ratios(times, "farspan").get(length, float("nan"))
        fa3 = ratios(times, "fa3").get(length, float("nan"))
        print(f"{length:>8}{ours:>12.2f}{fa3:>10.2f}{paper['dense'][index] / paper['sparse'][index]:>13.2f}")


def draw(rows: list[Row], path: Path) -> None:
    """Draw three panels: the times of tables 18 and 12, and how many times faster than dense, ours and the paper's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for axis, padded in zip(axes, (False, True), strict=False):
        times = times_of(rows, padded)
        for variant, label in LABELS.items():
            if variant in times:
                axis.plot(list(times[variant]), list(times[variant].values()), marker="o", markersize=3, label=label)
        for variant, label in (("dense", "paper (A100), FlashAttention"), ("sparse", "paper (A100), block-sparse")):
            axis.plot(
                LENGTHS,
                PAPER_MS[padded][variant],
                color="gray",
                linestyle=":" if variant == "dense" else "--",
                label=label,
            )
        axis.set(title="padding masks" if padded else "no masking", ylabel="forward (ms)")
        times_of_paper = PAPER_MS[padded]
        axes[2].plot(
            LENGTHS,
            [dense / sparse for dense, sparse in zip(times_of_paper["dense"], times_of_paper["sparse"], strict=True)],
            color="gray", linestyle="--" if padded else ":", label=f"paper{', padding' * padded}",
        )  # fmt: skip
        for base, label in (("farspan", "over our dense"), ("fa3", "over FlashAttention 3")):
            found = ratios(times, base)
            axes[2].plot(
                list(found), list(found.values()), marker="o", markersize=3, label=label + ", padding" * padded
            )
    axes[2].set(title="block-sparse: times faster than dense", ylabel="ratio")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(LENGTHS, [f"{n // 1024}K" if n >= 1024 else str(n) for n in LENGTHS])
        axis.set_xlabel("sequence length (tokens)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"batch 16, 8 heads of 64, float16, forward; {rows[0].gpu}, {rows[0].date}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures" / f"{NAME}.png")
    arguments = parser.parse_args()
    return run_command(PROGRAM, lambda: run(arguments), (BenchmarkError,))


def run(arguments: argparse.Namespace) -> None:
    """Print and draw. Raises BenchmarkError or ConfigError."""
    need_matplotlib("leave the picture out")
    make_folder(arguments.out.parent)
    rows = last_run(read_rows(arguments.data))
    for padded in (False, True):
        print_ratios(times_of(rows, padded), padded)
    draw(rows, arguments.out)
    print(arguments.out)


if __name__ == "__main__":
    sys.exit(main())
