"""The dynamic selection by definition, and what it delivers: coverage, density against the oracle, drift."""

import pytest
import torch
from farspan.kernels import reference
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.flex import coverage as flex_coverage
from farspan.kernels.flex import oracle as flex_oracle
from farspan.kernels.flex import reference as flex_reference
from farspan.kernels.flex.types import NO_LIMIT, Budget, FlexEstimate, FlexSelection
from farspan.kernels.tiles import PrefillTiles

from benchmarks.calibrated import calibrated_qkv
from tests.kernels.helpers import Inputs, make_batch

NUM_HEADS, NUM_KV_HEADS = 8, 2


def calibrated_batch(seq_len: int, query_len: int, seed: int = 0) -> Inputs:
    """The calibrated inputs of one request, in pages."""
    shape = {"num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS, "head_dim": 128, "page_size": 128}
    batch = make_batch([query_len], [seq_len], **shape)
    query, key, value = calibrated_qkv(seq_len, NUM_HEADS, NUM_KV_HEADS, 128, seed=seed)
    position = torch.arange(seq_len)
    page = batch.block_table[0, position // 128].long()
    batch.kv_cache[page, :, position % 128] = torch.cat([key, value], dim=-1)
    batch.query.copy_(query[seq_len - query_len :])
    return batch


def arguments_of(batch: Inputs) -> tuple[torch.Tensor, KVView, PagedBatch]:
    return batch.query, batch.kv, batch.paged


def select(
    batch: Inputs, tiles: PrefillTiles, gamma: float, *, tau: float = 0.1, min_budget: int = 1024
) -> FlexSelection:
    budget = Budget(gamma, tau, min_blocks=-(-min_budget // tiles.block_size), max_blocks=NO_LIMIT)
    return flex_reference.flex_block_lists(*arguments_of(batch), tiles, batch.scale, budget)


def test_estimate_by_definition() -> None:
    batch = make_batch([70], [150], num_heads=2, num_kv_heads=1, head_dim=16, sharpness=2.0)
    block = 64
    found = flex_reference.estimate(*arguments_of(batch), 3, block, batch.scale, dtype=torch.float64)
    key, _ = reference.gather_kv(batch.kv_cache, batch.block_table[0], 150, torch.float64)
    expected = torch.zeros(2, 2, 3, dtype=torch.float64)
    for head in range(2):
        for pos in range(150 - block, 150):
            query = batch.query[pos - 80, head].double()
            weights = (key[: pos + 1, 0] @ query * batch.scale).softmax(0)
            for k, weight in enumerate(weights.tolist()):
                expected[pos // block - 1, head, k // block] += weight / block
        pooled = torch.stack([part.mean(0) for part in key[:, 0].split(block)])
        rows = batch.query[-block:, head].double()
        # Positions 86 to 127 are in tile 1, 128 to 149 in tile 2.
        for tile, members in enumerate((rows[:42], rows[42:])):
            torch.testing.assert_close(found.pooled_logits[tile, head, 0], pooled @ members.mean(0) * batch.scale)
    torch.testing.assert_close(found.tile_mass[:, :, 0], expected)


@pytest.mark.parametrize(
    ("rows", "columns", "low", "high"),
    [
        (torch.arange(64), torch.full((64,), 9), 0.98, 1.0),
        (torch.arange(64), torch.arange(64), 0.0, 0.05),
        (torch.arange(40), torch.arange(24, 64), 0.0, 0.1),
        (torch.arange(64).repeat(64), torch.arange(64).repeat_interleave(64), 0.6, 0.75),
    ],
    ids=["vertical", "diagonal", "off-diagonal", "even"],
)
def test_column_share_tells_lines_apart(rows: torch.Tensor, columns: torch.Tensor, low: float, high: float) -> None:
    mass = torch.zeros(1, 64, 64)
    mass[0, rows, columns] = 1e-3
    assert low <= float(flex_reference._column_share(mass, 64)) <= high


def test_both_diagonals_of_a_slash_are_listed() -> None:
    """A slash at distance 200 crosses block diagonals 3 and 4 of 64-token tiles; every full tile must read both."""
    distance, seq_len = 200, 1000
    codes = torch.nn.functional.normalize(torch.randn(seq_len + distance, 64), dim=-1)
    batch = make_batch([seq_len], [seq_len], num_heads=1, num_kv_heads=1, head_dim=64)
    position = torch.arange(seq_len)
    page = batch.block_table[0, position // 16].long()
    batch.kv_cache[page, 0, position % 16, :64] = codes[distance:]
    batch.query[:, 0] = codes[:seq_len] * 300
    tiles = batch.tiles(64)
    lists = select(batch, tiles, 0.95, tau=0, min_budget=0).block_lists
    for tile in range(5, tiles.num_tiles):
        ids = lists.block_ids[0, tile, : lists.block_counts[0, tile]].tolist()
        assert {tile - 3, tile - 4} <= set(ids)
        assert len(ids) <= 6


def test_divergence_survives_underflow_and_is_bounded() -> None:
    mass = torch.zeros(2, 1, 1, 4)
    mass[1, 0, 0, 0] = 1.0
    logits = torch.full((2, 1, 1, 4), float("-inf"))
    logits[:, 0, 0, :2] = torch.tensor([-1e4, 0.0])
    apart = flex_reference.divergence(FlexEstimate(mass, torch.zeros(1, 1, 4), logits))
    assert float(apart) == pytest.approx(0.832555, abs=1e-4)
    mass[1, 0, 0] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    same = flex_reference.divergence(FlexEstimate(mass, torch.zeros(1, 1, 4), mass[1].log().expand(2, -1, -1, -1)))
    assert float(same) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("gamma", [0.9, 0.95], ids=lambda gamma: f"g{gamma}")
@pytest.mark.parametrize("seq_len", [4096, 5003], ids=lambda seq_len: f"n{seq_len}")
def test_gamma_is_delivered_near_the_oracle(seq_len: int, gamma: float) -> None:
    batch = calibrated_batch(seq_len, seq_len)
    tiles = batch.tiles(64)
    mass = flex_oracle.block_mass(*arguments_of(batch), tiles, batch.scale, dtype=torch.float32)
    causal = int((tiles.tile_block + 1).sum())
    for min_budget in (0, 512):
        lists = select(batch, tiles, gamma, tau=0.2, min_budget=min_budget).block_lists
        coverage = flex_oracle.kept_mass(mass, lists).mean(1)
        density = lists.block_counts.sum(1) / causal
        oracle = flex_oracle.smallest_counts(mass, gamma).sum(1) / causal
        print(f"min {min_budget} coverage {coverage.tolist()} density {density.tolist()} oracle {oracle.tolist()}")
        assert float(coverage.mean()) >= gamma - 0.01
        if min_budget:
            assert float(coverage.min()) >= gamma - 0.05
        else:
            assert float(density.mean()) <= 1.25 * float(oracle.mean())


def test_chunks_choose_like_the_whole_prompt() -> None:
    """Lists of a chunk come from its own last queries, so they drift; what they keep must not."""
    seq_len, gamma = 4096, 0.95
    whole = calibrated_batch(seq_len, seq_len)
    tiles = whole.tiles(64)
    mass = flex_oracle.block_mass(*arguments_of(whole), tiles, whole.scale, dtype=torch.float32)
    density, kept = {}, {}
    for chunk in (1024, seq_len):
        counts, coverage = [], []
        for end in range(chunk, seq_len + 1, chunk):
            starts = torch.tensor([0, chunk], dtype=torch.int32)
            query = whole.query[end - chunk : end]
            part = Inputs(
                query, query, query, whole.kv_cache, whole.block_table, torch.tensor([end], dtype=torch.int32), starts,
                whole.slot_mapping, whole.scale,
            )  # fmt: skip
            lists = select(part, part.tiles(64), gamma, tau=0.2, min_budget=256).block_lists
            rows = slice((end - chunk) // 64, end // 64)
            coverage.append(flex_oracle.kept_mass(mass[:, rows, : end // 64], lists))
            counts.append(lists.block_counts)
        kept[chunk] = torch.cat(coverage, 1).mean(1)
        density[chunk] = float(torch.cat(counts, 1).sum() / (NUM_HEADS * (tiles.tile_block + 1).sum()))
    print(f"density {density}, coverage { ({chunk: float(each.mean()) for chunk, each in kept.items()}) }")
    for each in kept.values():
        assert float(each.mean()) >= gamma - 0.01
        assert float(each.min()) >= gamma - 0.05
    assert abs(density[1024] - density[seq_len]) < 0.05


def test_measured_coverage_is_the_kept_mass() -> None:
    lens = ([300, 65], [900, 65])
    batch = make_batch(*lens, num_heads=4, num_kv_heads=2, head_dim=32, sharpness=3.0)
    tiles = batch.tiles(64)
    lists = select(batch, tiles, 0.6, min_budget=0, tau=0).block_lists
    _, kept_lse = reference.paged_attention(*arguments_of(batch), batch.scale, tiles=tiles, block_lists=lists)
    _, full_lse = reference.paged_attention(*arguments_of(batch), batch.scale)
    places = [flex_coverage.sample_places(length, 5) for length in lens[0]]
    assert [place // 60 for place in places[0]] == [0, 1, 2, 3, 4]
    assert len({place % 60 for place in places[0]}) > 1
    rows = torch.tensor([*places[0], *(300 + place for place in places[1])])
    coverage = flex_coverage.kept_share(kept_lse, full_lse[:, rows], rows)
    torch.testing.assert_close(coverage, (kept_lse - full_lse).exp()[:, rows].clamp_max(1.0), atol=1e-4, rtol=1e-4)
    assert float(coverage.min()) < 0.99
