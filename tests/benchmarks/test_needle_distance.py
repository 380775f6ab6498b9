"""The needle model at a distance: splitting a prompt, a gap in its positions, and shifting them."""

import csv

import pytest

torch = pytest.importorskip("torch")

from farspan.needle import model_dir  # noqa: E402
from farspan.needle.network import load_network  # noqa: E402

from benchmarks.needle_training import distance  # noqa: E402


@pytest.fixture(scope="module")
def net():
    """The bundled model in float32."""
    return load_network(model_dir())


@pytest.fixture(scope="module")
def tokens():
    """A haystack of 60 tokens and a question of 10."""
    return torch.randint(10, 1000, (70,), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_split_prompt_is_the_whole_prompt(net, tokens):
    expected = net.hidden(tokens[None], torch.arange(70)[None])[0]
    whole, _ = distance.run_layers(net, tokens, torch.arange(70), None, 0, 0)
    torch.testing.assert_close(whole, expected, atol=1e-3, rtol=1e-3)
    _, haystack = distance.run_layers(net, tokens[:60], torch.arange(60), None, 0, 0)
    split, _ = distance.run_layers(net, tokens[60:], torch.arange(60, 70), haystack, 0, 0)
    torch.testing.assert_close(split, expected[60:], atol=1e-3, rtol=1e-3)
    beyond, _ = distance.run_layers(net, tokens[60:], torch.arange(60, 70), haystack, 70, 5)
    torch.testing.assert_close(beyond, split)


@torch.no_grad()
def test_a_shifted_gap_is_a_smaller_gap(net, tokens):
    """All of the haystack is at distances of S and more, and none of the question, so the gap shrinks by S - W."""
    _, haystack = distance.run_layers(net, tokens[:60], torch.arange(60), None, 0, 0)
    gap, shift, window = 5000, 3000, 100
    positions = torch.arange(60, 70) + gap
    shifted, _ = distance.run_layers(net, tokens[60:], positions, haystack, shift, window)
    nearer, _ = distance.run_layers(net, tokens[60:], positions - shift + window, haystack, 0, 0)
    torch.testing.assert_close(shifted, nearer, atol=2e-3, rtol=2e-3)
    plain, _ = distance.run_layers(net, tokens[60:], positions, haystack, 0, 0)
    assert not torch.allclose(shifted, plain, atol=2e-3, rtol=2e-3)


def test_table(tmp_path, monkeypatch):
    monkeypatch.setattr(distance, "GAPS", (0, 1024))
    monkeypatch.setattr(distance, "SHIFTS", (0, 512))
    out = tmp_path / "table.csv"
    monkeypatch.setattr("sys.argv", ["distance", "--length", "256", "--count", "1", "--out", str(out)])
    distance.main()
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == len(distance.TASKS) * 2 * 3
    assert all(float(row["accuracy"]) == 1.0 for row in rows if row["shift"] == "0")
