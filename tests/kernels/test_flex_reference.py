"""The dynamic selection by definition, and what it delivers: coverage, density against the oracle, drift."""

import pytest
import torch
from farspan.kernels import reference
from farspan.kernels.flex import coverage as flex_coverage
from farspan.kernels.flex import oracle as flex_oracle
from farspan.kernels.flex import reference as flex_reference
from farspan.kernels.flex.select import flex_block_lists
from farspan.kernels.flex.types import FlexEstimate, FlexSelection
from farspan.kernels.tiles import PrefillTiles, make_prefill_tiles

from benchmarks.calibrated import calibrated_qkv
from tests.kernels.helpers import PagedBatch, make_batch

NUM_HEADS, NUM_KV_HEADS = 8, 2


def calibrated_batch(seq_len: int, query_len: int, seed: int = 0) -> PagedBatch:
    """The calibrated inputs of one request, in pages."""
    shape = {"num_heads": NUM_HEADS, "num_kv_heads": NUM_KV_HEADS, "head_dim": 128, "page_size": 128}
    batch = make_batch([query_len], [seq_len], **shape)
    query, key, value = calibrated_qkv(seq_len, NUM_HEADS, NUM_KV_HEADS, 128, seed=seed)
    position = torch.arange(seq_len)
    page = batch.block_table[0, position // 128].long()
    batch.kv_cache[page, :, position % 128] = torch.cat([key, value], dim=-1)
    batch.query.copy_(query[seq_len - query_len :])
    return batch


def arguments_of(batch: PagedBatch) -> tuple[torch.Tensor, ...]:
    return batch.query, batch.kv_cache, batch.block_table, batch.seq_lens, batch.query_start_loc


def select(batch: PagedBatch, tiles: PrefillTiles, gamma: float, **options: float) -> FlexSelection:
    everyone = torch.arange(len(batch.seq_lens), dtype=torch.int32)
    return flex_block_lists(
        *arguments_of(batch),
        tiles,
        batch.scale,
        requests=everyone,
        gamma=torch.full((len(everyone),), gamma),
        **options,  # type: ignore[arg-type]
    )


def test_estimate_by_definition() -> None:
    batch = make_batch([70], [150], num_heads=2, num_kv_heads=1, head_dim=16, sharpness=2.0)
    block = 64
    found = flex_reference.estimate(*arguments_of(batch), torch.tensor([0]), 3, block, batch.scale, torch.float64)
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
        # Positions 86 to 127 lie in tile 1, 128 to 149 in tile 2.
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
    mass = flex_oracle.block_mass(*arguments_of(batch), tiles, batch.scale, torch.float32)
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
    mass = flex_oracle.block_mass(*arguments_of(whole), tiles, whole.scale, torch.float32)
    density, kept = {}, {}
    for chunk in (1024, seq_len):
        counts, coverage = [], []
        for end in range(chunk, seq_len + 1, chunk):
            starts = torch.tensor([0, chunk], dtype=torch.int32)
            query = whole.query[end - chunk : end]
            part = PagedBatch(
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


def test_measured_coverage_is_the_kept_mass(device: torch.device) -> None:
    lens = ([300, 65], [900, 65])
    batch = make_batch(*lens, num_heads=4, num_kv_heads=2, head_dim=32, sharpness=3.0)
    tiles = batch.tiles(64)
    lists = select(batch, tiles, 0.6, min_budget=0, tau=0).block_lists
    _, kept_lse = reference.paged_attention(*arguments_of(batch), batch.scale, tiles=tiles, block_lists=lists)
    _, full_lse = reference.paged_attention(*arguments_of(batch), batch.scale)
    rows = flex_coverage.sample_rows(batch.query_start_loc, 5)
    assert (rows[0] // 60).tolist() == [0, 1, 2, 3, 4]
    assert len((rows[0] % 60).unique()) > 1
    coverage = flex_coverage.measure_coverage(*arguments_of(batch), batch.scale, kept_lse, rows)
    torch.testing.assert_close(coverage, (kept_lse - full_lse).exp()[:, rows], atol=1e-4, rtol=1e-4)
    assert float(coverage.min()) < 0.99


def test_budget_controller_tightens_is_bounded_and_lets_go() -> None:
    controller = flex_coverage.BudgetController(2, torch.device("cpu"))
    gamma = torch.tensor([0.9, 0.8])
    torch.testing.assert_close(controller.effective_gamma(gamma), gamma.expand(2, -1))
    short = torch.tensor([[[0.5, 0.9], [0.7, 0.7]], [[0.95, 0.95], [0.9, 0.9]]])
    controller.update(short, gamma)
    torch.testing.assert_close(controller.effective_gamma(gamma)[0], torch.tensor([0.95, 0.9]))
    torch.testing.assert_close(controller.effective_gamma(gamma)[1], gamma)
    torch.testing.assert_close(controller.coverage, torch.tensor([0.7, 0.925]))
    for _ in range(10):
        controller.update(short, gamma)
    assert float(controller.strictness[0]) == flex_coverage.STRICTEST
    for _ in range(100):
        controller.update(torch.ones(2, 2, 2), gamma)
    torch.testing.assert_close(controller.strictness, torch.ones(2))


def test_closed_loop_reaches_gamma() -> None:
    """A head whose early queries look elsewhere than its last ones: the loop must find the budget it needs."""
    seq_len, gamma = 2048, 0.9
    batch = make_batch([seq_len], [seq_len], num_heads=1, num_kv_heads=1, head_dim=64)
    batch.query[:1900] *= 0.8
    batch.query[1900:] *= 2.5
    tiles = make_prefill_tiles([0, seq_len], [seq_len], 64, torch.device("cpu"))
    everyone, wanted = torch.zeros(1, dtype=torch.int32), torch.tensor([gamma])
    mass = flex_oracle.block_mass(*arguments_of(batch), tiles, batch.scale, torch.float32)
    controller = flex_coverage.BudgetController(1, torch.device("cpu"))
    kept = []
    for _ in range(5):
        lists = flex_block_lists(
            *arguments_of(batch), tiles, batch.scale, requests=everyone, gamma=controller.effective_gamma(wanted),
            tau=0.0, min_budget=64,
        ).block_lists  # fmt: skip
        coverage = flex_oracle.kept_mass(mass, lists)
        kept.append(float(coverage.mean()))
        controller.update(coverage[:, None], wanted)
    assert kept[0] < gamma
    assert max(kept) >= gamma


def test_density_counts_per_request() -> None:
    batch = make_batch([130, 64], [130, 640], num_heads=4, num_kv_heads=2, head_dim=32)
    tiles = batch.tiles(64)
    requests = torch.arange(2, dtype=torch.int32)
    selection = select(batch, tiles, 1.0)
    torch.testing.assert_close(selection.density(tiles, requests), torch.ones(4, 2))
