"""Passes of cold heads over the pieces of a host's share: where they find their keys, and what is staged for them."""

from dataclasses import dataclass, replace

from farspan.engine_ext.config import Prefill
from farspan.engine_ext.offload.cache import ColdCache
from farspan.engine_ext.pass_maker import PassMaker
from farspan.engine_ext.passes import Pass, StagedPages
from farspan.engine_ext.star.pieces import Piece, batch_of
from farspan.kernels.batch import PagedBatch
from farspan.kernels.tiles import to_device


@dataclass(frozen=True)
class ColdPieces:
    """Makes the passes of the cold heads of one KV cache group, whose layers have as many of them each."""

    cache: ColdCache
    maker: PassMaker
    """Of all cold heads of a layer."""
    layer_name: str
    """Any of the group's."""

    def passes(
        self, prefill: Prefill, run: list[Piece], *, misses_pages: bool, staged: list[tuple[StagedPages, ...]]
    ) -> list[Pass]:
        """Passes of adjacent pieces of one request, once the tables of the step are written.

        misses_pages: whether a page of the request is in no slot. What has to be staged is added to `staged`.
        """
        cache = self.cache
        if all(piece.query_len == 1 for piece in run):
            made = self.maker.star(prefill, run, batch_of(run, cache.entries, cache.sizes.page_size))
            return [replace(made, keys="both")]
        if not misses_pages or all(piece.kv_len == 0 for piece in run):
            made = self.maker.star(prefill, run, batch_of(run, cache.entries, cache.sizes.page_size))
            return [replace(made, keys="slots")]
        keys, batch = self.stage(run)
        staged.append((keys,))
        passes = []
        for heads in cache.groups_of(cache.layers[self.layer_name]):
            maker = replace(self.maker, num_kv_heads=heads.stop - heads.start, first_kv_head=heads.start)
            passes.append(replace(maker.star(prefill, run, batch), keys=keys))
        return passes

    def stage(self, run: list[Piece]) -> tuple[StagedPages, PagedBatch]:
        """The pages that any of the pieces sees, each once, and the pieces' batch on the staged pages.

        They are no more than the request has, for which a buffer has room.
        """
        entries, page_size = self.cache.entries, self.cache.sizes.page_size
        ranges = [pages for piece in run for pages in piece.pages(page_size)]
        pages = sorted({page for first, stop in ranges for page in range(first, stop)})
        assert self.cache.staging is not None
        assert len(pages) <= self.cache.staging.num_pages, "an engine with star has buffers for a whole request"
        (request,) = {piece.request for piece in run}
        places = [0] * entries.shape[1]
        for place, page in enumerate(pages):
            places[page] = place
        keys = StagedPages(entries[request].index_select(0, to_device([pages], entries.device)[0]))
        alone = [replace(piece, request=0) for piece in run]
        return keys, batch_of(alone, to_device([places], entries.device), page_size)
