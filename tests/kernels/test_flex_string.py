"""Dynamic selection under shifted positions, against the float64 oracle of the shifted attention."""

import pytest
import torch
from farspan.kernels import reference
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.flex import oracle as flex_oracle
from farspan.kernels.flex import reference as flex_reference
from farspan.kernels.flex import select as flex_select
from farspan.kernels.flex.types import NO_LIMIT, Budget
from farspan.kernels.tiles import BlockLists, PrefillTiles

from tests.kernels.helpers import Inputs, make_batch
from tests.kernels.string_helpers import Shift, inverse_frequencies, make_shift, unrotate

HEAD_DIM, BLOCK = 32, 64
INV_FREQ = inverse_frequencies(HEAD_DIM)


def make_string(shift: int, window: int, device: torch.device | str = "cpu") -> Shift:
    return make_shift(INV_FREQ, shift, window, True, torch.device(device))


def arguments_of(batch: Inputs) -> tuple[torch.Tensor, KVView, PagedBatch]:
    return batch.query, batch.kv, batch.paged


def choose(batch: Inputs, tiles: PrefillTiles, gamma: float, turn: Shift | None, tau: float = 0.0) -> BlockLists:
    twin = flex_reference if batch.query.device.type == "cpu" else flex_select
    budget = Budget(gamma, tau, min_blocks=0, max_blocks=NO_LIMIT)
    return twin.flex_block_lists(*arguments_of(batch), tiles, batch.scale, budget, turn=turn).block_lists


@pytest.mark.parametrize("shift", [1, 63, 64, 65, 100, 149, 150])
def test_estimate_is_the_oracles_mass(shift: int) -> None:
    """One query at a time, the oracle's mass on a block is what its LSE over that block alone leaves of the whole."""
    batch = make_batch([70], [150], num_heads=2, num_kv_heads=1, head_dim=HEAD_DIM, sharpness=2.0)
    turn = make_string(shift, 9)
    found = flex_reference.estimate(*arguments_of(batch), 3, BLOCK, batch.scale, dtype=torch.float64, turn=turn)
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
    mass = flex_oracle.block_mass(*arguments_of(batch), batch.tiles(BLOCK), batch.scale, turn=turn)
    torch.testing.assert_close(mass.sum(-1), torch.ones_like(mass.sum(-1)))
    torch.testing.assert_close(mass[:, -1], found.tile_mass[1, :, 0] * BLOCK / 22, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shift", [100, 400])
def test_keeps_gamma_of_the_shifted_attention(device: torch.device, shift: int) -> None:
    """The representative queries, here one whole tile, keep what was asked for of the attention that will run."""
    gamma, seq_len = 0.7, 1024
    batch = make_batch(
        [seq_len], [seq_len], num_heads=4, num_kv_heads=2, head_dim=HEAD_DIM, sharpness=4.0, device=device
    )
    tiles = batch.tiles(BLOCK)
    turn = make_string(shift, 10, device)
    mass = flex_oracle.block_mass(*arguments_of(batch), tiles, batch.scale, turn=turn)[:, -1:].cpu()
    kept = {}
    for name, chosen_by in (("shifted", turn), ("ordinary", None)):
        lists = choose(batch, tiles, gamma, chosen_by)
        last = BlockLists(lists.block_ids[:, -1:].cpu(), lists.block_counts[:, -1:].cpu())
        kept[name] = flex_oracle.kept_mass(mass, last)
    assert float(kept["shifted"].min()) >= gamma - 1e-4
    assert float(kept["ordinary"].min()) < gamma - 1e-2
