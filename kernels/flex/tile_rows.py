"""Choose blocks by the exact attention of a few sampled rows of every span of query tiles, on the device.

Two launches: the first streams the keys past the sampled rows once and leaves the log-sum of every row and block, the
second turns them into block masses, finds how many blocks it takes for each half of the rows to keep the mass asked for
by the other half's choice, and writes the lists.
Masses are whole numbers, whose sums do not depend on their order: the same span has the same list in every chunk and
batch. `tile_rows_reference` says in PyTorch what is computed.
"""

from dataclasses import dataclass

import torch
import triton
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.flex.estimate import turn_shapes
from farspan.kernels.flex.spans import MASS_UNIT, SPAN_MULTIPLE, SpanRule, Spans
from farspan.kernels.flex.tile_rows_kernel import choice_kernel, log_sums_kernel
from farspan.kernels.flex.types import Budget, TileSelection
from farspan.kernels.prefill import LOG2_E
from farspan.kernels.repeated_launch import RepeatedLaunch
from farspan.kernels.rotary_turn import Turn
from farspan.kernels.row_view import RowView, has_row_view, row_view
from farspan.kernels.tiles import BlockLists, PrefillTiles
from farspan.kernels.tuning import (
    TILE_ROWS_MAX_BYTES,
    TILE_ROWS_MIN_SPLIT_BLOCKS,
    TILE_ROWS_PROGRAMS,
    HopperLogSumsConfig,
    TileRowsConfig,
    device_capability,
    hopper_log_sums_config,
    tile_rows_config,
)

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
    config: TileRowsConfig | HopperLogSumsConfig | None = None,
) -> TileSelection:
    """Choose per span and head KV blocks that keep `budget.gamma` of the attention mass of rows that did not choose.

    The even sampled rows take their blocks down to some mass, and the odd ones too: the highest mass at which the rows
    of both keep gamma, on average, by the other's choice. The list has as many blocks as both took on average, the
    largest by the mean of all sampled rows, which keep gamma of it.

    query: [num_tokens, num_q_heads, head_dim] with a contiguous last axis, on the GPU; the heads that `kv` serves.
    batch: every request has a chunk, whose keys are in their pages already. tiles, spans: of all of them.
    scale: factor on the logits, that of stored keys included, above 0.
    turn: keys below its bound meet the turned query.
    A list has the first block, those of its span up to its own tile, and the chosen ones before the span; tiles in no
    span list all that they may see. `budget.tau` is not used.
    """
    key_pages = kv.keys
    kinds = (query.shape, query.stride(), query.dtype, key_pages.shape, key_pages.stride(), key_pages.dtype)
    turned = None if turn is None else (turn.cos.shape, turn.is_neox, turn.slope, turn.offset)
    on_rows = key_pages.data_ptr() % 16 == 0
    key = ("tile_rows", kinds, on_rows, turned, budget, config)
    made: _SpanLaunches | None = batch.launches.get(key)
    if made is None or made.spans is not spans or made.tiles is not tiles:
        made = _SpanLaunches(query, kv, batch, tiles, spans, budget, turn, config)
        batch.launches[key] = made
    ids = query.new_empty(made.ids_shape, dtype=torch.int32)
    counts = query.new_empty(made.ids_shape[:2], dtype=torch.int32)
    kept = query.new_empty(made.kept_shape, dtype=torch.float32)
    log_sums = query.new_empty(made.num_log_sums, dtype=torch.float32)
    mass = query.new_empty(made.num_masses, dtype=torch.int32)
    for part in made.parts:
        part_query, part_keys = (
            (query, key_pages) if part.is_all else (query[:, part.heads], key_pages[:, part.kv_heads])
        )
        if part.log_sums is not None:
            part.log_sums(part_query, part_keys, scale, turn, log_sums)
        lists = (ids, counts, kept)
        if not part.is_all:
            lists = (ids[part.lists], counts[part.lists], kept[part.heads])
        part.choice(log_sums, mass, *lists)
    return TileSelection(BlockLists(ids, counts), kept)


@dataclass(frozen=True)
class _Part:
    """The launches for some KV heads."""

    is_all: bool
    heads: slice
    kv_heads: slice
    lists: slice
    """Of the list heads."""
    log_sums: "LogSumsLaunch | None"
    """None where no chunk has a whole span."""
    choice: RepeatedLaunch


class _SpanLaunches:
    """What the layers of a step share in a call of `tile_row_lists`, whose arguments these are."""

    def __init__(
        self,
        query: torch.Tensor,
        kv: KVView,
        batch: PagedBatch,
        tiles: PrefillTiles,
        spans: Spans,
        budget: Budget,
        turn: Turn | None,
        config: TileRowsConfig | HopperLogSumsConfig | None,
    ) -> None:
        num_heads = query.shape[1]
        group = num_heads // kv.num_kv_heads
        rule, num_spans, num_blocks = spans.rule, spans.num_spans, tiles.max_kv_blocks
        assert query.stride(2) == kv.pages.stride(3) == batch.block_table.stride(1) == 1
        assert num_heads % kv.num_kv_heads == 0
        assert group % budget.heads_per_list == 0
        if config is None:
            config = log_sums_config(query, kv, spans.rule, tiles.block_size, turn)
        self.tiles, self.spans = tiles, spans
        self.ids_shape = (num_heads // budget.heads_per_list, tiles.num_tiles, num_blocks)
        self.kept_shape = (num_heads, num_spans)
        # As many KV heads at a time as their log-sums have room for.
        bytes_per_kv_head = group * num_spans * rule.rows_per_span * num_blocks * 4
        heads_at_once = max(min(TILE_ROWS_MAX_BYTES // max(bytes_per_kv_head, 1), kv.num_kv_heads), 1)
        self.num_log_sums = heads_at_once * bytes_per_kv_head // 4
        self.num_masses = heads_at_once * group * num_spans * 2 * num_blocks

        # By the table's width, which an engine never changes (some have a column more): one kernel serves all prompts.
        most_blocks = max(num_blocks, batch.block_table.shape[1] * kv.page_size // tiles.block_size - 1, 32)
        parts = []
        for first in range(0, kv.num_kv_heads, heads_at_once):
            kv_heads = slice(first, min(first + heads_at_once, kv.num_kv_heads))
            heads = slice(kv_heads.start * group, kv_heads.stop * group)
            lists = slice(heads.start // budget.heads_per_list, heads.stop // budget.heads_per_list)
            log_sums = None
            if num_spans > 0:
                part_query, part_keys = query[:, heads], kv.keys[:, kv_heads]
                log_sums = LogSumsLaunch(
                    part_query, part_keys, batch, spans, num_blocks, tiles.block_size, turn, config
                )  # fmt: skip
            choice = RepeatedLaunch(
                choice_kernel,
                (num_spans + spans.num_cut_tiles, lists.stop - lists.start),
                ("log_sums_ptr", "mass_ptr", "ids_ptr", "counts_ptr", "kept_ptr"),
                {
                    "span_request_ptr": spans.span_request,
                    "span_index_ptr": spans.span_index,
                    "span_tile_ptr": spans.span_tile,
                    "cut_tile_ptr": spans.cut_tile,
                    "tile_block_ptr": tiles.tile_block,
                    "gamma": budget.gamma,
                    "num_spans": num_spans,
                    "num_tiles": tiles.num_tiles,
                    "num_blocks": num_blocks,
                    "min_blocks": budget.min_blocks,
                    "max_blocks": budget.max_blocks,
                    "ROWS": rule.rows_per_span,
                    "TILES": rule.span_len // tiles.block_size,
                    "SHARED": budget.heads_per_list,
                    "PADDED": triton.next_power_of_2(most_blocks),
                    "UNIT": MASS_UNIT,
                    "AT_ONCE": BLOCKS_AT_ONCE,
                },
                num_warps=CHOICE_WARPS,
            )
            parts.append(_Part(heads_at_once == kv.num_kv_heads, heads, kv_heads, lists, log_sums, choice))
        self.parts = tuple(parts)


def log_sums_config(
    query: torch.Tensor, kv: KVView, rule: SpanRule, block_size: int, turn: Turn | None
) -> TileRowsConfig | HopperLogSumsConfig:
    """Choose the kernel of the pass over the keys, and its programs; arguments as in `tile_row_lists`."""
    head_dim, capability = query.shape[2], device_capability(query.device)
    has_rows = not kv.is_fp8 and has_row_view(kv.keys)
    config = None
    if has_rows and turn is None:
        config = hopper_log_sums_config(
            head_dim,
            query.dtype,
            capability,
            block_size=block_size,
            page_size=kv.page_size,
            rows_per_padded_spans=SPAN_MULTIPLE * rule.rows_per_span * (query.shape[1] // kv.num_kv_heads),
        )
    return config or tile_rows_config(
        head_dim, query.dtype, capability, block_size=block_size, keys_in_a_row=kv.page_size if has_rows else 0
    )


class LogSumsLaunch:
    """The pass over the keys, for the layers of a step."""

    def __init__(
        self,
        query: torch.Tensor,
        key_pages: torch.Tensor,
        batch: PagedBatch,
        spans: Spans,
        num_blocks: int,
        block_size: int,
        turn: Turn | None,
        config: TileRowsConfig | HopperLogSumsConfig,
        num_splits: int | None = None,
    ) -> None:
        """Take what all layers share.

        query: [num_tokens, num_q_heads, head_dim]; key_pages: [num_pages, num_kv_heads, page_size, head_dim].
        """
        self.rows: RowView | None = None
        """How the copy engine sees the keys; None where it is not used."""
        self.is_hopper = isinstance(config, HopperLogSumsConfig)
        if isinstance(config, HopperLogSumsConfig):
            assert turn is None
            # Loads Gluon, which other devices do without.
            from farspan.kernels.hopper.log_sums import hopper_log_sums_launch

            self.rows, self.launch = hopper_log_sums_launch(
                query, key_pages, batch, spans, num_blocks, config, num_splits
            )
            return
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
        if config.use_tma:
            assert page_size % block_size == 0
            self.rows = row_view(key_pages, block_size, block_d)
            stride_page, stride_head = stride_page // stride_token, stride_head // stride_token
        self.launch = RepeatedLaunch(
            log_sums_kernel,
            (packs * num_kv_heads * num_splits,),
            ("query_ptr", "key_source", "cos_ptr", "sin_ptr", "log_sums_ptr", "scale_log2"),
            {
                "block_table_ptr": batch.block_table,
                "span_request_ptr": spans.span_request,
                "span_index_ptr": spans.span_index,
                "span_row_ptr": spans.span_row,
                "turn_offset": 0 if turn is None else turn.offset,
                "num_spans": spans.num_spans,
                "num_blocks": num_blocks,
                "num_splits": num_splits,
                "stride_query_token": query.stride(0),
                "stride_query_head": query.stride(1),
                "stride_block_table": batch.block_table.stride(0),
                "stride_page": stride_page,
                "stride_head": stride_head,
                "stride_token": stride_token,
                "GROUP": group,
                "ROWS": rows,
                "SPAN_LEN": spans.rule.span_len,
                "BLOCK": block_size,
                "BLOCK_M": max(config.block_m, rows),
                "HEAD_DIM": head_dim,
                "BLOCK_D": block_d,
                "PAGE_SIZE": page_size,
                "USE_TMA": config.use_tma,
                **turn_shapes(turn),
                "PRECISION": "ieee" if query.dtype == torch.float32 else "tf32",
            },
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    def __call__(
        self, query: torch.Tensor, key_pages: torch.Tensor, scale: float, turn: Turn | None, log_sums: torch.Tensor
    ) -> None:
        """Write [num_q_heads, num_spans, num_blocks, rows_per_span] float32, base 2, to the front of `log_sums`.

        Entries past a span's last block are undefined.
        """
        keys = key_pages if self.rows is None else self.rows.of(key_pages)
        assert scale > 0
        if self.is_hopper:
            self.launch(query, keys, log_sums, scale * LOG2_E)
            return
        cos, sin = (query, query) if turn is None else (turn.cos, turn.sin)
        self.launch(query, keys, cos, sin, log_sums, scale * LOG2_E)
