"""Dynamic selection under shifted positions, against the float64 oracle of the shifted attention."""

import pytest
import torch
from farspan.kernels import reference
from farspan.kernels.flex import coverage as flex_coverage
from farspan.kernels.flex import oracle as flex_oracle
from farspan.kernels.flex import reference as flex_reference
from farspan.kernels.flex.select import flex_block_lists
from farspan.kernels.rotary_turn import RotaryShift, make_rotary_shift
from farspan.kernels.tiles import BlockLists, PrefillTiles

from tests.kernels.helpers import PagedBatch, make_batch
from tests.kernels.string_helpers import inverse_frequencies, string_reference, unrotate

HEAD_DIM, BLOCK = 32, 64
INV_FREQ = inverse_frequencies(HEAD_DIM)


def make_string(shift: int, window: int, device: torch.device | str = "cpu") -> RotaryShift:
    return make_rotary_shift(INV_FREQ, shift, window, True, torch.device(device))


def arguments_of(batch: PagedBatch) -> tuple[torch.Tensor, ...]:
    return batch.query, batch.kv_cache, batch.block_table, batch.seq_lens, batch.query_start_loc


def choose(
    batch: PagedBatch, tiles: PrefillTiles, gamma: float, string: RotaryShift | None, tau: float = 0.0
) -> BlockLists:
    device = batch.query.device
    num_reqs = len(batch.seq_lens)
    return flex_block_lists(
        *arguments_of(batch),
        tiles,
        batch.scale,
        requests=torch.arange(num_reqs, dtype=torch.int32, device=device),
        gamma=torch.full((num_reqs,), gamma, device=device),
        tau=tau,
        min_budget=0,
        string=string,
    ).block_lists


@pytest.mark.parametrize("shift", [1, 63, 64, 65, 100, 149, 150])
def test_estimate_is_the_oracles_mass(shift: int) -> None:
    """One query at a time, the oracle's mass on a block is what its LSE over that block alone leaves of the whole."""
    batch = make_batch([70], [150], num_heads=2, num_kv_heads=1, head_dim=HEAD_DIM, sharpness=2.0)
    string = make_string(shift, 9)
    found = flex_reference.estimate(
        *arguments_of(batch), torch.tensor([0]), 3, BLOCK, batch.scale, torch.float64, string=string
    )
    key, value = reference.gather_kv(batch.kv_cache, batch.block_table[0], 150, torch.float64)
    query_pos, kv_pos = torch.arange(80, 150), torch.arange(150)
    inputs = (unrotate(batch.query, query_pos, INV_FREQ, True), unrotate(key, kv_pos, INV_FREQ, True), value, INV_FREQ)
    options = {"shift": shift, "window": 9, "is_neox": True}
    _, whole = reference.string_attention(*inputs, batch.scale, **options)
    for block in range(3):
        mask = (kv_pos // BLOCK == block).expand(70, -1)
        _, part = reference.string_attention(*inputs, batch.scale, **options, mask=mask)
        mass = (part - whole).exp()[:, -BLOCK:] / BLOCK
        in_last = query_pos[-BLOCK:] >= 2 * BLOCK
        for tile, members in enumerate((~in_last, in_last)):
            torch.testing.assert_close(
                found.tile_mass[tile, :, 0, block], mass[:, members].sum(1), atol=1e-6, rtol=1e-5
            )
    mass = flex_oracle.block_mass(*arguments_of(batch), batch.tiles(BLOCK), batch.scale, string=string)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass.sum(-1)))
    torch.testing.assert_close(mass[:, -1], found.tile_mass[1, :, 0] * BLOCK / 22, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shift", [300, 1000])
def test_measured_coverage_is_the_mass_kept_under_shifted_positions(device: torch.device, shift: int) -> None:
    batch = make_batch(
        [300, 65], [900, 65], num_heads=4, num_kv_heads=2, head_dim=HEAD_DIM, sharpness=3.0, device=device
    )
    tiles = batch.tiles(BLOCK)
    string = make_string(shift, 20, device)
    lists = choose(batch, tiles, 0.6, string)
    on_cpu = BlockLists(lists.block_ids.cpu(), lists.block_counts.cpu())
    cpu_tiles = PrefillTiles(BLOCK, tiles.tile_request.cpu(), tiles.tile_block.cpu(), tiles.max_kv_blocks)
    cpu_string = make_string(shift, 20)
    _, kept_lse = string_reference(batch, cpu_string, INV_FREQ, cpu_tiles, on_cpu)
    _, full_lse = string_reference(batch, cpu_string, INV_FREQ)
    rows = flex_coverage.sample_rows(batch.query_start_loc, 5)
    coverage = flex_coverage.measure_coverage(
        *arguments_of(batch), batch.scale, kept_lse.to(device), rows, string=string
    ).cpu()
    expected = (kept_lse - full_lse).exp()[:, rows.cpu()].clamp_max(1.0)
    torch.testing.assert_close(coverage, expected, atol=1e-4, rtol=1e-4)
    assert float(coverage.min()) < 0.99


@pytest.mark.parametrize("shift", [100, 400])
def test_keeps_gamma_of_the_shifted_attention(device: torch.device, shift: int) -> None:
    """The representative queries, here one whole tile, keep what was asked for of the attention that will run."""
    gamma, seq_len = 0.7, 1024
    batch = make_batch(
        [seq_len], [seq_len], num_heads=4, num_kv_heads=2, head_dim=HEAD_DIM, sharpness=4.0, device=device
    )
    tiles = batch.tiles(BLOCK)
    string = make_string(shift, 10, device)
    mass = flex_oracle.block_mass(*arguments_of(batch), tiles, batch.scale, string=string)[:, -1:].cpu()
    kept = {}
    for name, chosen_by in (("shifted", string), ("ordinary", None)):
        lists = choose(batch, tiles, gamma, chosen_by)
        last = BlockLists(lists.block_ids[:, -1:].cpu(), lists.block_counts[:, -1:].cpu())
        kept[name] = flex_oracle.kept_mass(mass, last)
    assert float(kept["shifted"].min()) >= gamma - 1e-4
    assert float(kept["ordinary"].min()) < gamma - 1e-2
