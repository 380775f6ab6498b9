"""Choose blocks by the exact attention of a few sampled rows of every span of query tiles, on the device.

Two launches: the first streams the keys past the sampled rows once and leaves the log-sum of every row and block, the
second turns them into block masses, finds the fewest blocks that keep the mass asked for, and writes the lists.
Masses are whole numbers, whose sums do not depend on their order: the same span has the same list in every chunk and
batch. `tile_rows_reference` says in PyTorch what is computed.
"""

import torch
import triton
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.flex.estimate import turn_shapes
from farspan.kernels.flex.spans import MASS_UNIT, SPAN_MULTIPLE, Spans
from farspan.kernels.flex.tile_rows_kernel import choice_kernel, log_sums_kernel
from farspan.kernels.flex.types import Budget, TileSelection
from farspan.kernels.prefill import LOG2_E, has_row_view, row_descriptor
from farspan.kernels.rotary_turn import Turn
from farspan.kernels.tiles import BlockLists, PrefillTiles
from farspan.kernels.tuning import (
    TILE_ROWS_MAX_BYTES,
    TILE_ROWS_MIN_SPLIT_BLOCKS,
    TILE_ROWS_PROGRAMS,
    TileRowsConfig,
    device_capability,
    tile_rows_config,
)
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCKS_AT_ONCE = 128
"""Blocks whose log-sums are added up at a time, in this order whatever the length."""
CHOICE_WARPS = 8


def tile_row_lists(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    tiles: PrefillTiles,
    spans: Spans,
    scale: float,
    budget: Budget,
    *,
    turn: Turn | None = None,
    config: TileRowsConfig | None = None,
) -> TileSelection:
    """Choose per span and head the fewest KV blocks that keep `budget.gamma` of the sampled rows' attention mass.

    query: [num_tokens, num_q_heads, head_dim] with a contiguous last axis, on the GPU; the heads that `kv` serves.
    batch: every request has a chunk, whose keys are in their pages already. tiles, spans: of all of them.
    scale: factor on the logits, above 0. turn: keys below its bound meet the turned query.
    A list has the first block, those of its span up to its own tile, and the chosen ones before the span; tiles in no
    span list all that they may see. `budget.tau` is not used.
    """
    num_heads, head_dim = query.shape[1:]
    group = num_heads // kv.num_kv_heads
    rule, num_spans, num_blocks = spans.rule, spans.num_spans, tiles.max_kv_blocks
    assert query.stride(2) == kv.pages.stride(3) == batch.block_table.stride(1) == 1
    assert scale > 0
    assert num_heads % kv.num_kv_heads == 0
    assert group % budget.heads_per_list == 0
    key_pages = kv.keys()
    if config is None:
        rows_of_memory = kv.page_size if has_row_view(key_pages) else 0
        config = tile_rows_config(
            head_dim,
            query.dtype,
            device_capability(query.device),
            block_size=tiles.block_size,
            keys_in_a_row=rows_of_memory,
        )
    ids = query.new_empty((num_heads // budget.heads_per_list, tiles.num_tiles, num_blocks), dtype=torch.int32)
    counts = query.new_empty(ids.shape[:2], dtype=torch.int32)
    kept = query.new_empty((num_heads, num_spans), dtype=torch.float32)
    selection = TileSelection(BlockLists(ids, counts), kept)
    # As many KV heads at a time as their log-sums have room for.
    bytes_per_kv_head = group * num_spans * rule.rows_per_span * num_blocks * 4
    heads_at_once = max(min(TILE_ROWS_MAX_BYTES // max(bytes_per_kv_head, 1), kv.num_kv_heads), 1)
    log_sums = query.new_empty(heads_at_once * bytes_per_kv_head // 4, dtype=torch.float32)
    mass = query.new_empty(heads_at_once * group * num_spans * num_blocks, dtype=torch.int32)

    # By the table's width, which an engine never changes (some have a column more): one kernel serves all prompts.
    most_blocks = max(num_blocks, batch.block_table.shape[1] * kv.page_size // tiles.block_size - 1, 32)
    padded = triton.next_power_of_2(most_blocks)

    def choose(
        query: torch.Tensor, keys: torch.Tensor, ids: torch.Tensor, counts: torch.Tensor, kept: torch.Tensor
    ) -> None:
        if num_spans > 0:
            stream_log_sums(
                query, keys, batch, spans, num_blocks, tiles.block_size, scale, turn, log_sums, config
            )  # fmt: skip
        choice_kernel[(num_spans + spans.num_cut_tiles, ids.shape[0])](
            log_sums,
            mass,
            spans.span_request,
            spans.span_index,
            spans.span_tile,
            spans.cut_tile,
            tiles.tile_block,
            ids,
            counts,
            kept,
            budget.gamma,
            num_spans,
            tiles.num_tiles,
            num_blocks,
            budget.min_blocks,
            budget.max_blocks,
            ROWS=rule.rows_per_span,
            TILES=rule.span_len // tiles.block_size,
            SHARED=budget.heads_per_list,
            PADDED=padded,
            UNIT=MASS_UNIT,
            AT_ONCE=BLOCKS_AT_ONCE,
            num_warps=CHOICE_WARPS,
        )

    if heads_at_once == kv.num_kv_heads:
        choose(query, key_pages, ids, counts, kept)
        return selection
    for first in range(0, kv.num_kv_heads, heads_at_once):
        end = min(first + heads_at_once, kv.num_kv_heads)
        heads = slice(first * group, end * group)
        lists = slice(heads.start // budget.heads_per_list, heads.stop // budget.heads_per_list)
        choose(query[:, heads], key_pages[:, first:end], ids[lists], counts[lists], kept[heads])
    return selection


def stream_log_sums(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    batch: PagedBatch,
    spans: Spans,
    num_blocks: int,
    block_size: int,
    scale: float,
    turn: Turn | None,
    log_sums: torch.Tensor,
    config: TileRowsConfig,
    num_splits: int | None = None,
) -> None:
    """Write [num_q_heads, num_spans, num_blocks, rows_per_span] float32 log-sums, base 2, to the front of `log_sums`.

    key_pages: [num_pages, num_kv_heads, page_size, head_dim]. Entries past a span's last block are undefined.
    """
    num_kv_heads, page_size, head_dim = key_pages.shape[1:]
    group, rows = query.shape[1] // num_kv_heads, spans.rule.rows_per_span
    segments = max(config.block_m // rows, 1)
    assert SPAN_MULTIPLE * group % segments == 0, (config, spans.rule, group)
    packs = spans.num_spans * group // segments
    if num_splits is None:
        most = max(num_blocks // TILE_ROWS_MIN_SPLIT_BLOCKS, 1)
        num_splits = min(-(-TILE_ROWS_PROGRAMS // (packs * num_kv_heads)), most)
    block_d = max(triton.next_power_of_2(head_dim), 16)
    stride_page, stride_head, stride_token, _ = key_pages.stride()
    key_source: torch.Tensor | TensorDescriptor = key_pages
    if config.use_tma:
        assert page_size % block_size == 0
        key_source = row_descriptor(key_pages, block_size, block_d)
        stride_page, stride_head = stride_page // stride_token, stride_head // stride_token
    log_sums_kernel[(packs * num_kv_heads * num_splits,)](
        query,
        key_source,
        batch.block_table,
        spans.span_request,
        spans.span_index,
        spans.span_row,
        *((query, query) if turn is None else (turn.cos, turn.sin)),
        log_sums,
        scale * LOG2_E,
        0 if turn is None else turn.offset,
        spans.num_spans,
        num_blocks,
        num_splits,
        query.stride(0),
        query.stride(1),
        batch.block_table.stride(0),
        stride_page,
        stride_head,
        stride_token,
        GROUP=group,
        ROWS=rows,
        SPAN_LEN=spans.rule.span_len,
        BLOCK=block_size,
        BLOCK_M=max(config.block_m, rows),
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        PAGE_SIZE=page_size,
        USE_TMA=config.use_tma,
        **turn_shapes(turn),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
