"""`farspan report`: one page with its pictures inside, from the needle model or from tables."""

import csv
from contextlib import contextmanager

import pytest
import torch
from farspan.cli import main
from farspan.evaluation import model_report, report
from farspan.evaluation.evaluate import Model
from farspan.evaluation.report_plots import HeadMask, draw_masks
from PIL import Image

from tests.integration.test_ruler import Letters

HEADS = {"density": 0.2, "query_aware": 1.0, "divergence": 0.05, "coverage": 0.97}


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_needle_page_stands_alone(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(report, "CURVE_LENGTH", 512)
    monkeypatch.setattr(report, "CURVE", ((0.8, 0), (0.95, 1024)))
    monkeypatch.setattr(report, "NIAH_LENGTHS", (256, 384))
    arguments = ["--length", "600", "--min-budget", "384", "--chunk", "300", "--out", str(tmp_path)]
    for _ in range(2):  # The second run replaces the tables of the first.
        assert main(["report", "--model", "needle", "--gamma", "0.9", *arguments]) == 0
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<img ") == 7
    assert "http" not in page
    for name in ("density", "patterns", "divergence", "coverage", "masks", "accuracy_density"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 200, name
    with (tmp_path / "heads.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3 * 4 * 8


def test_tables_become_pages(tmp_path) -> None:
    heads = [{"layer": layer, "head": head, **HEADS} for layer in range(2) for head in range(3)]
    sweep = [{"min_budget": 0, "length": 4096, "density": 0.1, "accuracy": 0.5, "dense_accuracy": 1.0}]
    tables = [
        write(tmp_path / "heads.csv", [{"rank": 0, **row} for row in heads]),
        write(tmp_path / "sweep.csv", sweep),
        tmp_path / "eval.csv",
    ]
    tables[2].write_text("method,task,length,depth,seed,count,accuracy\nflex,niah_single,1024,0.5,0,4,1.0\n")
    out = tmp_path / "page"
    assert main(["report", "--from-csv", ",".join(map(str, tables)), "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    headings = [f"{name} per layer" for name in ("Density", "Pattern", "Coverage")]
    headings += ["Accuracy against density", "Accuracy<"]
    assert all(heading in page for heading in headings)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--length", "100"], "length=100; the needle model takes 512 to 131072 tokens"),
        (["--gamma", "1.5"], "report.gamma=1.5; allowed: a number in (0, 1]"),
        (["--from-csv", "missing.csv"], "from_csv='missing.csv' is not there"),
        (["--from-csv", "odd.csv"], "from_csv='odd.csv' has the columns ['x', 'y']"),
    ],
    ids=["length", "gamma", "missing", "columns"],
)
def test_refusals_say_what_to_do(tmp_path, monkeypatch, capsys, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "odd.csv", [{"x": 1, "y": 2}])
    assert main(["report", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_mask_picture_shows_what_is_read(tmp_path) -> None:
    blocks = torch.eye(16, dtype=torch.bool)
    with Image.open(draw_masks([HeadMask("diagonal only", blocks, 128)], tmp_path / "mask.png")) as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x1F, 0x4E, 0x79), (0xE3, 0xE7, 0xEC)} <= colours


def test_any_models_page_comes_from_an_engine(tmp_path, monkeypatch, model_dirs) -> None:
    tokenizer, asked = Letters(), []

    @contextmanager
    def open_model(settings, options):
        assert options["prefill"]["gamma"] == 0.9

        def generate(samples, extra_args=None):
            asked.append((len(samples), extra_args))
            return [sample.completion for sample in samples]

        heads = {"density": 0.2, "density_min": 0.1, "coverage": 0.97, "coverage_min": 0.8}
        heads |= {"query_aware": 0.0, "divergence": 0.0}
        rows = [{"rank": r, "layer": layer, "head": 0, **heads} for layer in range(2) for r in range(2)]
        yield Model(generate, lambda: rows)

    monkeypatch.setattr("farspan.evaluation.evaluate.load_tokenizer", lambda model: tokenizer)
    monkeypatch.setattr(model_report.model_sections, "__defaults__", (open_model,))
    arguments = ["report", "--model", str(model_dirs("llama")), "--length", "1800", "--gamma", "0.9", "--count", "3"]
    assert main([*arguments, "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert page.count("<img ") == 3
    assert "3 questions of niah_multikey_1, 1800 tokens. Dense: 100 %. γ 0.7: 100 % at density 0.200" in page
    assert "Pattern per layer" not in page
    assert asked[:4] == [(1, None)] * 3 + [(3, {"farspan.method": "dense"})]
    assert [options["farspan.gamma"] for _, options in asked[4:]] == list(model_report.CURVE_GAMMAS)
    with (tmp_path / "page" / "heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Heads of two ranks are numbered through the layer.
    assert [(row["layer"], row["head"]) for row in rows[:4]] == [("0", "0"), ("0", "1"), ("1", "0"), ("1", "1")]
