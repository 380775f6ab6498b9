"""The README says what the code does: its numbers have rows, its options exist with the defaults it names."""

import json
import re
from pathlib import Path

import msgspec
from farspan.engine_ext.config import (
    PREFILL_METHODS,
    FarspanConfig,
    OffloadOptions,
    SelectColdDecode,
    StarOptions,
    StringOptions,
)
from farspan.engine_ext.ranges import ranges_of
from farspan.engine_ext.selection.crossover import AttentionSize, sparse_pays

from benchmarks.record import Row, read_rows
from benchmarks.tables import NUMBERS, README, REAL, TABLES, format_numbers, format_readme, format_table

ROOT = Path(__file__).resolve().parent.parent


def test_numbers_are_those_of_the_rows() -> None:
    rows, hint = read_rows(), "run: python -m benchmarks.tables --write"
    assert NUMBERS.is_current(format_numbers(rows)), hint
    assert REAL.is_current(format_readme(rows)), hint


def documented_options() -> dict[str, object]:
    """Option -> default, as the README's tables have them."""
    section = README.read_text().partition("## Options\n")[2].partition("\n## ")[0]
    found = re.findall(r"^\| `([a-z_.]+)` \| `([^`]+)` \|", section, flags=re.MULTILINE)
    assert len(found) == len(dict(found)), "an option stands twice"
    return {name: json.loads(default) for name, default in found}


def fields_of(struct: type[msgspec.Struct], prefix: str) -> dict[str, object]:
    return {prefix + field.name: field.default for field in msgspec.structs.fields(struct)}


def test_options_are_those_of_the_code() -> None:
    expected: dict[str, object] = {
        "preset": None,
        "kernel": "auto",
        "prefill.method": "dense",
        **fields_of(StringOptions, "string."),
    }
    expected |= fields_of(OffloadOptions, "offload.")
    del expected["offload.cold_decode"]
    expected["offload.cold_decode.method"] = "exact"
    expected |= fields_of(SelectColdDecode, "offload.cold_decode.")
    expected |= fields_of(StarOptions, "star.")
    for struct in PREFILL_METHODS.values():
        expected |= fields_of(struct, "prefill.")
    assert documented_options() == expected
    assert {name.partition(".")[0] for name in expected} == set(FarspanConfig.__struct_fields__)


def documented_ranges() -> dict[str, str]:
    """Option -> what its row says is allowed."""
    section = README.read_text().partition("## Options\n")[2].partition("\n## ")[0]
    return dict(re.findall(r"^\| `([a-z_.]+)` \| `[^`]+` \| ([^`|]*?) ?\| ", section, flags=re.MULTILINE))


def test_ranges_are_those_of_the_code() -> None:
    prefills = [("prefill.", struct) for struct in PREFILL_METHODS.values()]
    cold_decode = ("offload.cold_decode.", SelectColdDecode)
    structs = [("string.", StringOptions), ("offload.", OffloadOptions), ("star.", StarOptions), cold_decode, *prefills]
    expected = {
        prefix + name: ", or ".join(dict.fromkeys(each.interval for each in ranges))
        for prefix, struct in structs
        for name, ranges in ranges_of(struct).items()
    }
    assert {name: text for name, text in documented_ranges().items() if text} == expected


def test_links_lead_somewhere() -> None:
    for path in (README, ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_table_names_ratio_to_the_baseline() -> None:
    def row(variant: str, ms: str) -> Row:
        head = ("r1", "2026-11-22", "0123", "some GPU", "1", "2", "3", "0.32")
        return Row(*head, "decode", "n8192", variant, "time", "ms", ms, ms, ms)

    table = next(table for table in TABLES if table.benchmark == "decode")
    last = format_table([row("fa3", "3"), row("farspan", "1.5"), row("sdpa", "9")], table).splitlines()[-1]
    assert last == "| `n8192` | 1.5 | 3 | 9 | 2.00× |"


def test_the_crossover_is_that_of_the_code() -> None:
    """The README names it for 8B shapes, and the examples ask prompts that are long enough for flex to be sparse."""
    from examples import client

    size = AttentionSize(num_q_heads=32, head_dim=128)
    named = re.search(r"8B shapes from (\d+)K tokens on", README.read_text())
    assert named is not None
    crossover = int(named[1]) * 1024
    assert sparse_pays(size, crossover, crossover)
    assert not sparse_pays(size, crossover // 2, crossover // 2)
    offline = (ROOT / "examples" / "offline.py").read_text()
    prompt_len, offline_min = (
        int(number)
        for name in ("PROMPT_LEN", "MIN_SEQ_LEN")
        for number in re.findall(rf"^{name} = (\d+)$", offline, re.M)
    )
    (served_min,) = re.findall(r'"min_seq_len": (\d+)', (ROOT / "examples" / "serve.sh").read_text())
    assert prompt_len >= offline_min
    assert int(served_min) <= client.PROMPT_LEN
