"""Shifted rotary positions in prefill, against a float64 oracle with the whole matrix of shifted distances."""

from dataclasses import dataclass, replace

import pytest
import torch
from farspan.kernels import reference
from farspan.kernels.prefill import paged_prefill
from farspan.kernels.rotary_turn import make_string_turn
from farspan.kernels.tiles import BlockLists, PrefillTiles

from tests.kernels.helpers import Inputs, assert_attention_close, make_batch, poisoned_like, random_block_lists

gpu = pytest.mark.gpu
BASE = 10000.0


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a model, in float64."""

    rotary_dim: int
    is_neox: bool

    @property
    def inv_freq(self) -> torch.Tensor:
        return BASE ** (-torch.arange(0, self.rotary_dim, 2, dtype=torch.float64) / self.rotary_dim)

    def pairs(self, vectors: torch.Tensor) -> torch.Tensor:
        """[..., head_dim] -> [..., rotary_dim / 2] complex128."""
        rotary = vectors[..., : self.rotary_dim].double()
        if self.is_neox:
            first, second = rotary.chunk(2, dim=-1)
        else:
            first, second = rotary[..., 0::2], rotary[..., 1::2]
        return torch.complex(first, second)

    def rotate(self, vectors: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """Rotate [num_tokens, num_heads, head_dim] to the tokens' positions, in float64."""
        angle = position.double()[:, None] * self.inv_freq
        turned = self.pairs(vectors) * torch.polar(torch.ones_like(angle), angle)[:, None]
        if self.is_neox:
            rotary = torch.cat([turned.real, turned.imag], dim=-1)
        else:
            rotary = torch.view_as_real(turned).flatten(-2)
        return torch.cat([rotary, vectors[..., self.rotary_dim :].double()], dim=-1)

    def logits_at(self, query: torch.Tensor, key: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Dot products of unrotated queries and keys at given distances.

        query: [query_len, num_heads, head_dim]; key: [kv_len, num_heads, head_dim]; distance: [query_len, kv_len].
        """
        angle = distance.double()[..., None] * self.inv_freq
        products = torch.einsum("qhf,khf->hqkf", self.pairs(query), self.pairs(key).conj())
        turned = (products * torch.polar(torch.ones_like(angle), angle)).real.sum(-1)
        rest = slice(self.rotary_dim, None)
        return turned + torch.einsum("qhd,khd->hqk", query[..., rest].double(), key[..., rest].double())


def rotate_batch(batch: Inputs, rope: Rope) -> Inputs:
    """The batch as a model hands it over: queries and cached keys rotated to their positions, rounded to the dtype."""
    query, cache = batch.query.clone(), batch.kv_cache.clone()
    page_size, head_dim = cache.shape[2], query.shape[2]
    for request, seq_len in enumerate(batch.seq_lens.tolist()):
        position = torch.arange(seq_len)
        pages = batch.block_table[request].cpu()[position // page_size].long().to(cache.device)
        offset = (position % page_size).to(cache.device)
        keys = cache[pages, :, offset, :head_dim].cpu()
        cache[pages, :, offset, :head_dim] = rope.rotate(keys, position).to(cache)
        rows = slice(int(batch.query_start_loc[request]), int(batch.query_start_loc[request + 1]))
        query_position = position[seq_len - (rows.stop - rows.start) :]
        query[rows] = rope.rotate(query[rows].cpu(), query_position).to(query)
    return replace(batch, query=query, kv_cache=cache)


def oracle(
    batch: Inputs,
    rope: Rope,
    shift: int,
    window: int,
    tiles: PrefillTiles,
    block_lists: BlockLists | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the unrotated batch under the matrix of shifted distances."""
    num_tokens, num_heads, head_dim = batch.query.shape
    out = torch.zeros(num_tokens, num_heads, head_dim, dtype=torch.float64)
    lse = torch.zeros(num_heads, num_tokens, dtype=torch.float64)
    for request, seq_len in enumerate(batch.seq_lens.tolist()):
        rows = slice(int(batch.query_start_loc[request]), int(batch.query_start_loc[request + 1]))
        query = batch.query[rows].cpu()
        key, value = reference.gather_kv(
            batch.kv_cache.cpu(), batch.block_table[request].cpu(), seq_len, dtype=torch.float64
        )
        kv_pos = torch.arange(seq_len)
        query_pos = kv_pos[seq_len - len(query) :]
        distance = query_pos[:, None] - kv_pos
        mask = (distance >= 0)[None].expand(num_heads, -1, -1)
        if block_lists is not None:
            on_cpu = replace(tiles, tile_request=tiles.tile_request.cpu(), tile_block=tiles.tile_block.cpu())
            lists = BlockLists(block_lists.block_ids.cpu(), block_lists.block_counts.cpu())
            mask = mask & reference.listed_keys(on_cpu, lists, request, num_heads, query_pos, kv_pos)
        shifted = torch.where(distance < shift, distance, distance - shift + window)
        key = key.repeat_interleave(num_heads // key.shape[1], dim=1)
        logits = rope.logits_at(query, key, shifted) * batch.scale
        out[rows], lse[:, rows] = reference.attend_logits(logits, value, mask)
    return out.float(), lse.float()


@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
@pytest.mark.parametrize(
    ("shift", "window", "block_size"),
    [(1, 0, 64), (50, 7, 64), (64, 128, 64), (127, 20, 128), (128, 20, 128), (129, 20, 128), (1000, 128, 64)],
    ids=lambda value: str(value),
)
def test_equals_the_position_matrix(
    device: torch.device, shift: int, window: int, block_size: int, listed: bool
) -> None:
    check(device, [70, 1, 40], [330, 180, 40], Rope(64, True), shift, window, block_size, listed)


@pytest.mark.parametrize(
    ("rope", "head_dim", "num_heads"),
    [(Rope(64, False), 64, 2), (Rope(32, True), 64, 7), (Rope(32, False), 96, 2), (Rope(96, True), 96, 4)],
    ids=["interleaved", "partial-neox-gqa7", "partial-interleaved-d96", "neox-d96"],
)
def test_equals_the_position_matrix_for_every_rotary_form(
    device: torch.device, rope: Rope, head_dim: int, num_heads: int
) -> None:
    check(device, [33], [190], rope, 70, 16, 64, False, num_heads=num_heads, num_kv_heads=1, head_dim=head_dim)


@gpu
@pytest.mark.parametrize("listed", [False, True], ids=["dense", "listed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_equals_the_position_matrix_on_the_gpu(
    device: torch.device, head_dim: int, dtype: torch.dtype, listed: bool
) -> None:
    check(
        device, [300, 5], [900, 700], Rope(head_dim, True), 333, 64, 128, listed,
        num_heads=8, head_dim=head_dim, page_size=128, dtype=dtype,
    )  # fmt: skip


def check(
    device: torch.device,
    query_lens: list[int],
    seq_lens: list[int],
    rope: Rope,
    shift: int,
    window: int,
    block_size: int,
    listed: bool,
    *,
    num_heads: int = 4,
    num_kv_heads: int = 2,
    head_dim: int = 64,
    page_size: int = 32,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Compare the kernel on a rotated batch with the oracle on the same batch before its rotation."""
    batch = make_batch(
        query_lens, seq_lens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim,
        page_size=page_size, dtype=dtype, device=device, sharpness=2.0,
    )  # fmt: skip
    tiles = batch.tiles(block_size)
    lists = random_block_lists(tiles, num_heads, 0.6) if listed else None
    rotated = rotate_batch(batch, rope)
    out, lse = paged_prefill(
        rotated.query,
        rotated.kv,
        rotated.paged,
        tiles,
        rotated.scale,
        block_lists=lists,
        turn=make_string_turn(rope.inv_freq, shift, window, rope.is_neox, device),
        out=poisoned_like(rotated.query),
    )
    expected_out, expected_lse = oracle(batch, rope, shift, window, tiles, lists)
    if dtype == torch.float32:
        assert_attention_close(out.cpu(), lse.cpu(), expected_out, expected_lse, dtype)
        return
    # Unlike the oracle, which rounds nothing, the kernel's inputs were rounded after each rotation.
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(out.cpu().float(), expected_out, rtol=0, atol=8 * epsilon * expected_out.abs().max())
    torch.testing.assert_close(lse.cpu(), expected_lse, rtol=0, atol=8 * epsilon)
