"""`farspan profile`: what it measures, what it refuses, and which heads are hot by its file."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from farspan.cli import main
from farspan.engine_ext.config import OffloadOptions, parse_config
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.head_profile import FORMAT, HeadProfile, counts_by_score, load_profile, order_by_score
from farspan.head_profile import far_mass

from tests.integration.test_engine_offload import offload_state, offloading, run_checked
from tests.integration.test_engine_tokens import make_prompts, stock_tokens

__all__ = ["stock_tokens"]

SCORES = ((0.1, 0.9, 0.3, 0.8), (0.2, 0.05, 0.85, 0.0))


def profile_of(scores: tuple[tuple[float, ...], ...]) -> HeadProfile:
    return HeadProfile(format=FORMAT, model="m", num_tokens=9, sink_tokens=1, recent_tokens=1, scores=scores)


def write_profile(file: Path, **changes: Any) -> str:
    values = msgspec.to_builtins(profile_of(SCORES)) | changes
    file.write_text(json.dumps(values))
    return str(file)


def test_far_mass_of_a_group_is_that_of_its_farthest_head() -> None:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(heads, 200, 16, generator=generator) for heads in (4, 2))
    found = far_mass(query, key, 0.25, 10, 30)
    rows = torch.linspace(100, 199, 64).long().unique()
    shares = torch.zeros(4)
    for head in range(4):
        for row in rows.tolist():
            weights = (query[head, row] @ key[head // 2, : row + 1].T * 0.25).softmax(0)
            shares[head] += weights[10 : row - 30 + 1].sum() / len(rows)
    torch.testing.assert_close(found, shares.view(2, 2).amax(1))


def test_the_heads_with_the_highest_scores_are_hot() -> None:
    profile = profile_of(SCORES)
    assert counts_by_score(profile, 1, 1) == (1, 1)
    assert counts_by_score(profile, 2, 1) == (3, 1)
    assert counts_by_score(profile_of(((0.9, 0.8), (0.1, 0.2))), 1, 1) == (2, 0)
    # Two ranks: each as many as the other, whichever of its own are best.
    assert counts_by_score(profile, 2, 2) == (2, 2)
    assert counts_by_score(profile_of(((0.9, 0.8), (0.1, 0.2))), 1, 4) == (2, 0)
    assert order_by_score(profile, 0, 0, 1) == [1, 3, 2, 0]
    assert order_by_score(profile, 1, 1, 2) == [0, 1]
    assert order_by_score(profile, 0, 3, 8) == [0]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scores": [[0.1, 0.2]]}, "is of 1 layers with 2 KV heads, of m; this model has 2 layers with 4"),
        ({"scores": [[0.1], [0.1, 0.2]]}, "is of 2 layers with 1, 2 KV heads"),
        ({"format": 7}, "has format 7; this farspan reads 1"),
        ({"scores": "many"}, "is no profile of heads (Expected `array`"),
    ],
    ids=["layers", "ragged", "format", "type"],
)
def test_wrong_files_are_refused(changes: dict[str, Any], expected: str, tmp_path: Path) -> None:
    options = OffloadOptions(hot_heads=1, head_profile=write_profile(tmp_path / "profile.json", **changes))
    with pytest.raises(ConfigError) as error:
        options.hot_heads_per_layer(2, 4, 1)
    assert expected in str(error.value)
    assert "farspan profile" in str(error.value)


def test_options_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file"):
        load_profile(str(tmp_path / "none.json"))
    for offload, expected in (
        ({"head_profile": "x.json"}, "only with hot_heads of at least 1"),
        ({"head_profile": "x.json", "hot_heads": [0, 0]}, "only with hot_heads of at least 1"),
        ({"head_profile": 3, "hot_heads": 1}, "a path, or null"),
    ):
        with pytest.raises(ConfigError, match=expected):
            parse_config({"offload": offload})
    masks = {"method": "block_sparse", "pattern": "file", "mask_file": "m.npy"}
    with pytest.raises(ConfigError, match=r"without prefill\.mask_file"):
        parse_config({"prefill": masks, "offload": {"head_profile": "x.json", "hot_heads": 1}})


def test_the_command(model_dirs: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "profile.json"
    # Of words that do not begin like a special token.
    text.write_text(" ".join(f"t{300 + token * 7 % 200}" for token in range(300)))
    folder = str(model_dirs("qwen3"))
    sizes = ["--sink-tokens", "16", "--recent-tokens", "32", "--device", "cpu"]
    assert main(["profile", folder, "--text", str(text), str(text), "--out", str(out), *sizes]) == 0
    assert "2 layers with 4 KV heads, texts of up to 300 tokens" in capsys.readouterr().out
    profile = load_profile(str(out))
    assert [len(layer) for layer in profile.scores] == [4, 4]
    assert all(0 < score < 1 for layer in profile.scores for score in layer)
    assert OffloadOptions(hot_heads=2, head_profile=str(out)).hot_heads_per_layer(2, 4, 1)
    for arguments, expected in (
        (["--length", "90"], "--length is 90; it must be more than 96"),
        (["--text", str(tmp_path / "none")], "cannot be read (No such file"),
        (["--device", "cuda:77"], "--device is 'cuda:77', which is not there"),
        (["--out", str(tmp_path / "none" / "x")], "is no file in a folder that exists"),
        (["--recent-tokens", "4000"], "has 300 tokens for this model; more than 8032 are needed"),
    ):
        assert main(["profile", folder, "--text", str(text), "--out", str(out), *sizes, *arguments]) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.filterwarnings("default")
def test_tokens_are_exact_whichever_heads_are_hot(
    make_llm: Callable[..., Any], stock_tokens: Any, tmp_path: Path
) -> None:
    """Two heads of the first layer and none of the second, not in the order of the model."""
    file = write_profile(tmp_path / "profile.json", scores=[[0.1, 0.9, 0.3, 0.8], [0.2, 0.05, 0.1, 0.0]])
    arguments = offloading(14, heads=4, hot=[2, 0], group_size=1)
    arguments["additional_config"]["farspan"]["offload"] |= {"hot_heads": 1, "head_profile": file}
    llm = make_llm("qwen3", **arguments)
    prompts = make_prompts((1, 17, 300, 600))
    assert run_checked(llm, prompts) == stock_tokens("qwen3", prompts)
    assert min(offload_state(llm)["spilled"], offload_state(llm)["staged"]) > 0
