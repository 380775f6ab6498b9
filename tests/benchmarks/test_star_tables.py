"""The tables of docs/star.md are those of the rows, and what they show is what the rows say."""

import re
from dataclasses import replace

import pytest

from benchmarks.record import Environment, Recorder, Row, read_rows
from benchmarks.star_tables import (
    TABLES,
    all_tables,
    answer_tables,
    gpu_rows,
    measured_table,
    prediction_table,
    rates_of_rows,
    real_tables,
)

ENVIRONMENT = Environment("20261128-abc", "2026-11-28", "0123", "some GPU", "1.2", "2.11", "3.6", "0.32")


def test_the_page_has_the_tables_of_the_rows() -> None:
    assert TABLES.is_current(all_tables(read_rows())), "run: python -m benchmarks.star_tables --write"


def rows() -> list[Row]:
    recorder = Recorder(None, ENVIRONMENT)
    for length, seconds in ((65536, 0.9), (131072, 2.7)):
        case = f"n{length}-b1-llama8b-l8-bf16"
        for variant, share in (("fa3", 1.0), ("tp2-fa3", 0.5), ("farspan-star-n4", 0.25)):
            recorder.add("star", case, variant, "time", "ms", [1e3 * seconds * share])
            recorder.add("star", f"{case}-tpot", variant, "time", "ms", [2.5])
        recorder.add("star", f"{case}-phase1", "farspan-star-n4", "time", "ms", [1.0])
        recorder.add("star", case, "farspan-star-n4", "exchanged", "MiB", [3.0])
    return recorder.rows


def test_times_stand_beside_tensor_parallelism() -> None:
    table = measured_table(gpu_rows(rows()))
    assert "| Star, blocks of N/4 | 0.23 (2.00×) | 0.68 (2.00×) | 2.50 | 3 |" in table
    assert "| one GPU, FlashAttention 3 | 0.90 | 2.70 | 2.50 |  |" in table


def test_only_times_of_one_run_are_compared() -> None:
    later = [replace(row, run_id="20261129-abc", p50="500") for row in rows() if row.variant == "farspan-star-n4"]
    table = measured_table(gpu_rows([*rows(), *later]))
    assert "| Star, blocks of N/4 | 0.50 | 0.50 | 500.00 | 500 |" in table
    other = [replace(row, gpu="other GPU") for row in later]
    assert gpu_rows([*rows(), *other]) == other
    assert gpu_rows([]) == []


def test_rates_are_those_behind_the_times() -> None:
    rates, source = rates_of_rows(rows())
    assert "64K, 128K" in source
    # Of the 0.9 s at 64K, 0.45 are attention: they grow to 1.8 of 2.7 s.
    assert rates.attention_tflops == pytest.approx(2 * 32 * 128 * 8 * 65536**2 / 0.45e12)
    assert rates_of_rows([])[1] == "those of `farspan plan`"


def test_the_model_is_held_against_what_was_measured() -> None:
    found = rows()
    lines = prediction_table(found, rates_of_rows(found)[0]).splitlines()
    # A perfect half took half of one GPU's time; the model adds the link. Of Star its first phase counts.
    assert re.fullmatch(r"\| tensor parallel 2, FlashAttention 3 \| 0\.45, 0\.9\d× \| 1\.35, 0\.9\d× \|", lines[4])
    assert lines[5].startswith("| Star, blocks of N/4 | 0.00, 0.00×")
    assert len(lines) == 6


def test_checkpoints_have_a_line_a_text_and_length() -> None:
    recorder = Recorder(None, ENVIRONMENT)
    for run_id, questions, right in (("1", 4, 0.5), ("2", 8, 0.75)):
        recorder.environment = replace(ENVIRONMENT, run_id=run_id)
        for variant in ("dense", "star-n8") if run_id == "1" else ("dense", "star-n4"):
            recorder.add("star", f"n8192-niah_single-small-bf16-q{questions}", variant, "accuracy", "fraction", [right])
    recorder.add("star", "n16384-small-code-bf16", "star-n4", "drift", "nats/token", [-0.3, -0.1])
    table = real_tables(recorder.rows)
    # Another run asked other questions.
    assert "| | tokens | questions | dense | N/4 |" in table.replace("|  |", "| |")
    assert "| `niah_single-small` | 8K | 8 | 75 | 75 |" in table
    assert "| `small-code` | 16K | -0.2000 ± 0.1000 |" in table
    assert answer_tables(recorder.rows) == ""
    assert gpu_rows([*rows(), *recorder.rows]) == rows()


def test_answers_have_a_column_a_case() -> None:
    recorder = Recorder(None, replace(ENVIRONMENT, gpu="cpu"))
    recorder.add("star", "n2048-niah-needle-q8", "star-n4", "accuracy", "fraction", [0.875])
    recorder.add("star", "n8192-code-small", "star-n4", "drift", "nats/token", [-0.3, -0.1])
    table = answer_tables(recorder.rows)
    assert "| `star-n4` | 87.5 |" in table
    assert "| `star-n4` | -0.2000 ± 0.1000 |" in table
    # Runs of a checkpoint without ablations are in the other table, with which those with them are not mixed.
    for run_id, variant, low in (("1", "star-n4", -0.6), ("2", "star-n4", -0.4), ("2", "star-n4-random-content", -0.4)):
        recorder.environment = replace(ENVIRONMENT, run_id=run_id)
        recorder.add("star", "n16384-small-code-bf16", variant, "drift", "nats/token", [low, -0.2])
    table = answer_tables(recorder.rows)
    assert "| `n8192-code-small` | `n16384-small-code-bf16` |" in table
    assert "| `star-n4` | -0.2000 ± 0.1000 | -0.3000 ± 0.1000 |" in table
    assert "| `star-n4-random-content` |  | -0.3000 ± 0.1000 |" in table
    assert "| `small-code` | 16K | -0.4000 ± 0.2000 |" in real_tables(recorder.rows)
