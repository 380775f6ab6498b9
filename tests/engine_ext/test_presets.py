"""Presets stand for option trees; explicit options refine them, and what contradicts them is refused."""

import re
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from farspan.engine_ext.config import parse_config
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.presets import PRESETS, Preset
from farspan.engine_ext.requests import options_digest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("preset", "by_hand"),
    [
        ({"preset": "exact"}, {}),
        ({"preset": "balanced"}, {"prefill": {"method": "flex", "gamma": 0.95}}),
        ({"preset": "fast"}, {"prefill": {"method": "flex", "gamma": 0.9}}),
        ({"preset": "max-context"}, {"offload": {}}),
        ({"preset": "max-context", "star": {}}, {"offload": {}, "star": {}}),
        ({"preset": None, "kernel": "triton"}, {"kernel": "triton"}),
        (
            {"preset": "fast", "prefill": {"gamma": 0.8, "min_budget": 2048}, "string": {}},
            {"prefill": {"method": "flex", "gamma": 0.8, "min_budget": 2048}, "string": {}},
        ),
        ({"preset": "exact", "offload": {"host_memory": 3}}, {"offload": {"host_memory": 3}}),
        ({"preset": "max-context", "offload": {"hot_heads": 2}}, {"offload": {"hot_heads": 2}}),
        ({"preset": "balanced", "prefill": {"method": "flex"}, "kernel": "triton"},
         {"prefill": {"method": "flex"}, "kernel": "triton"}),
    ],
)  # fmt: skip
def test_a_preset_is_what_it_stands_for(preset: dict[str, Any], by_hand: dict[str, Any]) -> None:
    before = repr(preset)
    config = parse_config(preset)
    assert config.preset == preset["preset"]
    assert msgspec.structs.replace(config, preset=None) == parse_config(by_hand)
    assert repr(preset) == before


def test_every_preset_is_documented() -> None:
    """By name, with a row and a use for it in the reference."""
    page = (ROOT / "docs" / "options.md").read_text()
    assert set(PRESETS) == set(get_args(Preset))
    for name in PRESETS:
        assert f'"preset": "{name}"' in page
        assert re.search(rf'^\| `"?{name}"?` \|', page, flags=re.MULTILINE), name


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"preset": "quick"}, ".preset='quick'; allowed: one of 'exact', 'balanced', 'fast', 'max-context'"),
        ({"preset": "balance"}, "Did you mean 'balanced'?"),
        ({"preset": 3}, ".preset=3; allowed: one of"),
        ({"preset": ["fast"]}, ".preset=['fast']; allowed: one of"),
        ({"preset": "fast", "prefill": {"method": "dense"}}, ".prefill.method='dense'; allowed: 'flex' with preset"),
        ({"preset": "exact", "prefill": {"method": "flex"}}, ".prefill.method='flex'; allowed: 'dense' with preset"),
        ({"preset": "max-context", "prefill": {"method": "block_sparse"}}, "allowed: 'dense' with preset"),
        ({"preset": "exact", "prefill": {"gamma": 0.9}}, ".prefill.gamma=0.9; allowed: no option of that name"),
        (
            {"preset": "exact", "offload": {"cold_decode": {"method": "select"}}},
            'allowed: method "exact" with preset "exact"',
        ),
        ({"preset": "exact", "string": {}}, ".string={}; allowed: without preset 'exact'"),
        (
            {"preset": "max-context", "star": {"graphs": True}},
            ".star.graphs=True; allowed: False together with offload",
        ),
        ({"preset": "max-context", "offload": None}, ".offload=None; allowed: options, or nothing, with preset"),
        ({"preset": "fast", "prefill": None}, ".prefill=None; allowed: options, or nothing, with preset"),
        ({"preset": "fast", "prefill": "flex"}, ".prefill='flex'; allowed: a mapping"),
        ({"preset": "fast", "prefill": {"gamma": 2}}, ".prefill.gamma=2; allowed: a number in (0, 1]"),
    ],
)
def test_contradictions_are_refused(raw: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(raw)
    assert sentence in str(caught.value)
    assert str(caught.value)[-1] in ".?"


def test_a_preset_shares_blocks_with_the_options_it_stands_for() -> None:
    named, by_hand = parse_config({"preset": "fast"}), parse_config({"prefill": {"method": "flex", "gamma": 0.9}})
    assert options_digest(named, named.prefill) == options_digest(by_hand, by_hand.prefill)
