"""From vLLM's batch to passes: built once per step, on the host, without waiting for the device.

The batch is split by one rule: the leading requests with at most `reorder_batch_threshold` query tokens are decodes,
all others prefill. vLLM puts them first. The threshold is 1, or, with speculative decoding, what a request has whose
drafts are all verified in one step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby, pairwise
from typing import Any

import torch
from farspan.engine_ext.config import DensePrefill, FarspanConfig
from farspan.engine_ext.errors import StarError
from farspan.engine_ext.launch import choose_dense_kernel
from farspan.engine_ext.layers import make_layer_contexts
from farspan.engine_ext.offload.cache import CacheStep, ColdCache
from farspan.engine_ext.offload.heads import ColdHeads
from farspan.engine_ext.pass_maker import PassMaker, effective_prefill
from farspan.engine_ext.passes import Decode, Part, Pass, StagedPages, StepMetadata
from farspan.engine_ext.requests import source_of
from farspan.engine_ext.runs import ChunkKind, HostChunks, Run, count_decodes
from farspan.engine_ext.selection.crossover import AttentionSize, sparse_kernel_of
from farspan.engine_ext.splits import most_parts, num_multiprocessors
from farspan.engine_ext.star.cold_pieces import ColdPieces
from farspan.engine_ext.star.exchange import current as current_exchange
from farspan.engine_ext.star.exchange import exchange_of
from farspan.engine_ext.star.lockstep import LockstepBuffers
from farspan.engine_ext.star.pieces import Piece, cut_chunk, digest_of, moved_rows
from farspan.engine_ext.star.shard import Shard, StarShard
from farspan.engine_ext.star.steps import StarSteps
from farspan.engine_ext.star.windows import WindowShard
from farspan.engine_ext.support import config_of, max_decode_len
from farspan.kernels.batch import PagedBatch
from farspan.kernels.decode_workspace import make_decode_workspace
from farspan.kernels.tiles import to_device
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)


class FarspanMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Builds a `StepMetadata` from vLLM's `CommonAttentionMetadata`."""

    # Decode runs in full CUDA graphs: its tensors are the runner's own buffers, and the number of splits is fixed at
    # capture for max_model_len. With speculative decoding the requests of a graph have as many tokens each. Batches
    # with a prefill run piecewise, since their tiles are sized on the host.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    reorder_batch_threshold: int | None = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.max_decode_len = max_decode_len(vllm_config)
        self.reorder_batch_threshold = self.max_decode_len
        self.config = config_of(vllm_config)
        self.requests = source_of(vllm_config)
        self.layers = make_layer_contexts(layer_names, vllm_config, self.config, device, self.requests.model)
        turns = [layer.turn for layer in self.layers.values() if layer.turn is not None]
        # The layers of a model shift alike; where their angles differ, their bounds do not.
        assert len({(turn.slope, turn.offset) for turn in turns}) <= 1
        self.turn = turns[0] if turns else None
        cache = self.requests.cold_cache()
        if cache is not None and not cache.layers.keys() & self.layers.keys():
            cache = None
        num_kv_heads = kv_cache_spec.num_kv_heads
        num_hot_heads = num_kv_heads
        if cache is not None:
            (num_hot_heads,) = {cache.layers[name].hot_heads for name in layer_names}
        num_q_heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
        head_size = kv_cache_spec.head_size
        self.size = AttentionSize(num_q_heads, head_size, sparse_kernel_of(vllm_config, head_size))
        self.page_size: int = kv_cache_spec.block_size
        self.max_model_len: int = vllm_config.model_config.max_model_len
        self.lockstep: LockstepBuffers | None = None
        self.star: StarSteps | None = None
        if decodes_in_graphs(self.config):
            of_layers = [layer.to_true_positions for layer in self.layers.values()]
            distinct = {id(each): each for each in of_layers if each is not None}
            max_num_reqs = vllm_config.scheduler_config.max_num_seqs
            max_pages = -(-self.max_model_len // self.page_size)
            self.lockstep = LockstepBuffers(max_num_reqs, max_pages, list(distinct.values()), device)
        num_sms = num_multiprocessors(device)
        workspace = None
        if device.type != "cpu":
            layer = vllm_config.compilation_config.static_forward_context[layer_names[0]]
            group = layer.num_heads // num_kv_heads
            max_num_reqs, max_model_len = (
                vllm_config.scheduler_config.max_num_seqs,
                vllm_config.model_config.max_model_len,
            )
            # Hot and cold heads decode one after another, in the same room; selective decode has twice the parts.
            twice = 2 if cache is not None and cache.selection is not None else 1
            rows = [
                most_parts(max_num_reqs, heads, max_model_len, num_sms) * heads * group * times * self.max_decode_len
                for heads, times in ((num_hot_heads, 1), (num_kv_heads - num_hot_heads, twice))
                if heads > 0
            ]
            workspace = make_decode_workspace(max(rows), kv_cache_spec.head_size, device)
        maker = PassMaker(
            num_kv_heads=num_hot_heads,
            dense_kernel=choose_dense_kernel(self.config, device, kv_cache_spec.head_size, kv_cache_spec.dtype),
            num_sms=num_sms,
            workspace=workspace,
            has_turn=self.turn is not None,
            device=device,
        )
        self.maker = maker
        """Of the hot heads, which are all where none is cold."""
        self.hot_maker = maker if num_hot_heads > 0 else None
        self.cold: ColdHeads | None = None
        if cache is not None:
            of_cold = replace(maker, num_kv_heads=num_kv_heads - num_hot_heads, first_kv_head=num_hot_heads)
            self.cold = ColdHeads(cache, of_cold, layer_names[0])
        if self.config.star is not None:
            head_bytes = kv_cache_spec.head_size * kv_cache_spec.dtype.itemsize
            self.star = StarSteps(
                maker=maker,
                requests=self.requests,
                size=self.size,
                num_layers=len(layer_names),
                page_size=self.page_size,
                row=(num_q_heads, kv_cache_spec.head_size, kv_cache_spec.dtype.itemsize),
                page_bytes=2 * num_kv_heads * head_bytes * self.page_size,
                cold=None if self.cold is None else ColdPieces(self.cold),
            )
        # In the order in which they run, for what is staged ahead.
        self.names = sorted(layer_names, key=lambda name: self.layers[name].index)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Full graphs on a host of Star Attention only where all of its decode steps are steps of all hosts."""
        config = config_of(vllm_config)
        if config.star is not None and not decodes_in_graphs(config):
            return AttentionCGSupport.NEVER
        return cls._cudagraph_support

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        """Split the batch; common_prefix_len and fast_build are vLLM's and unused."""
        common = common_attn_metadata
        assert common.causal is True, "the backend refuses non-causal attention at start-up"
        if self.config.star is not None:
            shards = self.requests.shards(common)
            if self.lockstep is not None and common.max_query_len <= 1:
                return self.build_lockstep(common, shards)
            if self.lockstep is not None:
                self.lockstep.forget()
            if any(shard is not None for shard in shards):
                return self.build_star(common, shards)
        num_decodes, chunks = common.num_reqs, None
        if common.max_query_len > self.max_decode_len:
            query_start_loc = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
            query_lens = [end - start for start, end in pairwise(query_start_loc)]
            num_decodes = count_decodes(query_lens, self.max_decode_len)
            chunks = self.chunks_of(common, num_decodes, query_start_loc)
        passes: list[Pass] = []
        if self.hot_maker is not None:
            passes += self.passes_of(self.hot_maker, common, common.block_table_tensor, num_decodes, chunks)
        cold = None
        if self.cold is not None:
            self.cold.cache.map_step(
                common.block_table_tensor, common.seq_lens, common.slot_mapping, common.max_seq_len
            )
            of_cold, cold = self.cold_passes(self.cold, common, num_decodes, chunks)
            passes += of_cold
        return StepMetadata(tuple(passes), self.layers, plan=self.requests.plan(), cold=cold)

    def decode_passes(self, common: CommonAttentionMetadata, first: int, last: int) -> Iterator[Pass]:
        """The passes of requests [first, last) with one token each, which own the rows of their numbers."""
        starts = common.query_start_loc[first : last + 1]
        starts = starts if first == 0 else starts - first
        if self.hot_maker is not None:
            batch = requests_of(common, common.block_table_tensor, first, last, starts, 1, common.max_seq_len)
            yield self.hot_maker.decode(batch, first)
        if self.cold is not None:
            batch = requests_of(common, self.cold.cache.entries, first, last, starts, 1, common.max_seq_len)
            yield replace(self.cold.maker.decode(batch, first), keys="both")

    def build_star(self, common: CommonAttentionMetadata, shards: Sequence[Shard | None]) -> StepMetadata:
        """A step with requests of Star Attention, and others beside them."""
        assert self.star is not None
        query_start_loc = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        assert common.seq_lens_cpu_upper_bound is not None
        kv_lens = common.seq_lens_cpu_upper_bound[: common.num_reqs].tolist()
        query_lens = [end - start for start, end in pairwise(query_start_loc)]
        num_decodes = count_decodes(query_lens)
        for request, shard in enumerate(shards):
            begin = kv_lens[request] - query_lens[request]
            # Padding has no token, and may name any request.
            if isinstance(shard, WindowShard) and query_lens[request] > 0 and begin < shard.local_len:
                windows, distances, keys = self.star.window(common, request, shard, begin)
                return StepMetadata(
                    tuple(windows), self.layers, tuple(distances), self.requests.plan(), key_exchange=keys
                )
        passes: list[Pass] = []
        moved: list[tuple[slice, int]] = []
        staged: list[tuple[StagedPages, ...]] = []
        key_exchange = None
        if self.cold is not None:
            self.cold.cache.map_step(
                common.block_table_tensor, common.seq_lens, common.slot_mapping, common.max_seq_len
            )

        def kind(request: int) -> tuple[bool, bool]:
            is_star = shards[request] is not None
            return is_star, not is_star and request < num_decodes

        for (is_star, is_decode), members in groupby(range(common.num_reqs), key=kind):
            run = list(members)
            first, last = run[0], run[-1] + 1
            if is_decode:
                passes += self.decode_passes(common, first, last)
                continue
            if not is_star:
                chunks = self.chunks_of(common, first, query_start_loc, last)
                if self.hot_maker is not None:
                    passes += self.passes_of(self.hot_maker, common, common.block_table_tensor, 0, chunks)
                if self.cold is not None:
                    passes += self.cold_chunks(self.cold, common, chunks, staged)
                continue
            pieces: list[Piece] = []
            for request in run:
                shard, row = shards[request], query_start_loc[request]
                assert shard is not None
                begin, end = kv_lens[request] - query_lens[request], kv_lens[request]
                if isinstance(shard, StarShard):
                    key_exchange = self.star.shared_anchor(common, request, shard, end) or key_exchange
                pieces += cut_chunk(request, row, shard, begin, end)
                moved += moved_rows(row, shard, begin, end)
            passes += self.star.passes(common, pieces, staged)
        cold = None if self.cold is None else self.cold_step(self.cold.cache, common, staged)
        return StepMetadata(tuple(passes), self.layers, tuple(moved), self.requests.plan(), cold, key_exchange)

    def build_lockstep(self, common: CommonAttentionMetadata, shards: Sequence[Shard | None]) -> StepMetadata:
        """A step of one token a request on all hosts, from buffers that captured graphs read.

        Without any request it is one that vLLM warms up or captures. Raises StarError for one that other hosts would
        not take part in.
        """
        assert self.lockstep is not None
        assert self.star is not None
        exchange = current_exchange()
        assert exchange is not None
        num_rows = common.num_reqs
        pieces: list[Piece] = []
        if any(shard is not None for shard in shards):
            assert common.seq_lens_cpu_upper_bound is not None
            kv_lens = common.seq_lens_cpu_upper_bound[:num_rows].tolist()
            query_start_loc = common.query_start_loc_cpu[: num_rows + 1].tolist()
            for request, shard in enumerate(shards):
                # Padding comes last, without a token, and may name any request.
                if shard is None or query_start_loc[request] == query_start_loc[request + 1]:
                    break
                pieces += cut_chunk(request, request, shard, kv_lens[request] - 1, kv_lens[request])
            alone = next((piece for piece in pieces if not piece.segment.is_query), None)
            if alone is not None or query_start_loc[len(pieces)] < query_start_loc[-1]:
                raise StarError(
                    "a step of one token that other hosts do not take part in, on a host that decodes in graphs. Set "
                    "max_num_batched_tokens to a multiple of the page size."
                )
            exchange_of(pieces[0].shard.num_hosts, pieces[0].shard.rank)
            exchange.agree(digest_of(pieces))
            self.star.count_bytes(exchange, len(pieces))
        self.lockstep.fill(pieces, num_rows, common.block_table_tensor, self.page_size)
        made = self.maker.decode(self.lockstep.batch(num_rows, self.max_model_len))
        return StepMetadata(
            (replace(made, part=Part(0, 1, exchange)),),
            self.layers,
            ((slice(0, num_rows), None),),
            self.requests.plan(),
        )

    def chunks_of(
        self, common: CommonAttentionMetadata, first: int, query_start_loc: list[int], last: int | None = None
    ) -> "HostChunks":
        """What the host knows of the requests [first, last or num_reqs), which prefill."""
        # Exact for the rows that prefill (vLLM over-estimates only decodes under speculation, which come before).
        assert common.seq_lens_cpu_upper_bound is not None
        kv_lens = common.seq_lens_cpu_upper_bound[: common.num_reqs].tolist()
        query_lens = [end - start for start, end in pairwise(query_start_loc)]
        prefills, prompt_lens = self.requests.prefills(common), self.requests.prompt_lens(common)
        rows = [request for request in range(first, last or common.num_reqs) if query_lens[request] > 0]
        missing = self.requests.missing(common) if self.cold is not None else [False] * common.num_reqs
        # A chunk that is exact where it comes first in a batch, as a decode, is exact in every batch.
        kinds = {
            request: ChunkKind(
                DensePrefill()
                if query_lens[request] <= self.max_decode_len
                else effective_prefill(
                    prefills[request], query_lens[request], kv_lens[request], prompt_lens[request], self.size
                ),
                self.turn is not None and self.turn.reaches(kv_lens[request] - 1),
                bool(missing[request]),
            )
            for request in rows
        }
        return HostChunks(query_start_loc, kv_lens, kinds)

    def passes_of(
        self,
        maker: PassMaker,
        common: CommonAttentionMetadata,
        block_table: torch.Tensor,
        num_decodes: int,
        chunks: "HostChunks | None",
    ) -> list[Pass]:
        """Passes of all requests of a batch, whose pages all lie where `block_table` says."""
        passes = []
        if num_decodes > 0:
            starts = common.query_start_loc[: num_decodes + 1]
            query_len, num_rows = min(common.max_query_len, self.max_decode_len), None
            if query_len > 1:
                num_rows = int(common.query_start_loc_cpu[num_decodes])
            batch = requests_of(common, block_table, 0, num_decodes, starts, query_len, common.max_seq_len)
            passes.append(maker.decode(batch, num_rows=num_rows))
        for run in chunks.runs(lambda kind: (kind.prefill, kind.turns)) if chunks is not None else ():
            passes.append(self.prefill_pass(maker, common, block_table[run.first : run.stop], run))
        return passes

    def prefill_pass(
        self, maker: PassMaker, common: CommonAttentionMetadata, block_table: torch.Tensor, run: "Run"
    ) -> Pass:
        """The pass of adjacent requests that prefill alike; block_table: of theirs alone."""
        starts = common.query_start_loc[run.first : run.stop + 1] - run.first_row
        batch = PagedBatch(
            query_start_loc=starts,
            kv_lens=common.seq_lens[run.first : run.stop],
            block_table=block_table,
            max_query_len=max(end - start for start, end in pairwise(run.query_start_loc)),
            max_kv_len=max(run.kv_lens),
        )
        return maker.prefill(
            run.kind.prefill, batch, run.query_start_loc, run.kv_lens, run.first_row, turns=run.kind.turns
        )

    def cold_passes(
        self, cold: ColdHeads, common: CommonAttentionMetadata, num_decodes: int, chunks: "HostChunks | None"
    ) -> tuple[list[Pass], CacheStep]:
        """Passes of the cold heads, after the step's tables are written."""
        cache = cold.cache
        passes: list[Pass] = []
        staged: list[tuple[StagedPages, ...]] = []
        if num_decodes > 0:
            # Slots and host memory alike, whatever the step: one captured graph serves all.
            (decode,) = self.passes_of(cold.maker, common, cache.entries, num_decodes, None)
            if cache.selection is not None:
                assert isinstance(decode.work, Decode)
                decode = replace(decode, work=replace(decode.work, selections=cache.selection.layers))
            passes.append(replace(decode, keys="both"))
        if cache.selection is not None:
            cache.selection.begin_step(cache.entries, common.seq_lens, num_decodes, common.max_seq_len)
        if chunks is not None:
            passes += self.cold_chunks(cold, common, chunks, staged)
        return passes, self.cold_step(cache, common, staged)

    def cold_chunks(
        self,
        cold: ColdHeads,
        common: CommonAttentionMetadata,
        chunks: "HostChunks",
        staged: list[tuple[StagedPages, ...]],
    ) -> list[Pass]:
        """Passes of the cold heads of what prefills; what is staged for them is added to `staged`."""
        cache = cold.cache
        passes: list[Pass] = []
        for run in chunks.runs(lambda kind: kind):
            if not run.kind.misses_pages:
                each = self.prefill_pass(cold.maker, common, cache.entries[run.first : run.stop], run)
                passes.append(replace(each, keys="slots"))
                continue
            assert cache.staging is not None
            for part in run.split(cache.sizes.page_size, cache.staging.num_pages):
                num_pages = [-(-kv_len // cache.sizes.page_size) for kv_len in part.kv_lens]
                if sum(num_pages) > cache.staging.num_pages:
                    spans, batches, ends = self.spans_of(cache, part)
                    staged.append(spans)
                    for group in cold.group_makers(spans[0]):
                        passes += span_passes(group, part, spans, batches, ends)
                    continue
                pages, block_table = cache.stage(part.first, num_pages)
                staged.append((pages,))
                for group in cold.group_makers(pages):
                    passes.append(replace(self.prefill_pass(group, common, block_table, part), keys=pages))
        return passes

    def cold_step(
        self, cache: ColdCache, common: CommonAttentionMetadata, staged: list[tuple[StagedPages, ...]]
    ) -> CacheStep:
        """What the step's layers ask of a cache. staged: in the order of the passes."""
        turn = None
        if staged:
            turn = cache.staged_turn(self.names, staged, is_alone=len(self.names) == len(cache.layers))
        return CacheStep(cache, len(common.slot_mapping), turn)

    def spans_of(self, cache: ColdCache, run: "Run") -> tuple[tuple[StagedPages, ...], list[PagedBatch], list[int]]:
        """One request whose pages a buffer does not hold, over spans of its context, the last with its chunk.

        Returns the pages of each span, the request's batch there, and where its chunk ends. Positions, by which a
        turn is told, count from the beginning of the span, and are the same distances apart.
        """
        assert cache.staging is not None
        assert isinstance(run.kind.prefill, DensePrefill), "other methods are given room for the whole context"
        (kv_len,), (_, query_len) = run.kv_lens, run.query_start_loc
        page_size, first_pos = cache.sizes.page_size, kv_len - query_len
        bounds = span_bounds(-(-kv_len // page_size), first_pos // page_size, cache.staging.num_pages)
        spans, block_table = cache.stage_spans(run.first, bounds)
        begins = [bound * page_size for bound in bounds[:-1]]
        lens = [end - begin for begin, end in pairwise([*begins, kv_len])]
        numbers = to_device([lens, [first_pos - begin for begin in begins]], self.device)
        starts = to_device([[0, query_len]], self.device)[0]
        batches = [
            PagedBatch(
                query_start_loc=starts,
                kv_lens=numbers[0, place : place + 1],
                block_table=block_table,
                max_query_len=query_len,
                max_kv_len=length,
                first_pos=numbers[1, place : place + 1] if place + 1 < len(lens) else None,
            )
            for place, length in enumerate(lens)
        ]
        return spans, batches, [kv_len - begin for begin in begins]


def span_bounds(num_pages: int, first_written: int, most_pages: int) -> list[int]:
    """Where spans of a request's pages begin, and where the last one ends: few spans, about as long as each other.

    first_written: the first page that the request's chunk writes to: the last span has all from it on. most_pages: of
    a span, at least as many as the chunk writes to.
    """
    assert num_pages - first_written <= most_pages
    num_spans = -(-num_pages // most_pages)
    span = max(-(-num_pages // num_spans), num_pages - first_written)
    bounds = range(num_pages, 0, -span)
    return [0, *reversed(bounds)]


def span_passes(
    maker: PassMaker, run: Run, spans: tuple[StagedPages, ...], batches: list[PagedBatch], chunk_ends: list[int]
) -> list[Pass]:
    """The passes of one request over spans of its context, which are combined."""
    last = len(spans) - 1
    passes = []
    for place, (pages, batch, end) in enumerate(zip(spans, batches, chunk_ends, strict=True)):
        made = maker.prefill(run.kind.prefill, batch, run.query_start_loc, [end], run.first_row, turns=run.kind.turns)
        passes.append(replace(made, keys=pages, is_causal=place == last, part=Part(place, len(spans))))
    return passes


def decodes_in_graphs(config: FarspanConfig) -> bool:
    """Whether every step with one token a request is one of all hosts, so that graphs can hold their exchange."""
    return config.star is not None and config.star.graphs and current_exchange() is not None


def requests_of(
    common: CommonAttentionMetadata,
    block_table: torch.Tensor,
    first: int,
    last: int,
    query_start_loc: torch.Tensor,
    max_query_len: int,
    max_kv_len: int,
) -> PagedBatch:
    """Requests [first, last) of vLLM's batch as a batch of their own; block_table: of all requests."""
    return PagedBatch(
        query_start_loc=query_start_loc,
        kv_lens=common.seq_lens[first:last],
        block_table=block_table[first:last],
        max_query_len=max_query_len,
        max_kv_len=max_kv_len,
    )
