"""Decode of Star requests from buffers that stay where they are, as captured graphs that hold the exchange need.

Every step of such an engine with one token a request is a step of all hosts. What a replayed graph reads is only the
content of these buffers, written before it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from farspan.engine_ext.star.pieces import Piece, pages_of
from farspan.engine_ext.star.positions import Turns
from farspan.kernels.batch import PagedBatch
from farspan.kernels.tiles import to_device


class LockstepBuffers:
    """The batch of a decode step and the angles of its rows; rows without a request see no keys."""

    def __init__(self, max_num_reqs: int, max_pages: int, turns: Sequence[Turns], device: torch.device) -> None:
        """turns: of the layers, each once."""
        self.table = torch.zeros(max_num_reqs, max_pages, dtype=torch.int32, device=device)
        self.kv_lens = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.starts = torch.arange(max_num_reqs + 1, dtype=torch.int32, device=device)
        self.turns = turns
        self.distances: list[int] = []
        self.pages: list[Any] = []
        """What `table` was filled with: pages of requests, which stay while they decode."""
        for each in turns:
            each.make_rows(max_num_reqs)

    def batch(self, num_rows: int, max_kv_len: int) -> PagedBatch:
        """The first rows, as the kernels take them. max_kv_len: fixed, since a graph keeps it."""
        return PagedBatch(
            query_start_loc=self.starts[: num_rows + 1],
            kv_lens=self.kv_lens[:num_rows],
            block_table=self.table[:num_rows],
            max_query_len=1,
            max_kv_len=max_kv_len,
        )

    def fill(self, pieces: Sequence[Piece], num_rows: int, block_table: torch.Tensor, page_size: int) -> None:
        """Write a step of pieces of one token each, the first rows of it; rows behind them see no keys.

        block_table: as in `pages_of`.
        """
        assert [piece.first_row for piece in pieces] == list(range(len(pieces)))
        self.kv_lens[len(pieces) : num_rows].zero_()
        if not pieces:
            return
        pages = [(piece.request, piece.shard.name, piece.pages(page_size)) for piece in pieces]
        if pages != self.pages:
            self.pages = pages
            table = pages_of(pieces, block_table, page_size)
            self.table[: len(pieces), : table.shape[1]].copy_(table)
        lens = to_device([[piece.kv_len for piece in pieces]], self.kv_lens.device)
        self.kv_lens[: len(pieces)].copy_(lens[0])
        distances = [piece.distance for piece in pieces]
        if distances != self.distances:
            self.distances = distances
            for each in self.turns:
                each.fill_rows(distances)

    def forget(self) -> None:
        """Requests may have other pages from here on, as after a step with a prompt."""
        self.pages = []
