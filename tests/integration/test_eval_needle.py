"""The bundled model finds its needles through a real engine, by the command that users run."""

import pytest
from farspan.cli import main
from farspan.evaluation.results import read_csv

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

ENGINE = '{"enforce_eager": true, "dtype": "float32", "max_model_len": 8448, "num_gpu_blocks_override": 80}'


def test_needle_model_finds_its_needles(tmp_path, capsys) -> None:
    """The command of docs/evaluation.md, with fewer questions."""
    arguments = ["eval", "--model", "needle", "--tasks", "niah_single,niah_multikey", "--lengths", "1024,4096,8192"]
    status = main([*arguments, "--methods", "dense", "--count", "1", "--engine-args", ENGINE, "--out", str(tmp_path)])
    assert status == 0
    cells = read_csv(tmp_path / "eval.csv")
    assert [(cell.task, cell.length) for cell in cells] == [
        (task, length) for task in ("niah_single", "niah_multikey") for length in (1024, 4096, 8192)
    ]
    accuracies = [cell.accuracy for cell in cells]
    assert None not in accuracies
    assert sum(filter(None, accuracies)) / len(accuracies) >= 0.95
    assert "niah_multikey" in capsys.readouterr().out
    assert (tmp_path / "accuracy.png").stat().st_size > 5000
