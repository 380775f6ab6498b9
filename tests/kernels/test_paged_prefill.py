"""Paged prefill against the float32 reference: dense, over lists, bidirectional, contiguous, for some requests."""

from dataclasses import dataclass, replace

import pytest
import torch
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.prefill import paged_prefill, prefill_attention
from farspan.kernels.tiles import BlockLists, PrefillTiles, make_prefill_tiles
from farspan.kernels.tuning import PrefillConfig

from tests.kernels.helpers import (
    Inputs,
    assert_attention_close,
    make_batch,
    poisoned_like,
    random_block_lists,
    reference_attention,
)

gpu = pytest.mark.gpu


@dataclass(frozen=True)
class Case:
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    block_size: int = 64
    dtype: torch.dtype = torch.float32
    layout: str = "lbhnc"

    @property
    def id(self) -> str:
        lens = "-".join(f"q{query}kv{kv}" for query, kv in zip(self.query_lens, self.seq_lens, strict=True))
        group = self.num_heads // self.num_kv_heads
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{lens}-gqa{group}-d{self.head_dim}-page{self.page_size}-block{self.block_size}-{dtype}-{self.layout}"

    def draw(self, device: torch.device) -> Inputs:
        return make_batch(
            self.query_lens,
            self.seq_lens,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            dtype=self.dtype,
            device=device,
            layout=self.layout,
            sharpness=2.0,
        )


F16, BF16 = torch.float16, torch.bfloat16
# Small enough for the interpreter; together they cover page sizes, head sizes, ratios of heads and odd lengths.
SMALL = [
    Case((1, 63, 70), (1, 63, 200)),
    Case((129, 1), (129, 130), num_kv_heads=4, page_size=128, block_size=128, dtype=F16, head_dim=128),
    Case((65, 17), (65, 81), num_heads=7, num_kv_heads=1, page_size=32, block_size=128, dtype=F16),
    Case((40, 0, 15), (140, 9, 15), num_heads=8, num_kv_heads=1, page_size=64, head_dim=96, dtype=F16, layout="lbnhc"),
    Case((33,), (127,), num_heads=2, num_kv_heads=1, page_size=32, head_dim=256, layout="lbnhc"),
]
LARGE = [
    pytest.param(Case(query_lens, seq_lens, heads, kv_heads, head_dim, page, block, dtype, layout), marks=gpu)
    for query_lens, seq_lens, heads, kv_heads, head_dim, page, block, dtype, layout in [
        ((1000, 63, 1), (1000, 1063, 500), 8, 2, 128, 128, 128, BF16, "lbhnc"),
        ((1000, 63, 1), (1000, 1063, 500), 8, 2, 128, 16, 128, BF16, "lbhnc"),
        ((1000, 129), (3000, 129), 14, 2, 128, 128, 64, BF16, "lbhnc"),
        ((1000, 129), (3000, 129), 14, 2, 64, 64, 64, F16, "lbhnc"),
        ((1000, 127), (1000, 127), 6, 2, 96, 128, 128, BF16, "lbhnc"),
        ((1000, 127), (1000, 127), 8, 1, 256, 128, 128, BF16, "lbhnc"),
        ((1000, 127), (1000, 127), 8, 8, 256, 64, 64, F16, "lbnhc"),
        ((300, 65), (1300, 65), 4, 2, 128, 32, 128, torch.float32, "lbhnc"),
        ((300, 65), (1300, 65), 10, 2, 96, 128, 128, torch.float32, "lbnhc"),
        ((129, 65), (129, 165), 4, 2, 256, 128, 64, torch.float32, "lbhnc"),
        ((5,) * 16, tuple(range(1000, 2600, 100)), 32, 8, 128, 128, 128, BF16, "lbhnc"),
    ]
]


def prefill(
    batch: Inputs,
    tiles: PrefillTiles,
    *,
    block_lists: BlockLists | None = None,
    causal: bool = True,
    max_query_len: int | None = None,
    config: PrefillConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the kernel on a batch, into outputs full of NaN."""
    key_cache, value_cache = batch.kv_cache.split(batch.query.shape[-1], dim=-1)
    num_tokens, num_heads, _ = batch.query.shape
    return prefill_attention(
        batch.query,
        key_cache,
        value_cache,
        batch.paged if max_query_len is None else replace(batch.paged, max_query_len=max_query_len),
        tiles,
        batch.scale,
        block_lists=block_lists,
        causal=causal,
        out=poisoned_like(batch.query),
        lse=poisoned_like(torch.empty(num_heads, num_tokens, device=batch.query.device)),
        config=config,
    )


def case_id(value: object) -> str | None:
    return value.id if isinstance(value, Case) else None


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=case_id)
def test_dense_equals_the_reference(device: torch.device, case: Case, causal: bool) -> None:
    batch = case.draw(device)
    result = prefill(batch, batch.tiles(case.block_size), causal=causal, max_query_len=max(case.query_lens))
    assert_attention_close(*result, *reference_attention(batch, causal=causal), case.dtype)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("sharing", ["query-head", "kv-head", "all"])
@pytest.mark.parametrize("case", [SMALL[0], SMALL[2], SMALL[3], LARGE[0], LARGE[2], LARGE[7]], ids=case_id)
def test_listed_blocks_equal_the_reference(device: torch.device, case: Case, sharing: str, causal: bool) -> None:
    batch = case.draw(device)
    tiles = batch.tiles(case.block_size)
    num_list_heads = {"query-head": case.num_heads, "kv-head": case.num_kv_heads, "all": 1}[sharing]
    lists = random_block_lists(
        tiles, num_list_heads, 0.4, seq_lens=None if causal else batch.seq_lens, force_first=False
    )
    result = prefill(batch, tiles, block_lists=lists, causal=causal)
    expected = reference_attention(batch, causal=causal, tiles=tiles, block_lists=lists)
    assert_attention_close(*result, *expected, case.dtype)


@pytest.mark.parametrize("far_block", [65_534, 65_540], ids=["narrow", "wide"])
def test_block_numbers_past_16_bits(device: torch.device, far_block: int) -> None:
    page_size = block_size = 128
    seq_len, head_dim = (far_block + 2) * block_size - 3, 96
    query, kv_cache = torch.randn(2, 1, head_dim), torch.randn(4, 1, page_size, 2 * head_dim)
    # A long block table that repeats a few pages.
    block_table = torch.arange(far_block + 2, dtype=torch.int32)[None] % 4
    ids = [1, far_block, far_block + 1]
    lists = BlockLists(torch.tensor([[ids]], dtype=torch.int32), torch.tensor([[3]], dtype=torch.int32))
    out, _ = paged_prefill(
        query.to(device),
        KVView(kv_cache.to(device)),
        PagedBatch(
            torch.tensor([0, 2], dtype=torch.int32, device=device),
            torch.tensor([seq_len], dtype=torch.int32, device=device),
            block_table.to(device),
            max_query_len=2,
            max_kv_len=seq_len,
        ),
        make_prefill_tiles([0, 2], [seq_len], block_size, device),
        head_dim**-0.5,
        block_lists=BlockLists(lists.block_ids.to(device), lists.block_counts.to(device)),
    )
    key, value = kv_cache[block_table[0, ids].long(), 0].flatten(0, 1).double().split(head_dim, dim=-1)
    scores = query[:, 0].double() @ key.T * head_dim**-0.5
    for row in range(2):
        # The request ends 3 tokens before its last block does, and the first row sees one key less than the second.
        scores[row, len(ids) * block_size - 3 - 1 + row :] = float("-inf")
    expected = scores.softmax(-1) @ value
    torch.testing.assert_close(out[:, 0].double().cpu(), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("case", [SMALL[1], replace(SMALL[3], layout="lbhnc")], ids=case_id)
@pytest.mark.parametrize("block_n", [32, 64])
def test_copy_engine_path_equals_the_reference(device: torch.device, case: Case, block_n: int) -> None:
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("the tensor copy engine came with Hopper")
    batch = case.draw(device)
    config = PrefillConfig(64, 1, block_n, num_warps=4, num_stages=2, use_tma=True)
    result = prefill(batch, batch.tiles(case.block_size), config=config)
    assert_attention_close(*result, *reference_attention(batch), case.dtype)


@pytest.mark.parametrize("block_t", [16, 32], ids=lambda tokens: f"tokens{tokens}")
def test_every_cut_of_a_tile_gives_the_same(device: torch.device, block_t: int) -> None:
    batch = Case((90, 3), (150, 103), num_heads=6).draw(device)
    tiles = batch.tiles(64)
    for heads_per_tile in (1, 3):
        config = PrefillConfig(block_t, heads_per_tile, 32, 4, 2, use_tma=False)
        assert_attention_close(*prefill(batch, tiles, config=config), *reference_attention(batch), torch.float32)


def test_requests_without_tiles_stay_untouched(device: torch.device) -> None:
    batch = Case((1, 70, 1, 5), (100, 70, 33, 5)).draw(device)
    out, lse = prefill(batch, batch.tiles(64, requests=[1, 3]))
    expected_out, expected_lse = reference_attention(batch)
    computed = torch.zeros(77, dtype=torch.bool, device=device)
    computed[1:71] = computed[72:] = True
    assert bool(out[~computed].isnan().all())
    assert bool(lse[:, ~computed].isnan().all())
    assert_attention_close(
        out[computed], lse[:, computed], expected_out[computed], expected_lse[:, computed], torch.float32
    )


def test_an_empty_list_gives_zero(device: torch.device) -> None:
    batch = Case((70,), (70,)).draw(device)
    tiles = batch.tiles(64)
    lists = random_block_lists(tiles, 1, 1.0)
    lists.block_counts[0, 1] = 0
    out, lse = prefill(batch, tiles, block_lists=lists)
    assert not bool(out[64:].any())
    assert bool(torch.isneginf(lse[:, 64:]).all())
    expected_out, expected_lse = reference_attention(batch)
    assert_attention_close(out[:64], lse[:, :64], expected_out[:64], expected_lse[:, :64], torch.float32)


def test_chunks_give_what_the_whole_prompt_gives(device: torch.device) -> None:
    batch = Case((200,), (200,), page_size=32).draw(device)
    whole_tiles = batch.tiles(64)
    lists = random_block_lists(whole_tiles, 4, 0.5)
    whole_out, whole_lse = prefill(batch, whole_tiles, block_lists=lists)
    for first, end in ((0, 50), (50, 64), (64, 199), (199, 200)):
        chunk = replace(
            batch,
            query=batch.query[first:end],
            seq_lens=torch.full_like(batch.seq_lens, end),
            query_start_loc=torch.tensor([0, end - first], dtype=torch.int32, device=device),
        )
        tiles = chunk.tiles(64)
        rows = tiles.tile_block.long()
        chunk_lists = BlockLists(lists.block_ids[:, rows].contiguous(), lists.block_counts[:, rows].contiguous())
        out, lse = prefill(chunk, tiles, block_lists=chunk_lists)
        assert_attention_close(out, lse, whole_out[first:end], whole_lse[:, first:end], torch.float32)


def test_strided_query_and_output(device: torch.device) -> None:
    batch = Case((70,), (133,)).draw(device)
    fused = torch.zeros(70, 8, 64, device=device)
    fused[:, 2:6] = batch.query
    padded = torch.full((70, 4, 96), float("nan"), device=device)
    out, lse = paged_prefill(
        fused[:, 2:6],
        batch.kv,
        batch.paged,
        batch.tiles(64),
        batch.scale,
        out=padded[:, :, :64],
    )
    assert_attention_close(out, lse, *reference_attention(batch), torch.float32)
    assert bool(padded[:, :, 64:].isnan().all())


# Where the heads of a token are adjacent, the copy engine cannot read the tensor as rows.
@pytest.mark.parametrize(
    ("packed", "use_tma"), [(True, False), (True, True), (False, False)], ids=["packed", "packed-tma", "separate"]
)
@pytest.mark.parametrize(
    ("length", "head_dim", "dtype"),
    [(77, 64, F16), (130, 96, torch.float32), pytest.param(1001, 128, BF16, marks=gpu)],
    ids=["n77-d64-float16", "n130-d96-float32", "n1001-d128-bfloat16"],
)
def test_contiguous_sequences_are_one_page_each(
    device: torch.device, length: int, head_dim: int, dtype: torch.dtype, packed: bool, use_tma: bool
) -> None:
    if use_tma and device.type == "cuda" and (torch.cuda.get_device_capability()[0] < 9 or dtype == torch.float32):
        pytest.skip("the copy engine came with Hopper, and is not used for float32")
    num_seqs, num_heads = 2, 2
    if packed:
        packed_kv = torch.randn(num_seqs, num_heads, length, 2 * head_dim).to(dtype).to(device)
        key, value = packed_kv.split(head_dim, dim=-1)
    else:
        # [batch, tokens, heads, head_dim], as models hold them.
        key, value = (torch.randn(num_seqs, length, num_heads, head_dim).to(dtype).to(device) for _ in range(2))
        key, value = key.transpose(1, 2), value.transpose(1, 2)
    query = torch.randn(num_seqs, length, num_heads, head_dim).to(dtype).to(device)
    lengths = torch.tensor([length, length - 20])
    starts = torch.tensor([0, length, 2 * length - 20], dtype=torch.int32)
    queries = torch.cat([query[0], query[1, : length - 20]])
    # Memory past a sequence's end may hold anything.
    key[1, :, length - 20 :] = float("nan")
    value[1, :, length - 20 :] = float("nan")
    full = Inputs(
        query=queries,
        key=key,
        value=value,
        kv_cache=torch.cat([key, value], dim=-1),
        block_table=torch.arange(num_seqs, dtype=torch.int32, device=device)[:, None],
        seq_lens=lengths.int().to(device),
        query_start_loc=starts.to(device),
        slot_mapping=lengths,
        scale=head_dim**-0.5,
    )
    config = None if not use_tma else PrefillConfig(64, 1, 64, 4, 2, use_tma=True)
    for causal in (True, False):
        out, lse = prefill_attention(
            queries,
            key,
            value,
            full.paged,
            full.tiles(64),
            full.scale,
            causal=causal,
            out=poisoned_like(queries),
            config=config,
        )
        assert_attention_close(out, lse, *reference_attention(full, causal=causal), dtype)


@gpu
def test_pages_past_two_to_the_31_elements(device: torch.device) -> None:
    batch = Case((200,), (500,), head_dim=128, page_size=128, block_size=128, dtype=BF16).draw(device)
    num_pages = 2**31 // batch.kv_cache[0].numel() + 10
    large = torch.zeros(num_pages, *batch.kv_cache.shape[1:], dtype=BF16, device=device)
    used = batch.block_table[:, :-1].long()
    table = batch.block_table.clone()
    table[:, :-1] = num_pages - 1 - torch.arange(used.shape[1], device=device, dtype=torch.int32)
    large[table[0, :-1].long()] = batch.kv_cache[used[0]]
    moved = replace(batch, kv_cache=large, block_table=table)
    for config in (None, PrefillConfig(64, 1, 64, 4, 2, use_tma=False)):
        result = prefill(moved, moved.tiles(128), config=config)
        assert_attention_close(*result, *reference_attention(batch), BF16)


def test_a_step_without_tokens(device: torch.device) -> None:
    batch = Case((0,), (5,)).draw(device)
    out, lse = prefill(batch, batch.tiles(64))
    assert out.shape == (0, 4, 64)
    assert lse.shape == (4, 0)
