"""Passes of one KV cache group: how a chunk prefills, how it is cut into tiles, and on which rows it is measured."""

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal

import torch
from farspan.engine_ext.config import BlockSparsePrefill, DensePrefill, FlexPrefill, Prefill
from farspan.engine_ext.passes import Decode, Dense, DenseKernel, Pass, SampledRows, Sparse
from farspan.engine_ext.selection.crossover import AttentionSize, sparse_pays
from farspan.engine_ext.selection.methods import FORCED_BLOCKS, TILE_ROWS_RULE
from farspan.engine_ext.splits import plan_splits
from farspan.engine_ext.star.pieces import Piece
from farspan.kernels.batch import PagedBatch
from farspan.kernels.block_patterns import static_block_lists
from farspan.kernels.decode import MAX_DECODE_REQUESTS
from farspan.kernels.decode_workspace import DecodeWorkspace
from farspan.kernels.flex.coverage import sample_places
from farspan.kernels.flex.spans import make_spans
from farspan.kernels.tiles import BlockLists, PrefillTiles, make_prefill_tiles, to_device

FallbackReason = Literal["crossover", "min_seq_len", "min_chunk_len"]

TILE_SIZE = 128
"""Tokens of a query tile and of a KV block where the method does not say otherwise."""


def effective_prefill(
    prefill: Prefill, query_len: int, kv_len: int, prompt_len: int | None, size: AttentionSize
) -> Prefill:
    """How a chunk prefills: densely where flex would not pay.

    kv_len: keys up to the chunk's end; prompt_len: tokens of the whole prompt, None where nobody knows.
    size: of the layers. It depends on nothing else, so that the same chunk of the same prompt prefills alike in every
    batch.
    """
    return DensePrefill() if fallback_reason(prefill, query_len, kv_len, prompt_len, size) else prefill


def fallback_reason(
    prefill: Prefill, query_len: int, kv_len: int, prompt_len: int | None, size: AttentionSize
) -> FallbackReason | None:
    """Why a chunk of flex prefills densely; None where it is sparse, and for other methods, which have no fallback.

    The arguments are those of `effective_prefill`.
    """
    if not isinstance(prefill, FlexPrefill):
        return None
    if prefill.min_seq_len is None and prefill.min_chunk_len is None:
        return None if sparse_pays(size, query_len, kv_len) else "crossover"
    whole = kv_len if prompt_len is None else max(prompt_len, kv_len)
    if whole < (prefill.min_seq_len or 0):
        return "min_seq_len"
    return "min_chunk_len" if query_len < (prefill.min_chunk_len or 0) else None


@dataclass(frozen=True)
class PassMaker:
    """Makes passes for the layers of one KV cache group."""

    num_kv_heads: int
    dense_kernel: DenseKernel
    num_sms: int
    workspace: DecodeWorkspace | None
    has_turn: bool
    device: torch.device
    first_kv_head: int = 0
    """The passes are for the `num_kv_heads` KV heads of a layer from this one on."""

    @property
    def kv_heads(self) -> slice:
        return slice(self.first_kv_head, self.first_kv_head + self.num_kv_heads)

    def decode(self, batch: PagedBatch, first_row: int = 0, num_rows: int | None = None) -> Pass:
        """The pass of requests that decode, their first row `first_row` of the step.

        num_rows: of all requests, which may have `batch.max_query_len` tokens each; None where each has the one row of
            its number.
        """
        splits = plan_splits(batch.num_reqs, self.num_kv_heads, batch.max_kv_len, self.num_sms)
        query_len = 1 if num_rows is None else batch.max_query_len
        return Pass(
            rows=slice(first_row, first_row + (batch.num_reqs if num_rows is None else num_rows)),
            kv_heads=self.kv_heads,
            batch=batch,
            work=Decode(splits, self.workspace, query_len=query_len),
            turns=self.has_turn,
        )

    def prefill(
        self,
        prefill: Prefill,
        batch: PagedBatch,
        query_start_loc: list[int],
        chunk_ends: list[int],
        first_row: int,
        *,
        turns: bool,
    ) -> Pass:
        """The pass of adjacent requests that prefill alike.

        query_start_loc, chunk_ends: of the batch, on the host, the first one from 0; first_row: of the step.
        """
        work: Dense | Sparse
        if isinstance(prefill, DensePrefill):
            kernel = "triton" if turns and self.dense_kernel == "fa3" else self.dense_kernel
            tiles = None
            if kernel == "triton":
                tiles = make_prefill_tiles(query_start_loc, chunk_ends, TILE_SIZE, self.device)
            work = Dense(kernel, tiles)
        else:
            block_size = prefill.block_size if isinstance(prefill, BlockSparsePrefill) else TILE_SIZE
            tiles = make_prefill_tiles(query_start_loc, chunk_ends, block_size, self.device)
            samples = spans = None
            if isinstance(prefill, FlexPrefill):
                if prefill.coverage_rows > 0:
                    samples = self.sample(batch, query_start_loc, chunk_ends, prefill.coverage_rows, prefill)
                if prefill.selection == "tile_rows":
                    spans = make_spans(query_start_loc, chunk_ends, tiles, TILE_ROWS_RULE)
            work = Sparse(prefill, tiles, shared_lists(prefill, tiles), samples, spans)
        return Pass(
            rows=slice(first_row, first_row + query_start_loc[-1]),
            kv_heads=self.kv_heads,
            batch=batch,
            work=work,
            turns=turns,
        )

    def star(self, prefill: Prefill, pieces: list[Piece], batch: PagedBatch) -> Pass:
        """The pass of pieces with adjacent rows, all in one phase; those of phase 2 leave out the exchange."""
        first_row = pieces[0].first_row
        is_causal = pieces[0].segment.is_causal
        if all(piece.query_len == 1 for piece in pieces):
            # One that sees all its keys needs no position, with which another kernel would be compiled.
            made = self.decode(replace(batch, first_pos=None), first_row)
        else:
            starts = list(accumulate((piece.query_len for piece in pieces), initial=0))
            ends = [piece.chunk_end for piece in pieces]
            # FlashAttention 3 leaves undefined what a query without keys gives.
            maker = self
            if self.dense_kernel == "fa3" and any(piece.kv_len == 0 for piece in pieces):
                maker = replace(self, dense_kernel="triton")
            made = maker.prefill(prefill, batch, starts, ends, first_row, turns=False)
        return replace(made, is_causal=is_causal)

    def sample(
        self,
        batch: PagedBatch,
        query_start_loc: list[int],
        chunk_ends: list[int],
        rows_per_request: int,
        prefill: FlexPrefill | None = None,
    ) -> SampledRows:
        """Rows of every request's chunk, each with the keys up to its own.

        Fewer rows where many requests would have more than a launch takes.
        prefill: how the chunks choose blocks; with it, rows are moved off those that choose, and those whose lists
        leave nothing out are marked.
        """
        rows_per_request = min(rows_per_request, max(MAX_DECODE_REQUESTS // batch.num_reqs, 1))
        rows, lens, choices = [], [], []
        for (start, end), chunk_end in zip(pairwise(query_start_loc), chunk_ends, strict=True):
            first_pos = chunk_end - (end - start)
            for place in sample_places(end - start, rows_per_request):
                has_choice = True
                if prefill is not None:
                    place, has_choice = other_row(prefill, first_pos, place, chunk_end)
                rows.append(start + place)
                lens.append(first_pos + place + 1)
                choices.append(int(has_choice))
        both = to_device([rows, lens, list(range(len(rows))), choices], self.device)
        starts = torch.arange(len(rows) + 1, dtype=torch.int32, device=self.device)
        row_batch = PagedBatch(
            query_start_loc=starts,
            kv_lens=both[1],
            block_table=batch.block_table.repeat_interleave(rows_per_request, dim=0),
            max_query_len=1,
            max_kv_len=max(lens),
        )
        splits = plan_splits(len(rows), self.num_kv_heads, row_batch.max_kv_len, self.num_sms)
        return SampledRows(both[0], row_batch, splits, both[3] > 0 if prefill is not None else None)


def other_row(prefill: FlexPrefill, first_pos: int, place: int, chunk_end: int) -> tuple[int, bool]:
    """A row of the chunk [first_pos, chunk_end) that did not choose blocks, near the one at `place`.

    Returns its place, and whether its list may leave blocks out; False too where all rows of the chunk chose.
    """
    query_len, min_blocks = chunk_end - first_pos, -(-prefill.min_budget // TILE_SIZE)
    if prefill.selection == "flexprefill":
        num_others = query_len - TILE_SIZE
        if num_others <= 0:
            return place, False
        place = place * num_others // query_len
        return place, (first_pos + place) // TILE_SIZE + 1 > max(min_blocks, FORCED_BLOCKS)
    rule = TILE_ROWS_RULE
    span, at = divmod(first_pos + place, rule.span_len)
    if query_len > 1 and at in chosen_places(span):
        # Neighbours never choose both.
        place += 1 if place + 1 < query_len else -1
        span, at = divmod(first_pos + place, rule.span_len)
    is_whole = first_pos <= span * rule.span_len and (span + 1) * rule.span_len <= chunk_end
    # The first block, and those of the span.
    forced = 1 + rule.span_len // TILE_SIZE
    return place, is_whole and (first_pos + place) // TILE_SIZE + 1 > max(min_blocks, forced)


@lru_cache(maxsize=4096)
def chosen_places(span: int) -> frozenset[int]:
    """The places within a span of the rows that choose its blocks by tile rows."""
    return frozenset(TILE_ROWS_RULE.places(torch.tensor(span)).tolist())


def shared_lists(prefill: FlexPrefill | BlockSparsePrefill, tiles: PrefillTiles) -> BlockLists | None:
    """The lists of a named pattern, which all layers and heads share."""
    if not isinstance(prefill, BlockSparsePrefill) or prefill.pattern == "file":
        return None
    return static_block_lists(
        tiles,
        prefill.pattern,
        sink_blocks=prefill.sink_blocks,
        local_blocks=prefill.local_blocks,
        stride=prefill.stride,
    )
