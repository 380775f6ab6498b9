"""A step's tokens of Star requests, cut where their keys change: each piece is a request of its own to the kernels.

Its keys are some of the request's pages, taken out of the block table in order. Keys stand at their true positions, so
that it makes no difference where in the piece's table their pages are.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from farspan.engine_ext.star.shard import Segment, Shard
from farspan.kernels.batch import PagedBatch
from farspan.kernels.tiles import to_device


@dataclass(frozen=True)
class Piece:
    """Adjacent rows of a step with the same keys before their own stretch."""

    request: int
    """Of vLLM's batch."""
    first_row: int
    """Of the step."""
    shard: Shard
    segment: Segment

    @property
    def query_len(self) -> int:
        return self.segment.end - self.segment.begin

    @property
    def kv_len(self) -> int:
        return sum(stop - start for start, stop in self.segment.keys)

    def pages(self, page_size: int) -> list[tuple[int, int]]:
        """Ranges of the request's pages that hold the keys, by their places in its row of the block table."""
        return [(start // page_size, -(-stop // page_size)) for start, stop in self.segment.keys]

    @property
    def distance(self) -> int:
        """From the first row's position in the request to its true one."""
        moved = list(self.shard.distances(self.segment.begin, self.segment.begin + 1))
        return moved[0][2] if moved else 0

    @property
    def chunk_end(self) -> int:
        """Position after the last query, where keys count from 0; what sees all keys counts for itself."""
        return self.kv_len if self.segment.is_causal else self.query_len


def cut_chunk(request: int, first_row: int, shard: Shard, begin: int, end: int) -> list[Piece]:
    """The pieces of a request's tokens [begin, end), which are rows of the step from `first_row` on."""
    return [Piece(request, first_row + segment.begin - begin, shard, segment) for segment in shard.segments(begin, end)]


def moved_rows(first_row: int, shard: Shard, begin: int, end: int) -> list[tuple[slice, int]]:
    """Rows of a request's tokens [begin, end) that do not stand at their true positions, with the distance to add."""
    to_row = first_row - begin
    return [(slice(first + to_row, last + to_row), distance) for first, last, distance in shard.distances(begin, end)]


def pages_of(pieces: Sequence[Piece], block_table: torch.Tensor, page_size: int) -> torch.Tensor:
    """The pages of each piece's keys, [num_pieces, most pages of any, at least 1] int32.

    block_table: [num_reqs, max_pages] int32 of vLLM's batch, on the device.
    """
    columns = [[page for start, stop in piece.pages(page_size) for page in range(start, stop)] for piece in pieces]
    width = max(1, *map(len, columns)) if len(columns) > 1 else max(1, len(columns[0]))
    table = to_device(
        [[piece.request, *row, *[0] * (width - len(row))] for piece, row in zip(pieces, columns, strict=True)],
        block_table.device,
    ).long()
    return block_table[table[:, :1], table[:, 1:]]


def in_width(table: torch.Tensor, width: int) -> torch.Tensor:
    """The table with `width` columns, the further ones 0: kernels differ by the width, which must stay the engine's.

    table: [num_reqs, at most width] int32.
    """
    padded = table.new_zeros(len(table), width)
    padded[:, : table.shape[1]] = table
    return padded


def batch_of(pieces: Sequence[Piece], block_table: torch.Tensor, page_size: int) -> PagedBatch:
    """Pieces with adjacent rows as a batch; all of them causal, or none, or of one row each.

    block_table: as in `pages_of`; the batch's has its width.
    """
    starts = [0]
    for piece in pieces:
        starts.append(starts[-1] + piece.query_len)
    kv_lens = [piece.kv_len for piece in pieces]
    numbers = to_device([starts, [*kv_lens, 0], [0] * len(starts)], block_table.device)
    return PagedBatch(
        query_start_loc=numbers[0],
        kv_lens=numbers[1, :-1],
        block_table=in_width(pages_of(pieces, block_table, page_size), block_table.shape[1]),
        max_query_len=max(piece.query_len for piece in pieces),
        max_kv_len=max(kv_lens),
        first_pos=None if pieces[0].segment.is_causal else numbers[2, :-1],
    )


def digest_of(pieces: Sequence[Piece]) -> bytes:
    """What all hosts must agree on before they compute these pieces of queries together; at most 7 bytes."""
    digest = hashlib.blake2b(digest_size=7)
    for piece in pieces:
        digest.update(piece.shard.step_digest(piece.segment.begin, piece.segment.end))
    return digest.digest()
