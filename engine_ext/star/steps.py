"""Steps of requests whose keys are on several hosts: their passes, and what all hosts agree on before them."""

from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from typing import Any

import torch
from farspan.engine_ext.config import DensePrefill, Prefill
from farspan.engine_ext.errors import StarError
from farspan.engine_ext.pass_maker import PassMaker, effective_prefill
from farspan.engine_ext.passes import Part, Pass, StagedPages
from farspan.engine_ext.requests import RequestSource
from farspan.engine_ext.selection.crossover import AttentionSize
from farspan.engine_ext.star.cold_pieces import ColdPieces
from farspan.engine_ext.star.exchange import Exchange, current, exchange_of, result_bytes
from farspan.engine_ext.star.keys import GatheredKeys, SharedAnchor
from farspan.engine_ext.star.pieces import Piece, batch_of, digest_of, in_width, moved_rows
from farspan.engine_ext.star.shard import StarShard, digest_of_text
from farspan.engine_ext.star.windows import WindowShard
from farspan.kernels.batch import PagedBatch
from farspan.kernels.tiles import to_device


@dataclass(frozen=True)
class StarSteps:
    """Makes the passes of a step for the layers of one KV cache group."""

    maker: PassMaker
    requests: RequestSource
    size: AttentionSize
    num_layers: int
    page_size: int
    row: tuple[int, int, int]
    """Of a row's partial result in one layer: query heads, head dim, bytes of a component."""
    page_bytes: int
    """A page's keys and values in one layer."""
    cold: ColdPieces | None = None
    """None where no KV head is cold; `maker` has the others, which may be none."""

    def count_bytes(self, exchange: Exchange, num_rows: int) -> None:
        """Note what a step's exchanges of all layers bring from the other hosts."""
        exchange.num_bytes += result_bytes(num_rows, *self.row) * self.num_layers * (exchange.num_hosts - 1)

    def passes(self, common: Any, pieces: list[Piece], staged: list[tuple[StagedPages, ...]]) -> list[Pass]:
        """Passes of adjacent pieces, hot heads before cold ones; what is staged for them is added to `staged`.

        The order and number of exchanges are the same on all hosts, whatever is in slots there.
        """
        prefills = self.requests.prefills(common)
        missing = self.requests.missing(common) if self.cold is not None else ()

        def kind(piece: Piece) -> tuple[Prefill, bool, int, int, int]:
            shard = piece.shard
            # What is staged is one request's.
            request = 0 if self.cold is None else piece.request
            if piece.segment.is_query:
                return DensePrefill(), True, shard.num_hosts, shard.query_host, request
            prefill = effective_prefill(prefills[piece.request], piece.query_len, piece.kv_len, None, self.size)
            return prefill, False, 0, 0, request

        passes = []
        for (prefill, is_query, num_hosts, _, request), members in groupby(pieces, key=kind):
            run = list(members)
            made = []
            if self.maker.num_kv_heads > 0:
                made.append(self.maker.star(prefill, run, batch_of(run, common.block_table_tensor, self.page_size)))
            if self.cold is not None:
                made += self.cold.passes(prefill, run, misses_pages=missing[request], staged=staged)
            exchange = exchange_of(num_hosts, run[0].shard.rank) if is_query else None
            if exchange is not None:
                exchange.agree(digest_of(run))
                self.count_bytes(exchange, sum(piece.query_len for piece in run))
                *others, last = made
                made = [replace(each, part=Part(0, 1, exchange, is_last=False)) for each in others]
                made.append(replace(last, part=Part(0, 1, exchange)))
            passes += made
        return passes

    def shared_anchor(self, common: Any, request: int, shard: StarShard, end: int) -> SharedAnchor | None:
        """The exchange of a request's anchor, in the step in which its host has it, or needs it, for the first time.

        end: of the request's tokens in this step.
        """
        exchange = current()
        if exchange is None or exchange.anchor_of != shard.name or (shard.first_block == 0 and end < shard.anchor_len):
            return None
        exchange.anchor_of = None
        exchange.agree(digest_of_text(f"{shard.name} anchor"))
        num_pages = shard.anchor_len // self.page_size
        if exchange.rank != 0:
            exchange.num_bytes += num_pages * self.page_bytes * self.num_layers
        return SharedAnchor(exchange, common.block_table_tensor[request, :num_pages].long())

    def window(
        self, common: Any, request: int, shard: WindowShard, begin: int
    ) -> tuple[list[Pass], list[tuple[slice, int]], GatheredKeys]:
        """A step of context tokens that see all before them, on all hosts: no other request is in it.

        begin: of the request's tokens in this step.
        """
        assert common.seq_lens_cpu_upper_bound is not None
        end = int(common.seq_lens_cpu_upper_bound[request])
        exchange = exchange_of(shard.num_hosts, shard.rank)
        assert exchange is not None
        ends = exchange.agree(shard.window_digest(begin), end)
        pieces = shard.chunk_pieces(begin, end)
        places = shard.places()[: -(-max(true_end for _, true_end in pieces) // self.page_size)]
        is_alone = request == 0 and int(common.query_start_loc_cpu[common.num_reqs]) == end - begin
        if not is_alone or not shard.is_start(ends):
            raise StarError(
                f"host {shard.rank} has to compute tokens [{begin}, {end}) of its {shard.local_len} before other hosts "
                "have what they see, or beside another request. Leave out engine options that shorten the chunks of a "
                "prompt, such as long_prefill_token_threshold."
            )
        num_pages = [-(-each // self.page_size) for each in ends]
        most = max(num_pages)
        own = torch.arange(most, device=self.maker.device).clamp_(max=num_pages[shard.rank] - 1)
        width = exchange.num_hosts * common.block_table_tensor.shape[1]
        table = in_width(to_device([[rank * most + page for rank, page in places]], self.maker.device), width)
        table = table.repeat(len(pieces), 1)
        prefill = self.requests.prefills(common)[0]
        passes: list[Pass] = []
        first_row = first = 0

        def kind(piece: tuple[int, int]) -> Prefill:
            return effective_prefill(prefill, piece[0], piece[1], shard.context_len, self.size)

        for each, members in groupby(pieces, key=kind):
            run = list(members)
            starts = list(accumulate((length for length, _ in run), initial=0))
            true_ends = [true_end for _, true_end in run]
            numbers = to_device([starts, [*true_ends, 0]], self.maker.device)
            batch = PagedBatch(
                query_start_loc=numbers[0],
                kv_lens=numbers[1, :-1],
                block_table=table[first : first + len(run)],
                max_query_len=max(length for length, _ in run),
                max_kv_len=max(true_ends),
            )
            passes.append(self.maker.prefill(each, batch, starts, true_ends, first_row, turns=False))
            first_row, first = first_row + starts[-1], first + len(run)
        exchange.num_bytes += (exchange.num_hosts - 1) * most * self.page_bytes * self.num_layers
        keys = GatheredKeys(exchange, common.block_table_tensor[0, own].long())
        moved = moved_rows(0, shard, begin, end)
        return passes, moved, keys
