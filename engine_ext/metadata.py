"""From vLLM's batch to what the kernels need: built once a step, on the host, without waiting for the device.

The batch is split by one rule: the leading requests with at most one query token are decodes, all others prefill.
vLLM puts them first because of `reorder_batch_threshold`.
"""

from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import torch
from farspan.engine_ext.config import BlockSparsePrefill, DensePrefill, FlexPrefill, Prefill
from farspan.engine_ext.dispatch import DecodePlanner, choose_dense_kernel
from farspan.engine_ext.requests import source_of
from farspan.engine_ext.string import string_shift_for_layer
from farspan.engine_ext.support import config_of
from farspan.kernels.decode import DecodeWorkspace
from farspan.kernels.rotary_turn import RotaryShift
from farspan.kernels.tiles import BlockLists, PrefillTiles, make_prefill_tiles
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)

TILE_SIZE = 128
"""Tokens of a query tile and of a KV block where the method does not say otherwise."""

FLEX_MIN_SEQ_LEN = 8192
"""Requests shorter than this prefill densely under flex, unless min_seq_len says otherwise.

At 8K tokens selection and attention at gamma 0.9 take 0.20 and 0.44 ms, FlashAttention 3 0.75; below, selection alone
outweighs what it saves. H100 80GB, 32 query heads on 8, 2026-11-22; benchmarks/data/prefill_flex.csv
"""


@dataclass(frozen=True)
class PrefillGroup:
    """Adjacent prefilling requests that prefill alike, as a batch of their own."""

    prefill: Prefill
    token_start: int
    num_tokens: int
    """The group's tokens are rows [token_start, token_start + num_tokens) of the step's query and output."""
    query_start_loc: torch.Tensor
    """[num_requests + 1] int32, on the device, starting at 0."""
    seq_lens: torch.Tensor
    """[num_requests] int32, on the device: lengths after this step."""
    block_table: torch.Tensor
    """[num_requests, max_pages] int32, on the device."""
    max_query_len: int
    max_seq_len: int
    tiles: PrefillTiles | None
    """None where the dense kernel cuts its own tiles."""
    request_ids: torch.Tensor
    """[num_requests] int32, on the device: 0, 1, …"""
    is_shifted: bool = False
    """Whether the option `string` shortens any distance in these requests; it leaves shorter ones as they are."""
    shared_lists: dict[str, BlockLists] = field(default_factory=dict)
    """Block lists that the layers of this step share; filled by the first one."""

    def shift_of(self, string: RotaryShift | None) -> RotaryShift | None:
        """What a layer's shift comes to in these requests: None where it leaves them as they are."""
        return string if self.is_shifted else None


@dataclass(frozen=True)
class StepMetadata(AttentionMetadata):
    """One step of one KV cache group, shared by its layers."""

    num_decodes: int
    """Rows [0, num_decodes) of the query hold one token of requests [0, num_decodes) each."""
    seq_lens: torch.Tensor
    """[num_reqs] int32, on the device: lengths after this step; 0 for padding."""
    block_table: torch.Tensor
    """[num_reqs, max_pages] int32, on the device."""
    query_start_loc: torch.Tensor
    """[num_reqs + 1] int32, on the device."""
    num_splits: int
    """Parts that decode cuts each KV sequence into."""
    decode_workspace: DecodeWorkspace | None
    """Where the parts are combined; None on the CPU."""
    prefill_groups: tuple[PrefillGroup, ...]


def count_decodes(query_lens: list[int]) -> int:
    """Leading requests with at most one query token: those that decode."""
    for request, query_len in enumerate(query_lens):
        if query_len > 1:
            return request
    return len(query_lens)


class FarspanMetadataBuilder(AttentionMetadataBuilder[StepMetadata]):
    """Builds a `StepMetadata` from vLLM's `CommonAttentionMetadata`."""

    # Decode runs in full CUDA graphs: its tensors are the runner's own buffers, and the number of splits is fixed at
    # capture for max_model_len. Batches with a prefill run piecewise, since their tiles are sized on the host.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int | None = 1

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.config = config_of(vllm_config)
        self.requests = source_of(vllm_config)
        layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
        self.decode_planner = DecodePlanner(
            max_num_reqs=vllm_config.scheduler_config.max_num_seqs,
            max_seq_len=vllm_config.model_config.max_model_len,
            num_q_heads=layers[0].num_heads,
            num_kv_heads=kv_cache_spec.num_kv_heads,
            head_dim=kv_cache_spec.head_size,
            device=device,
        )
        self.dense_kernel = choose_dense_kernel(self.config, device, kv_cache_spec.head_size, kv_cache_spec.dtype)
        self.request_ids = torch.arange(vllm_config.scheduler_config.max_num_seqs, dtype=torch.int32, device=device)
        self.shift: int | None = None

        if self.config.string is not None:
            for name, layer in zip(layer_names, layers, strict=True):
                string = string_shift_for_layer(self.requests.model(), vllm_config, name, self.config.string)
                layer.impl.shift_positions(string)
                self.shift = string.shift

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> StepMetadata:
        """Split the batch; common_prefix_len and fast_build are vLLM's and unused."""
        common = common_attn_metadata
        assert common.causal is True, "the backend refuses non-causal attention at start-up"
        num_reqs = common.num_reqs
        num_decodes = num_reqs
        groups: tuple[PrefillGroup, ...] = ()
        if common.max_query_len > 1:
            query_start_loc = common.query_start_loc_cpu[: num_reqs + 1].tolist()
            query_lens = [end - start for start, end in pairwise(query_start_loc)]
            num_decodes = count_decodes(query_lens)
            groups = self.build_groups(common, num_decodes, query_start_loc, query_lens)
        return StepMetadata(
            num_decodes=num_decodes,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            query_start_loc=common.query_start_loc,
            num_splits=self.decode_planner.num_splits(num_decodes, common.max_seq_len),
            decode_workspace=self.decode_planner.workspace,
            prefill_groups=groups,
        )

    def build_groups(
        self, common: CommonAttentionMetadata, num_decodes: int, query_start_loc: list[int], query_lens: list[int]
    ) -> tuple[PrefillGroup, ...]:
        """Groups of the requests [num_decodes, num_reqs); padding behind them has no tokens and is left out."""
        # Exact for the rows that prefill (vLLM over-estimates only decodes under speculation, which is refused).
        assert common.seq_lens_cpu_upper_bound is not None
        seq_lens = common.seq_lens_cpu_upper_bound[: common.num_reqs].tolist()
        prefills = self.prefill_per_request(common, seq_lens)
        rows = [request for request in range(num_decodes, common.num_reqs) if query_lens[request] > 0]
        groups = []
        # A request's last token is its furthest from the first.
        is_shifted = [self.shift is not None and seq_len > self.shift for seq_len in seq_lens]
        for (prefill, shifted), members in groupby(rows, key=lambda request: (prefills[request], is_shifted[request])):
            run = list(members)
            first, last = run[0], run[-1] + 1
            starts = query_start_loc[first : last + 1]
            groups.append(
                PrefillGroup(
                    prefill=prefill,
                    token_start=starts[0],
                    num_tokens=starts[-1] - starts[0],
                    query_start_loc=common.query_start_loc[first : last + 1] - starts[0],
                    seq_lens=common.seq_lens[first:last],
                    block_table=common.block_table_tensor[first:last],
                    max_query_len=max(query_lens[first:last]),
                    max_seq_len=max(seq_lens[first:last]),
                    tiles=self.make_tiles(
                        prefill, shifted, [start - starts[0] for start in starts], seq_lens[first:last]
                    ),
                    request_ids=self.request_ids[: last - first],
                    is_shifted=shifted,
                )
            )
        return tuple(groups)

    def make_tiles(
        self, prefill: Prefill, is_shifted: bool, query_start_loc: list[int], seq_lens: list[int]
    ) -> PrefillTiles | None:
        cuts_its_own = self.dense_kernel == "cpu" or (self.dense_kernel == "fa3" and not is_shifted)
        if isinstance(prefill, DensePrefill) and cuts_its_own:
            return None
        block_size = prefill.block_size if isinstance(prefill, BlockSparsePrefill) else TILE_SIZE
        return make_prefill_tiles(query_start_loc, seq_lens, block_size, self.device)

    def prefill_per_request(self, common: CommonAttentionMetadata, seq_lens: list[int]) -> list[Prefill]:
        """How each request of the batch prefills in this step."""
        engine_prefill = self.config.prefill
        if isinstance(engine_prefill, DensePrefill):
            return [engine_prefill] * common.num_reqs
        prefills = self.requests.prefills(common)
        return [shorten(prefill, seq_len) for prefill, seq_len in zip(prefills, seq_lens, strict=True)]


def shorten(prefill: Prefill, seq_len: int) -> Prefill:
    """Dense for a flex request that is too short to gain."""
    if isinstance(prefill, FlexPrefill):
        least = FLEX_MIN_SEQ_LEN if prefill.min_seq_len is None else prefill.min_seq_len
        if seq_len < least:
            return DensePrefill()
    return prefill
