"""Where the rule of sampled rows looks: whole spans of a prompt at absolute positions, and a few query rows of each.

A span is one query tile or several, which share one choice of blocks. Its rows, like the span itself, are at places
that depend on its position in the prompt alone, so that the same blocks are chosen however the prompt is cut into
chunks. Tiles of spans that a chunk holds only in part have no choice: they are attended to in full.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from farspan.kernels.tiles import PrefillTiles, to_device

SPAN_MULTIPLE = 16
"""The spans of a request are padded to a multiple of this, so that no program has rows of two requests."""
MASS_UNIT = 2**30
"""What the mean mass of a span's rows adds up to: whole numbers, whose sums do not depend on their order."""


@dataclass(frozen=True)
class SpanRule:
    """How densely a prompt is sampled."""

    span_len: int
    """Query tokens of a span: the tiles' block size times a power of two."""
    rows_per_span: int
    """Sampled query rows of a span, a power of two from 2 up to half of it."""

    def places(self, span_index: torch.Tensor) -> torch.Tensor:
        """Places of the sampled rows within their spans, ascending: [*span_index.shape, rows_per_span] int64.

        span_index: any int tensor of absolute span numbers. One row lies in each of `rows_per_span` equal parts, at
        another place from part to part and span to span: heads that look a few tokens back keep all or nothing by that
        place alone.
        """
        part_len = self.span_len // self.rows_per_span
        part = torch.arange(self.rows_per_span, device=span_index.device)
        return part * part_len + (part * PART_STEP + span_index[..., None].long() * SPAN_STEP) % part_len


# Odd, so that the places within parts, whose length is a power of two, take every value in turn.
PART_STEP = 7
SPAN_STEP = 5


@dataclass(frozen=True)
class Spans:
    """The whole spans of the chunks of a batch, and the tiles that are in none."""

    rule: SpanRule
    span_request: torch.Tensor
    """[num_spans] int32: index into the requests of the batch, -1 for padding after a request's last span."""
    span_index: torch.Tensor
    """[num_spans] int32: absolute number of the span in its request; span s has positions from `s * span_len` on."""
    span_row: torch.Tensor
    """[num_spans] int32: row of the query that the span's first position has."""
    span_tile: torch.Tensor
    """[num_spans] int32: the first of its adjacent query tiles."""
    cut_tile: torch.Tensor
    """[num_cut_tiles] int32: tiles that are in no whole span."""

    @property
    def num_spans(self) -> int:
        return self.span_request.shape[0]

    @property
    def num_cut_tiles(self) -> int:
        return self.cut_tile.shape[0]


def make_spans(query_start_loc: list[int], chunk_ends: list[int], tiles: PrefillTiles, rule: SpanRule) -> Spans:
    """Find the spans of a batch on the host; arguments as in `make_prefill_tiles`, which made `tiles` of them."""
    block_size = tiles.block_size
    assert rule.span_len % block_size == 0
    assert rule.span_len % rule.rows_per_span == 0
    tiles_per_span = rule.span_len // block_size
    spans: list[tuple[int, int, int, int]] = []
    cut_tiles: list[int] = []
    first_tile = 0
    for request, ((start, end), chunk_end) in enumerate(zip(pairwise(query_start_loc), chunk_ends, strict=True)):
        if start == end:
            continue
        first_pos = chunk_end - (end - start)
        first_block, end_block = first_pos // block_size, -(-chunk_end // block_size)
        first_span = -(-first_pos // rule.span_len)
        end_span = max(chunk_end // rule.span_len, first_span)
        for index in range(first_span, end_span):
            row, block = start + index * rule.span_len - first_pos, index * tiles_per_span
            spans.append((request, index, row, first_tile + block - first_block))
        spans.extend([(-1, 0, 0, 0)] * (-len(spans) % SPAN_MULTIPLE))
        for block in range(first_block, end_block):
            if not first_span <= block // tiles_per_span < end_span:
                cut_tiles.append(first_tile + block - first_block)
        first_tile += end_block - first_block
    assert first_tile == tiles.num_tiles
    columns = [list(column) for column in zip(*spans, strict=True)] if spans else [[], [], [], []]
    num_spans = len(spans)
    everything = to_device([[*columns[0], *columns[1], *columns[2], *columns[3], *cut_tiles]], tiles.tile_block.device)
    parts = everything[0].split([num_spans] * 4 + [len(cut_tiles)])
    return Spans(rule, *parts)
