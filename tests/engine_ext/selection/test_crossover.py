"""Where flex is dense: decided by the chunk alone, and never against what was measured."""

import pytest
from farspan.engine_ext.selection.crossover import AttentionSize, expected_density, sparse_pays

SIZES = {"8b": AttentionSize(32, 128), "0.5b": AttentionSize(14, 64), "135m": AttentionSize(9, 64)}

# H100 80GB, 2026-11-28, ms a layer: FlashAttention 3, and our selection with sparse attention, between the densities
# measured (0.2, 0.4, 0.7) at the one that is expected there.
MEASURED = {
    ("8b", 2048, 4096): (0.172, 0.215),
    ("8b", 8192, 8192): (0.796, 0.73),
    ("8b", 8192, 16384): (2.243, 1.59),
    ("8b", 2048, 65536): (3.164, 1.9),
    ("8b", 8192, 131072): (24.1, 13.2),
    ("0.5b", 8192, 8192): (0.279, 0.31),
    ("0.5b", 8192, 32768): (1.697, 1.25),
    ("0.5b", 8192, 131072): (7.43, 4.5),
    ("135m", 8192, 8192): (0.231, 0.35),
    ("135m", 8192, 131072): (4.48, 3.1),
}


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_the_rule_agrees_with_the_measurements(case: tuple[str, int, int]) -> None:
    name, query_len, kv_len = case
    dense_ms, flex_ms = MEASURED[case]
    assert sparse_pays(SIZES[name], query_len, kv_len) == (flex_ms < dense_ms and dense_ms > 0.5)


def test_short_turns_are_dense() -> None:
    """However long the prefix: the tiles that a cut leaves dense take as long as all of them, side by side."""
    assert not sparse_pays(SIZES["8b"], 200, 131072)
    # Positions 130,000 to 130,500 hold three spans whole, from 130,048 to 130,432.
    assert not sparse_pays(SIZES["8b"], 500, 130_500)
    assert sparse_pays(SIZES["8b"], 4096, 131072)


@pytest.mark.parametrize("name", SIZES)
def test_longer_is_never_less_worth(name: str) -> None:
    """Of whole spans: once a chunk pays, it pays with more keys before it, and with more queries."""
    chunks = [2**power for power in range(8, 15)]
    for query_len in chunks:
        answers = [
            sparse_pays(SIZES[name], query_len, kv_len)
            for kv_len in (2**p for p in range(8, 21))
            if kv_len >= query_len
        ]
        assert answers == sorted(answers)
    assert [expected_density(length) for length in (0, 5000, 8192, 10**6)] == [1.0, 0.6, 0.45, 0.3]
