"""Calls of our kernels on a benchmark's batch, one function per kernel.

Buffers and tiles are made beforehand, as in the engine. `prefill_fa3`, `prefill_flex` and `write_kv` are called as the
engine's layers call them. `benchmarks.compare_revisions` loads this module, or a similar one for another revision. The
benchmarks `prefill_flex` and `select` call the stages of flex prefill separately.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from farspan.engine_ext import launch
from farspan.engine_ext.config import DensePrefill, FlexPrefill, Prefill
from farspan.engine_ext.pass_maker import PassMaker
from farspan.engine_ext.passes import DenseKernel, LayerContext, Pass
from farspan.engine_ext.selection.methods import FlexSelector
from farspan.engine_ext.splits import num_multiprocessors, plan_splits
from farspan.kernels import batch as kernel_batch
from farspan.kernels.batch import KVView
from farspan.kernels.decode import paged_decode
from farspan.kernels.decode_workspace import make_decode_workspace
from farspan.kernels.prefill import prefill_attention
from farspan.kernels.rotary_turn import Turn
from farspan.kernels.tiles import BlockLists, PrefillTiles, make_prefill_tiles
from farspan.kernels.tuning import HopperPrefillConfig, PrefillConfig, device_capability, prefill_config

from benchmarks.inputs import PagedBatch

Call = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Computes one layer; returns out [num_tokens, num_q_heads, head_dim] and lse [num_q_heads, num_tokens] float32."""
OutCall = Callable[[], torch.Tensor]
"""Computes one layer; returns out as above, or for `write_kv` the cache."""


@dataclass(frozen=True)
class HostPages:
    """A batch's pages in host memory."""

    pages: torch.Tensor
    """[num_pages, num_kv_heads, page_size, 2 * head_dim], which the device can address."""
    on_host: torch.Tensor
    """[num_pages] bool on the device: which of them decode reads there."""


def block_size_of(batch: PagedBatch) -> int:
    """Tokens of a tile: the engine's, or fewer for the small pages of a dry run."""
    return max(64, batch.shape.page_size)


def kv_of(batch: PagedBatch) -> KVView:
    return KVView(batch.kv_cache)


def paged_of(batch: PagedBatch) -> kernel_batch.PagedBatch:
    """The batch as the launchers take it."""
    return kernel_batch.PagedBatch(
        batch.query_start_loc,
        batch.seq_lens,
        batch.block_table,
        max_query_len=max(batch.query_lens_cpu),
        max_kv_len=max(batch.seq_lens_cpu),
    )


def tiles_of(batch: PagedBatch) -> PrefillTiles:
    starts = batch.query_start_loc.tolist()
    return make_prefill_tiles(starts, batch.seq_lens_cpu, block_size_of(batch), batch.query.device)


def empty_results(batch: PagedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Uninitialised out and LSE of a batch."""
    shape = (batch.shape.num_q_heads, len(batch.query))
    return torch.empty_like(batch.query), torch.empty(shape, dtype=torch.float32, device=batch.query.device)


def decode(batch: PagedBatch, turn: Turn | None = None, host_pages: HostPages | None = None) -> Call:
    """Decode of a batch whose requests have as many query tokens each.

    turn: that of shifted positions, or None; host_pages: those that decode reads in host memory.
    """
    shape, device, num_reqs = batch.shape, batch.query.device, len(batch.seq_lens_cpu)
    splits = plan_splits(num_reqs, shape.num_kv_heads, max(batch.seq_lens_cpu), num_multiprocessors(device))
    workspace = make_decode_workspace(len(batch.query) * shape.num_q_heads * splits.num_splits, shape.head_dim, device)
    out, lse = empty_results(batch)
    kv, paged = kv_of(batch), paged_of(batch)
    if host_pages is not None:
        blocks = batch.block_table
        table = torch.where(host_pages.on_host[blocks.long()], -1 - blocks, blocks)
        kv, paged = KVView(batch.kv_cache, 0, host_pages.pages), replace(paged, block_table=table)
    return lambda: paged_decode(
        batch.query, kv, paged, shape.scale, num_splits=splits.num_splits, min_split_keys=splits.min_split_keys,
        query_len=max(batch.query_lens_cpu), is_alone=splits.is_alone, turn=turn, out=out, lse=lse,
        workspace=workspace,
    )  # fmt: skip


def prefill(
    batch: PagedBatch,
    turn: Turn | None = None,
    *,
    block_lists: BlockLists | None = None,
    portable: bool = False,
    config: HopperPrefillConfig | PrefillConfig | None = None,
) -> Call:
    """Causal prefill by our kernel, over all keys or the blocks listed.

    turn: that of shifted positions, or None. portable: by the portable kernel, also where the device has its own.
    config: see `prefill_attention`.
    """
    tiles, (out, lse) = tiles_of(batch), empty_results(batch)
    keys, values = kv_of(batch).split()
    if portable:
        config = portable_config(batch, tiles, turn, block_lists)
    return lambda: prefill_attention(
        batch.query, keys, values, paged_of(batch), tiles, batch.shape.scale,
        block_lists=block_lists, turn=turn, out=out, lse=lse, config=config,
    )  # fmt: skip


def portable_config(
    batch: PagedBatch, tiles: PrefillTiles, turn: Turn | None, block_lists: BlockLists | None
) -> PrefillConfig:
    """The tile shapes of the portable kernel on pages of a benchmark."""
    shape = batch.shape
    group_size = shape.num_q_heads // shape.num_kv_heads
    heads_per_list = group_size if block_lists is None else shape.num_q_heads // block_lists.block_ids.shape[0]
    return prefill_config(
        shape.head_dim,
        shape.dtype,
        device_capability(batch.query.device),
        block_size=tiles.block_size,
        tokens_per_tile=min(tiles.block_size, max(batch.query_lens_cpu)),
        heads_that_share=group_size if heads_per_list % group_size == 0 else 1,
        keys_in_a_row=math.gcd(shape.page_size, 128),
        has_turn=turn is not None,
        has_lists=block_lists is not None,
    )


def pass_of(batch: PagedBatch, how: Prefill, dense_kernel: DenseKernel) -> Pass:
    """The batch as the engine's metadata has it."""
    device = batch.query.device
    maker = PassMaker(batch.shape.num_kv_heads, dense_kernel, num_multiprocessors(device), None, False, device)
    return maker.prefill(how, paged_of(batch), batch.query_start_loc.tolist(), batch.seq_lens_cpu, 0, turns=False)


def through_the_engine(batch: PagedBatch, how: Prefill, dense_kernel: DenseKernel) -> OutCall:
    """Prefill of one layer as the engine's layers call it."""
    each, out = pass_of(batch, how, dense_kernel), torch.empty_like(batch.query)
    layer = LayerContext(index=0, next_index=None, turn=None, selector=FlexSelector())

    def run() -> torch.Tensor:
        launch.attend(each, batch.query, kv_of(batch), layer, batch.shape.scale, out)
        return out

    return run


def prefill_fa3(batch: PagedBatch) -> OutCall | None:
    """Dense causal prefill by FlashAttention 3 as the engine calls it; None where it is not available."""
    if batch.query.device.type != "cuda" or launch.fa3_refusal(batch.shape.head_dim, batch.shape.dtype):
        return None
    return through_the_engine(batch, DensePrefill(), "fa3")


def prefill_flex(batch: PagedBatch, gamma: float) -> OutCall:
    """Dynamic sparse prefill of one layer with the default options: select, attend."""
    return through_the_engine(batch, FlexPrefill(gamma=gamma), "triton")


def write_kv(batch: PagedBatch) -> OutCall:
    """Write random keys and values of the batch's query tokens into its cache, and return the cache."""
    shape, device = batch.shape, batch.query.device
    generator = torch.Generator(device).manual_seed(0)
    new = torch.randn(
        len(batch.query), shape.num_kv_heads, 2 * shape.head_dim, dtype=shape.dtype, device=device, generator=generator
    )
    key, value = new.split(shape.head_dim, dim=-1)
    lens = zip(batch.query_lens_cpu, batch.seq_lens_cpu, strict=True)
    positions = [torch.arange(seq_len - query_len, seq_len) for query_len, seq_len in lens]
    pages = torch.cat(
        [
            row[position.to(device) // shape.page_size]
            for row, position in zip(batch.block_table, positions, strict=True)
        ]
    )
    offsets = torch.cat(positions).to(device) % shape.page_size
    slots = pages.long() * shape.page_size + offsets

    def run() -> torch.Tensor:
        launch.write_kv(key, value, batch.kv_cache, slots)
        return batch.kv_cache

    return run
