"""`farspan audit` measures what a gamma keeps and changes through a real engine, and recommends one by its rule."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from farspan.cli import main
from farspan.engine_ext.config import FlexPrefill, parse_config
from farspan.engine_ext.errors import ConfigError
from farspan.evaluation.audit import (
    AuditSettings,
    check_settings,
    cut_prompts,
    predicted_speedup,
)
from farspan.evaluation.audit_results import AuditRow, change_of, format_table, kept_of, mean_heads, recommend
from farspan.evaluation.audit_worker import AuditStats
from farspan.model_shape import read_model
from farspan.needle import model_dir
from farspan.needle.tasks import make_sample

from tests.integration.tiny_models import write_model

ROW = AuditRow(
    length=8192,
    prompts=4,
    gamma=0.95,
    density=0.4,
    coverage=0.97,
    worst_head=0.94,
    heads_below_01=0.0,
    heads_below_05=0.0,
    chunks_below_05=0.0,
    drift=-0.002,
    drift_error=0.001,
    changed=0.01,
    scored_tokens=16384,
    speedup=1.4,
    speed_source="measured",
)


def settings(tmp_path: Path, **changes: Any) -> AuditSettings:
    text = tmp_path / "text"
    text.write_text("one two three")
    values: dict[str, Any] = {
        "model": "needle",
        "texts": (text,),
        "lengths": (2048,),
        "gammas": (0.9,),
        "out": tmp_path,
    }
    return AuditSettings(**values | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"texts": ()}, r"no texts\. Give texts .*--text FILE"),
        ({"lengths": ()}, "lengths is empty"),
        ({"lengths": (1024,)}, "length=1024; allowed: at least 1281 tokens.*min_budget 1024"),
        ({"lengths": (10**6,)}, "length=1000000; allowed: at most 131072 tokens"),
        ({"engine_args": {"max_model_len": 1600}}, "length=2048; allowed: at most max_model_len=1600"),
        ({"gammas": (0.0,)}, r"gamma=0\.0; allowed"),
        ({"prompts": 0}, "prompts=0"),
        ({"options": {"method": "dense"}}, "an audit is of prefill method 'flex'"),
        ({"options": {"min_budgets": 0}}, "min_budgets"),
        ({"options": {"min_seq_len": 9}}, "options has min_seq_len, which an audit sets itself"),
        ({"engine_args": {"worker_extension_cls": "x.Y"}}, "engine_args has worker_extension_cls"),
        ({"model": "/nowhere"}, "not a folder with a config.json"),
    ],
)
def test_what_cannot_be_audited_is_refused(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence):
        check_settings(settings(tmp_path, **changes), 1024)


def test_chunks_that_cut_every_span_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chunk=1000; allowed: multiples of 128"):
        check_settings(settings(tmp_path), 1000)


def test_prompts_do_not_overlap_and_short_texts_are_refused(tmp_path: Path) -> None:
    asked = settings(tmp_path, lengths=(101, 201), prompts=3)
    prompts = cut_prompts(asked, ([7], list(range(700))))
    assert [(length, len(each)) for length, each in prompts.items()] == [(101, 3), (201, 3)]
    for length, mine in prompts.items():
        assert all(len(prompt) == length - 1 and prompt[0] == 7 for prompt in mine)
        assert len({token for prompt in mine for token in prompt[1:]} | {7}) >= sum(len(each) - 1 for each in mine)
    assert prompts[201][-1][-1] in (698, 699)
    with pytest.raises(ConfigError, match=r"have 120 tokens .* fewer than a prompt of 201"):
        cut_prompts(asked, ([7], list(range(120))))


def test_the_error_of_a_drift_is_that_of_means_over_blocks() -> None:
    torch.manual_seed(0)
    noise = 0.1 * torch.randn(64, 1).expand(-1, 128)  # neighbours move together
    changed = torch.zeros(64 * 128, dtype=torch.bool)
    changed[:64] = True
    change = change_of([torch.zeros(64 * 128)], [(noise - 0.01).flatten()], [changed])
    assert change.drift == pytest.approx(float(noise.mean()) - 0.01, abs=1e-6)
    assert change.drift_error == pytest.approx(0.1 / 8, rel=0.3)
    assert (change.changed, change.num_tokens) == (1 / 128, 64 * 128)


def test_heads_of_ranks_and_prompts_are_brought_together() -> None:
    def row(rank: int, head: int, coverage: float | None, density: float) -> dict[str, Any]:
        chunks = [] if coverage is None else [coverage]
        return {
            "rank": rank, "layer": 0, "head": head, "coverage": coverage, "density": density, "chunk_coverage": chunks,
        }  # fmt: skip

    first = [row(0, 0, 0.9, 0.5), row(0, 1, 1.0, 0.5), row(1, 0, 0.88, 0.25), row(1, 1, 0.95, 0.25)]
    second = [row(0, 0, 1.0, 0.5), row(0, 1, 1.0, 0.5), row(1, 0, 0.88, 0.75), row(1, 1, None, 0.25)]
    heads = mean_heads([first, second])
    assert [each["head"] for each in heads] == [0, 1, 2, 3]
    assert [each["coverage"] for each in heads] == pytest.approx([0.95, 1.0, 0.88, 0.95])
    kept = kept_of(heads, 0.95)
    assert (kept.density, kept.worst_head) == pytest.approx((0.4375, 0.88))
    assert (kept.heads_below_01, kept.heads_below_05) == (0.25, 0.25)
    assert kept.chunks_below_05 == pytest.approx(2 / 7)


def test_coverage_by_chunk_is_of_rows_that_could_lose_something() -> None:
    stats = AuditStats(1, torch.device("cpu"))
    coverage = torch.tensor([[[1.0, 0.5], [1.0, 1.0]]])
    stats.add_coverage(coverage, slice(0, 1), torch.tensor([False, True, False, False]))
    stats.add_coverage(coverage, slice(0, 1))
    stats.chunks = 1
    (row,) = stats.rows()
    assert row["chunk_coverage"] == [0.5, 0.75, 1.0]


def test_the_sparsest_gamma_that_meets_the_rule_is_recommended() -> None:
    denser = replace(ROW, gamma=0.98, density=0.5, worst_head=0.97, drift=0.0)
    gamma, sentences = recommend([ROW, denser])
    assert gamma == 0.95
    options = re.search(r"For an engine: (\{.*\})\.", sentences)
    assert options is not None
    prefill = parse_config(json.loads(options[1])["farspan"]).prefill
    assert isinstance(prefill, FlexPrefill)
    assert prefill.gamma == 0.95
    # Missed at one length is missed.
    longer = replace(ROW, length=16384, drift=-0.009)
    assert recommend([ROW, denser, longer, replace(denser, length=16384)])[0] == 0.98
    assert longer.verdict == "MISSED: drift"
    head = replace(ROW, worst_head=0.89)
    assert (recommend([head, denser])[0], head.verdict) == (0.98, "MISSED: a head")
    unsure = replace(ROW, drift=-0.006, drift_error=0.002)
    gamma, sentences = recommend([unsure])
    assert (gamma, unsure.verdict) == (0.95, "met so far")
    assert "about 65,536 scored tokens" in sentences
    # Little text makes the rule easy to meet.
    gamma, sentences = recommend([unsure, denser])
    assert gamma == 0.98
    assert "only within the uncertainty of the drift: gamma 0.95." in sentences
    assert recommend([longer])[0] is None
    assert "--gammas 0.975" in recommend([longer])[1]
    assert "saves no time" in recommend([replace(ROW, speedup=0.9)])[1]
    assert "MISSED: drift" in format_table([ROW, longer])


def test_predicted_times_follow_density_and_length(tmp_path: Path) -> None:
    info = read_model(str(write_model(tmp_path / "model", "llama")))
    shape = replace(info.shape, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128, linear_params=7 * 10**9)
    large = replace(info, shape=shape)
    assert predicted_speedup(large, 131072, 8192, 0.2) > predicted_speedup(large, 131072, 8192, 0.4) > 1.2
    # Where sparse does not pay, prefill is dense.
    assert predicted_speedup(large, 2048, 2048, 0.2) == 1


@pytest.mark.e2e
@pytest.mark.filterwarnings("default")
def test_an_audit_of_the_bundled_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", "needle", "--out", str(tmp_path)]) == 2
    assert "no texts. Give texts like those" in capsys.readouterr().err
    text = tmp_path / "text"
    text.write_text("\n".join(make_sample("niah_single", 1600, seed).prompt for seed in range(2)))
    arguments = ["audit", str(model_dir()), "--text", str(text), "--lengths", "2048", "--gammas", "0.3,1"]
    options = ["--options", '{"min_budget": 0}', "--chunk", "1024", "--prompts", "1", "--out", str(tmp_path / "out")]
    assert main([*arguments, *options]) == 0
    printed = capsys.readouterr().out
    assert "Recommended: gamma" in printed or "No gamma of these meets the rule" in printed
    assert "predicted for H100" in printed
    with (tmp_path / "out" / "audit.csv").open() as file:
        sparse, full = csv.DictReader(file)
    assert (sparse["gamma"], full["gamma"], sparse["prompts"]) == ("0.3", "1.0", "1")
    assert float(sparse["density"]) < 0.6 < float(full["density"]) == 1
    assert float(full["worst_head"]) > 0.999
    assert abs(float(full["drift"])) < 1e-4
    assert float(full["changed"]) == 0
    assert 0.25 < float(sparse["worst_head"]) <= float(sparse["coverage"]) < 0.999
    assert float(sparse["drift"]) != 0
    with (tmp_path / "out" / "heads.csv").open() as file:
        heads = list(csv.DictReader(file))
    assert {(head["layer"], head["head"]) for head in heads} >= {("0", "0"), ("1", "1")}
    for picture in ("audit.png", "coverage-2048.png"):
        assert (tmp_path / "out" / picture).stat().st_size > 5000
