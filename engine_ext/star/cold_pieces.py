"""Passes of cold heads over the pieces of a host's share: where they find their keys, and what is staged for them."""

from dataclasses import dataclass, replace

from farspan.engine_ext.config import Prefill
from farspan.engine_ext.offload.heads import ColdHeads
from farspan.engine_ext.passes import Pass, StagedPages
from farspan.engine_ext.star.pieces import Piece, batch_of
from farspan.kernels.batch import PagedBatch
from farspan.kernels.tiles import to_device


@dataclass(frozen=True)
class ColdPieces:
    """Makes the passes of the cold heads of one KV cache group."""

    heads: ColdHeads

    def passes(
        self, prefill: Prefill, run: list[Piece], *, misses_pages: bool, staged: list[tuple[StagedPages, ...]]
    ) -> list[Pass]:
        """Passes of adjacent pieces of one request, once the tables of the step are written.

        misses_pages: whether a page of the request is in no slot. What has to be staged is added to `staged`.
        """
        cache, maker = self.heads.cache, self.heads.maker
        if all(piece.query_len == 1 for piece in run):
            made = maker.star(prefill, run, batch_of(run, cache.entries, cache.sizes.page_size))
            return [replace(made, keys="both")]
        if not misses_pages or all(piece.kv_len == 0 for piece in run):
            made = maker.star(prefill, run, batch_of(run, cache.entries, cache.sizes.page_size))
            return [replace(made, keys="slots")]
        keys, batch = self.stage(run)
        staged.append((keys,))
        return [replace(each.star(prefill, run, batch), keys=keys) for each in self.heads.group_makers(keys)]

    def stage(self, run: list[Piece]) -> tuple[StagedPages, PagedBatch]:
        """The pages that any of the pieces sees, each once, and the pieces' batch on the staged pages.

        They are no more than the request has, for which a buffer has room.
        """
        cache = self.heads.cache
        entries, page_size = cache.entries, cache.sizes.page_size
        ranges = [pages for piece in run for pages in piece.pages(page_size)]
        pages = sorted({page for first, stop in ranges for page in range(first, stop)})
        assert cache.staging is not None
        assert len(pages) <= cache.staging.num_pages, "an engine with star has buffers for a whole request"
        (request,) = {piece.request for piece in run}
        places = [0] * entries.shape[1]
        for place, page in enumerate(pages):
            places[page] = place
        keys = StagedPages(entries[request].index_select(0, to_device([pages], entries.device)[0]))
        alone = [replace(piece, request=0) for piece in run]
        return keys, batch_of(alone, to_device([places], entries.device), page_size)
