"""Every kernel that requests can reach, run once at start, so that none is compiled inside a request.

Triton compiles a kernel anew for each tile shape. Which shapes there are follows from the options, from
`max_model_len` and from the longest chunk; `warm_up_cases` lists one small pass for each, through the same `PassMaker`
and `attend` that serve requests.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from farspan.engine_ext.config import BlockSparsePrefill, DensePrefill, FlexPrefill, Prefill
from farspan.engine_ext.launch import as_pages, at_true_positions, attend, write_kv
from farspan.engine_ext.metadata import FarspanMetadataBuilder
from farspan.engine_ext.parts import RunningSum, combine
from farspan.engine_ext.pass_maker import TILE_SIZE, PassMaker, effective_prefill
from farspan.engine_ext.passes import Decode, LayerContext, LayerSelection, Pass
from farspan.engine_ext.selection.crossover import AttentionSize
from farspan.engine_ext.splits import SplitPlan
from farspan.engine_ext.star.exchange import PartialResult, current, unpacked
from farspan.engine_ext.star.keys import longest_kv_len
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.tiles import to_device
from farspan.kernels.tuning import DECODE_MAX_SPLITS, DECODE_MIN_SPLIT_KEYS

BLOCK_TABLE_TOKENS = 128
"""vLLM's block tables have room for a multiple of so many tokens."""


@dataclass(frozen=True)
class WarmUpCase:
    """One pass that compiles kernels no other case compiles."""

    kind: Literal["write", "decode", "prefill", "turn", "combine", "spans"]
    turns: bool = False
    num_splits: int = 1
    """Of a decode."""
    is_alone: bool = False
    """See `SplitPlan`."""
    prefill: Prefill | None = None
    query_len: int = 1
    """Tokens of the chunk, or of a request that decodes."""
    kv_len: int = 1
    """Keys up to the end of the chunk."""
    is_causal: bool = True


def warm_up_cases(
    prefill: Prefill,
    size: AttentionSize,
    maker: PassMaker,
    *,
    max_model_len: int,
    max_chunk_len: int,
    max_decode_len: int = 1,
    is_fp8: bool = False,
) -> list[WarmUpCase]:
    """The cases of an engine, each once.

    prefill: the engine's; a request may choose dense prefill instead. size: of the layers. max_chunk_len: most query
    tokens of a request in one step; max_decode_len: of one that decodes. is_fp8: whether decode reads float8 pages.
    Kernels differ by whether a turn reaches the queries, by the power of two of the tokens of a tile, of the tokens and
    the splits of a decode and, where blocks are selected, of the blocks of the prompt.
    """
    max_chunk_len = min(max_chunk_len, max_model_len)
    turning = (False, True) if maker.has_turn else (False,)
    most_splits = min(DECODE_MAX_SPLITS, -(-max_model_len // DECODE_MIN_SPLIT_KEYS))
    cases = [WarmUpCase("write")]
    cases += [
        WarmUpCase("decode", turns, num_splits) for turns, num_splits in product(turning, powers_of_two(most_splits))
    ]
    # The combination does not know how many tokens a request has, the others only whether they have one split.
    decode_lens = dict.fromkeys(min(tokens, max_decode_len) for tokens in powers_of_two(max_decode_len)[1:])
    cases += [
        WarmUpCase("decode", turns, num_splits, query_len=query_len, kv_len=query_len)
        for turns, num_splits, query_len in product(turning, dict.fromkeys((1, min(2, most_splits))), decode_lens)
    ]
    if is_fp8:
        # Few programs have a form of their own, with the same combination.
        cases += [replace(case, is_alone=True) for case in cases if case.kind == "decode" and case.num_splits <= 2]
    for each, turns in product(dict.fromkeys((prefill, DensePrefill())), turning):
        if isinstance(each, DensePrefill) and not turns and maker.dense_kernel != "triton":
            continue
        cases += [
            WarmUpCase("prefill", turns, prefill=each, query_len=query_len, kv_len=kv_len)
            for query_len, kv_len in chunk_shapes(each, size, max_model_len, max_chunk_len)
        ]
    return cases


def chunk_shapes(
    prefill: Prefill, size: AttentionSize, max_model_len: int, max_chunk_len: int
) -> Iterator[tuple[int, int]]:
    """Query tokens and keys of chunks that prefill this way, and that compile different kernels."""
    block_size = prefill.block_size if isinstance(prefill, BlockSparsePrefill) else TILE_SIZE
    query_lens = [min(query_len, max_chunk_len) for query_len in powers_of_two(min(block_size, max_chunk_len))]
    if not isinstance(prefill, FlexPrefill):
        yield from ((query_len, query_len) for query_len in query_lens)
        return
    # Tile shapes depend on the chunk alone, the widths of selection on the prompt alone.
    shapes = [(query_len, max_model_len) for query_len in query_lens]
    num_blocks = powers_of_two(-(-max_model_len // block_size))
    kv_lens = [min(blocks * block_size, max_model_len) for blocks in num_blocks]
    shapes += [(min(max_chunk_len, kv_len), kv_len) for kv_len in kv_lens]
    for query_len, kv_len in dict.fromkeys(shapes):
        if effective_prefill(prefill, query_len, kv_len, max_model_len, size) == prefill:
            yield query_len, kv_len


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … up to the first that is not below `most`."""
    return [1 << power for power in range((max(most, 1) - 1).bit_length() + 1)]


@dataclass(frozen=True)
class WarmUp:
    """Runs the cases of the layers of one builder that compile the same kernels, on the pages of one of them."""

    prefill: Prefill
    size: AttentionSize
    maker: PassMaker
    layer: LayerContext
    view: KVView
    """The KV heads of `maker` as prefill reads them; all of it is left as it is."""
    decode_view: KVView
    """The same as decode reads them."""
    group_size: int
    """Query heads per KV head."""
    dtype: torch.dtype
    """Of queries, keys and values."""
    max_model_len: int
    max_chunk_len: int
    max_decode_len: int = 1
    """The most query tokens of a request that decodes."""
    selections: Mapping[int, LayerSelection] | None = None
    """See `Decode`."""
    table_width: int | None = None
    """Of the block tables, in pages; None for vLLM's. Kernels that choose blocks or pages differ by it."""
    num_hosts: int = 1
    """Of Star Attention, whose results are combined."""
    num_kv_heads: int | None = None
    """Of the layer, hot and cold ones, whose queries are turned, and results combined by hosts, together; None for
    those of `view`."""
    span_heads: tuple[int, ...] = ()
    """KV heads of the groups whose attention goes over a long context span by span, and is combined; often none."""
    max_kv_len: int | None = None
    """Most keys of a pass; None for `max_model_len`. More are those of all hosts, in tables as much wider."""

    def cases(self) -> list[WarmUpCase]:
        """See `warm_up_cases`; spans of a context and hosts of Star Attention have more."""
        max_kv_len = self.max_kv_len or self.max_model_len
        cases = warm_up_cases(
            self.prefill,
            self.size,
            self.maker,
            max_model_len=max_kv_len,
            max_chunk_len=self.max_chunk_len,
            max_decode_len=self.max_decode_len,
            is_fp8=self.decode_view.is_fp8,
        )
        if self.span_heads:
            # A chunk sees all keys of the spans before its own.
            span_shapes = list(chunk_shapes(DensePrefill(), self.size, self.max_model_len, self.max_chunk_len))
            turning = (False, True) if self.maker.has_turn else (False,)
            cases += [WarmUpCase("spans")]
            cases += [
                WarmUpCase(
                    "prefill", turns, prefill=DensePrefill(), query_len=query_len, kv_len=kv_len, is_causal=False
                )
                for (query_len, kv_len), turns in product(span_shapes, turning)
                if turns or self.maker.dense_kernel == "triton"
            ]
        if self.layer.to_true_positions is None:
            return cases
        cases += [WarmUpCase("turn"), WarmUpCase("combine")]
        if self.maker.dense_kernel == "triton":
            # A query sees all keys of the hosts that do not have it.
            shapes = chunk_shapes(DensePrefill(), self.size, self.max_model_len, self.max_chunk_len)
            cases += [
                WarmUpCase("prefill", prefill=DensePrefill(), query_len=query_len, kv_len=kv_len, is_causal=False)
                for query_len, kv_len in shapes
                if query_len > 1
            ]
        return cases

    def run(self, case: WarmUpCase) -> None:
        """Compile what the case needs by running it."""
        view, device = self.view, self.view.pages.device
        if case.kind == "write":
            token = torch.zeros(1, view.num_kv_heads, view.head_dim, dtype=self.dtype, device=device)
            write_kv(token, token, view.pages, torch.full((1,), -1, dtype=torch.int64, device=device))
            return
        num_kv_heads = self.num_kv_heads or view.num_kv_heads
        if case.kind == "turn":
            for num_heads in (num_kv_heads * self.group_size, view.num_kv_heads):
                heads = torch.zeros(2, num_heads, view.head_dim, dtype=self.dtype, device=device)
                at_true_positions(heads, [(slice(0, 2), 1)], self.layer.to_true_positions)
            return
        if case.kind == "combine":
            out = torch.zeros(2, num_kv_heads * self.group_size, view.head_dim, dtype=self.dtype, device=device)
            mine = PartialResult.empty(out)
            mine.buffer.zero_()
            combine(*unpacked(mine.buffer.repeat(self.num_hosts, 1), out), out, torch.empty_like(mine.lse))
            return
        if case.kind == "spans":
            for num_kv_heads in self.span_heads:
                num_heads = num_kv_heads * self.group_size
                out = torch.zeros(2, num_heads, view.head_dim, dtype=self.dtype, device=device)
                for num_parts in (2, 3, 4):
                    sums, lses = RunningSum(out), torch.zeros(num_parts, num_heads, 2, device=device)
                    sums.put(sums.first.zero_(), lses[0])
                    for lse in lses[1:-1]:
                        sums.put(out, lse)
                    sums.finish(out, lses[-1], out)
            return
        num_q_heads = view.num_kv_heads * self.group_size
        query = torch.zeros(case.query_len, num_q_heads, view.head_dim, dtype=self.dtype, device=device)
        keys = self.decode_view if case.kind == "decode" else view
        each, out = self.make_pass(case), torch.empty_like(query)
        attend(each, query, keys, self.layer, 1.0, out)
        if isinstance(each.work, Decode) and each.work.selections is not None:
            # The audit of what was selected reads every page.
            attend(replace(each, work=replace(each.work, selections=None)), query, keys, self.layer, 1.0, out)

    def make_pass(self, case: WarmUpCase) -> Pass:
        """The pass of one request whose keys are all in page 0."""
        device = self.view.pages.device
        num_pages = self.table_width
        if num_pages is None:
            num_pages = -(-self.max_model_len // BLOCK_TABLE_TOKENS) * BLOCK_TABLE_TOKENS // self.view.page_size
            if case.kv_len > self.max_model_len:
                num_pages *= self.num_hosts
        lens = to_device([[0, case.query_len], [case.kv_len, 0]], device)
        batch = PagedBatch(
            query_start_loc=lens[0],
            kv_lens=lens[1, :1],
            block_table=torch.zeros(1, num_pages, dtype=torch.int32, device=device),
            max_query_len=case.query_len,
            max_kv_len=case.kv_len,
            first_pos=None if case.is_causal else lens[0, :1],
        )
        if case.kind == "decode":
            # The builder's workspace has no room for splits that only other batches have.
            splits = SplitPlan(case.num_splits, DECODE_MIN_SPLIT_KEYS, case.is_alone)
            work = Decode(splits, workspace=None, selections=self.selections, query_len=case.query_len)
            return replace(self.maker.decode(batch, num_rows=case.query_len), work=work, turns=case.turns)
        assert case.prefill is not None
        made = self.maker.prefill(case.prefill, batch, [0, case.query_len], [case.kv_len], 0, turns=case.turns)
        return replace(made, is_causal=case.is_causal)


def warm_ups_of(
    builder: FarspanMetadataBuilder, layer_name: str, kv_cache: torch.Tensor, num_q_heads: int, dtype: torch.dtype
) -> list[WarmUp]:
    """The warm-ups of one of a builder's layers: of its hot heads, and of its cold ones.

    kv_cache: the layer's pages in vLLM's cache; num_q_heads: of the layer on this rank; dtype: of the model.
    """
    vllm_config: Any = builder.vllm_config
    views: list[tuple[PassMaker, KVView, KVView, int | None]] = []
    selections: Mapping[int, LayerSelection] | None = None
    if builder.hot_maker is not None:
        view = KVView(as_pages(kv_cache))
        views.append((builder.hot_maker, view, view, None))
    span_heads: tuple[int, ...] = ()
    if builder.cold is not None:
        cache, layer = builder.cold.cache, builder.cold.cache.layers[layer_name]
        slots, both = (cache.view_of(layer, both=both) for both in (False, True))
        views.append((builder.cold.maker, slots, both, cache.entries.shape[1]))
        if cache.selection is not None:
            selections = cache.selection.layers
        if cache.has_spans:
            span_heads = tuple(dict.fromkeys(heads.stop - heads.start for heads in cache.groups_of(layer)))
    num_kv_heads = sum(view.num_kv_heads for _, view, _, _ in views)
    max_model_len, exchange = vllm_config.model_config.max_model_len, current()
    return [
        WarmUp(
            prefill=builder.config.prefill,
            size=builder.size,
            maker=maker,
            layer=builder.layers[layer_name],
            view=view,
            decode_view=decode_view,
            group_size=num_q_heads // num_kv_heads,
            dtype=dtype,
            max_model_len=max_model_len,
            max_chunk_len=vllm_config.scheduler_config.max_num_batched_tokens,
            max_decode_len=builder.max_decode_len,
            selections=None if decode_view.host_pages is None else selections,
            table_width=width,
            span_heads=() if decode_view.host_pages is None else span_heads,
            num_hosts=1 if exchange is None else exchange.num_hosts,
            num_kv_heads=num_kv_heads,
            max_kv_len=longest_kv_len(max_model_len),
        )
        for maker, view, decode_view, width in views
    ]
