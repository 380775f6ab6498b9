"""Where flex is dense: decided by the chunk alone, and never against what was measured."""

from dataclasses import replace

import pytest
import torch
from farspan.engine_ext.selection.crossover import (
    AttentionSize,
    SparseKernel,
    expected_density,
    layer_ms,
    sparse_kernel,
    sparse_pays,
)
from farspan.kernels.tuning import FLEX_HOST_MS

SIZES = {"8b": AttentionSize(32, 128), "0.5b": AttentionSize(14, 64), "135m": AttentionSize(9, 64)}

# 2026-11-28, ms a layer: FlashAttention 3, and our selection (H200) with sparse attention, between the densities
# measured (0.1 to 0.7) at the one that is expected there; the portable attention on an H100, that of Hopper on an H200.
MEASURED = {
    ("8b", "portable", 8192, 8192): (0.796, 0.763),
    ("8b", "portable", 8192, 32768): (5.395, 3.69),
    ("8b", "portable", 8192, 131072): (24.1, 14.2),
    ("8b", "hopper", 8192, 32768): (5.6, 2.65),
    ("8b", "hopper", 16384, 131072): (51.6, 20.4),
    ("0.5b", "portable", 8192, 8192): (0.279, 0.312),
    ("0.5b", "portable", 8192, 32768): (1.697, 1.35),
    ("0.5b", "portable", 8192, 131072): (7.43, 4.98),
}


def on(size: AttentionSize, kernel: SparseKernel) -> AttentionSize:
    return replace(size, kernel=kernel)


@pytest.mark.parametrize("case", MEASURED, ids=str)
def test_the_rule_agrees_with_the_measurements(case: tuple[str, SparseKernel, int, int]) -> None:
    name, kernel, query_len, kv_len = case
    dense_ms, flex_ms = MEASURED[case]
    size = on(SIZES[name], kernel)
    assert sparse_pays(size, query_len, kv_len) == (flex_ms < dense_ms and dense_ms > FLEX_HOST_MS)
    if dense_ms > FLEX_HOST_MS:
        modelled_dense, modelled = layer_ms(size, query_len, kv_len, expected_density(kv_len))
        assert modelled / modelled_dense == pytest.approx(flex_ms / dense_ms, abs=0.1)


def test_short_turns_are_dense() -> None:
    """However long the prefix: the tiles that a cut leaves dense take as long as all of them, side by side."""
    assert not sparse_pays(SIZES["8b"], 200, 131072)
    # Positions 130,000 to 130,500 hold three spans whole, from 130,048 to 130,432.
    assert not sparse_pays(SIZES["8b"], 500, 130_500)
    assert sparse_pays(SIZES["8b"], 4096, 131072)


def test_what_the_host_takes_is_not_saved() -> None:
    """However sparse: nothing is faster than the host that launches it."""
    size = on(SIZES["0.5b"], "hopper")
    assert layer_ms(size, 1024, 8192, 0.01)[0] < layer_ms(size, 1024, 8192, 0.01)[1] == FLEX_HOST_MS
    # 8K behind 4K and 8K: by the device's time alone both would pay.
    assert layer_ms(size, 8192, 12288, 0.45)[0] < FLEX_HOST_MS < layer_ms(size, 8192, 16384, 0.45)[0]
    assert not sparse_pays(size, 8192, 12288)
    assert sparse_pays(size, 8192, 16384)


def test_no_launch_is_shorter_than_one_of_its_programs() -> None:
    """Dense or sparse; only FlashAttention 3 cuts the keys of very few programs."""
    size = on(SIZES["0.5b"], "hopper")
    alone = 131072 * 128 * 4 * 64 / (500e9 / 132)  # 128 queries of a head over all keys, on one multiprocessor
    dense_ms, sparse_ms = layer_ms(size, 1024, 131072, 0.3)
    assert size.num_q_heads * 8 < 132
    assert dense_ms == pytest.approx(alone)
    assert 0.3 * alone / 0.8 < sparse_ms < dense_ms
    # With a cut tile the sparse launch reads all keys in one program too, at the speed of its kernel.
    assert layer_ms(size, 1024, 131000, 0.3)[1] > 131000 / 131072 * alone / 0.8
    # 56 programs are split.
    assert layer_ms(size, 512, 131072, 0.3)[0] < alone / 2


@pytest.mark.parametrize("kernel", ["portable", "hopper"])
@pytest.mark.parametrize("name", SIZES)
def test_longer_is_never_less_worth(name: str, kernel: SparseKernel) -> None:
    """Of whole spans: once a chunk pays, it pays with more keys before it, and with more queries."""
    chunks = [2**power for power in range(8, 15)]
    for query_len in chunks:
        answers = [
            sparse_pays(on(SIZES[name], kernel), query_len, kv_len)
            for kv_len in (2**p for p in range(8, 21))
            if kv_len >= query_len
        ]
        assert answers == sorted(answers)
    assert [expected_density(length) for length in (0, 5000, 8192, 10**6)] == [1.0, 0.6, 0.45, 0.3]


def test_the_kernel_in_use_decides() -> None:
    """A chunk behind 8K of a 0.5B model pays with the kernels of Hopper alone."""
    assert not sparse_pays(SIZES["0.5b"], 8192, 16384)
    assert sparse_pays(on(SIZES["0.5b"], "hopper"), 8192, 16384)
    hopper = ((9, 0), 128, torch.bfloat16, 128)
    assert sparse_kernel(*hopper, has_turn=False) == "hopper"
    assert sparse_kernel(*hopper, has_turn=True) == "portable"
    for others in (
        ((8, 0), 128, torch.bfloat16, 128),
        ((10, 0), 128, torch.bfloat16, 128),
        ((9, 0), 96, torch.bfloat16, 128),
        ((9, 0), 128, torch.float8_e4m3fn, 128),
        ((9, 0), 128, torch.bfloat16, 48),
    ):
        assert sparse_kernel(*others, has_turn=False) == "portable", others
