"""Our kernels' calls on a benchmark's batch, one function each.

Buffers and tiles are made beforehand, as the engine does. `prefill_fa3`, `prefill_flex` and `write_kv` go the way of
the engine's own layers. `benchmarks.compare_revisions` loads this module, or one like it for another revision. The
stages of flex prefill, called one by one, are in `prefill_flex` and `select`.
"""

from collections.abc import Callable

import torch
from farspan.engine_ext.config import DensePrefill, FarspanConfig, FlexPrefill, Prefill
from farspan.engine_ext.dispatch import fa3_refusal, make_launcher
from farspan.engine_ext.dispatch import prefill_fa3 as launch_fa3
from farspan.engine_ext.metadata import PrefillGroup
from farspan.engine_ext.selection.methods import FlexSelector, LayerShape
from farspan.kernels.decode import choose_num_splits, decode_workspace, paged_decode
from farspan.kernels.prefill import paged_prefill
from farspan.kernels.rotary_turn import RotaryShift
from farspan.kernels.tiles import PrefillTiles, make_prefill_tiles

from benchmarks.inputs import PagedBatch

Call = Callable[[], tuple[torch.Tensor, torch.Tensor]]
"""Computes one layer; returns out [num_tokens, num_q_heads, head_dim] and lse [num_q_heads, num_tokens] float32."""
OutCall = Callable[[], torch.Tensor]
"""The same without the LSE."""


def block_size_of(batch: PagedBatch) -> int:
    """Tokens of a tile: the engine's, or fewer for the small pages of a dry run."""
    return max(64, batch.shape.page_size)


def tiles_of(batch: PagedBatch) -> PrefillTiles:
    starts = batch.query_start_loc.tolist()
    return make_prefill_tiles(starts, batch.seq_lens_cpu, block_size_of(batch), batch.query.device)


def empty_results(batch: PagedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and LSE of a batch, not filled."""
    shape = (batch.shape.num_q_heads, len(batch.query))
    return torch.empty_like(batch.query), torch.empty(shape, dtype=torch.float32, device=batch.query.device)


def decode(batch: PagedBatch, string: RotaryShift | None = None) -> Call:
    """Decode of one query token per request. string: shifted positions."""
    shape, device, num_reqs = batch.shape, batch.query.device, len(batch.seq_lens_cpu)
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    max_seq_len = max(batch.seq_lens_cpu)
    num_splits = choose_num_splits(num_reqs, shape.num_kv_heads, max_seq_len, num_sms)
    # Sized for one request more: some sizes hold no room for the largest batch.
    workspace = decode_workspace(
        num_reqs + 1, shape.num_q_heads, shape.num_kv_heads, shape.head_dim, max_seq_len, num_sms, device
    )
    out, lse = empty_results(batch)
    return lambda: paged_decode(
        batch.query, batch.kv_cache, batch.block_table, batch.seq_lens, shape.scale,
        num_splits=num_splits, string=string, out=out, lse=lse, workspace=workspace,
    )  # fmt: skip


def prefill(batch: PagedBatch, string: RotaryShift | None = None) -> Call:
    """Dense causal prefill by our Triton kernel. string: shifted positions."""
    tiles, (out, lse) = tiles_of(batch), empty_results(batch)
    return lambda: paged_prefill(
        batch.query, batch.kv_cache, batch.block_table, batch.seq_lens, batch.query_start_loc, tiles,
        batch.shape.scale, string=string, max_query_len=max(batch.query_lens_cpu), out=out, lse=lse,
    )  # fmt: skip


def group_of(batch: PagedBatch, how: Prefill) -> PrefillGroup:
    """The batch as the engine's metadata has it."""
    num_reqs = len(batch.seq_lens_cpu)
    return PrefillGroup(
        prefill=how,
        token_start=0,
        num_tokens=len(batch.query),
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        block_table=batch.block_table,
        max_query_len=max(batch.query_lens_cpu),
        max_seq_len=max(batch.seq_lens_cpu),
        tiles=None if isinstance(how, DensePrefill) else tiles_of(batch),
        request_ids=torch.arange(num_reqs, dtype=torch.int32, device=batch.query.device),
    )


def prefill_fa3(batch: PagedBatch) -> OutCall | None:
    """Dense causal prefill by FlashAttention 3 as the engine calls it; None where it is not to be had."""
    if batch.query.device.type != "cuda" or fa3_refusal(batch.shape.head_dim, batch.shape.dtype):
        return None
    group, out = group_of(batch, DensePrefill()), torch.empty_like(batch.query)

    def run() -> torch.Tensor:
        launch_fa3(batch.query, batch.kv_cache, group, batch.shape.scale, out)
        return out

    return run


def prefill_flex(batch: PagedBatch, gamma: float) -> OutCall:
    """Dynamic sparse prefill of one layer with the default options: select, attend, measure, repair.

    The layer's budgets go on from call to call, as in an engine.
    """
    shape, device = batch.shape, batch.query.device
    options = FlexPrefill(gamma=gamma, min_seq_len=0)
    launcher = make_launcher(FarspanConfig(), device, shape.head_dim, shape.dtype)
    layer = LayerShape(
        layer_index=0,
        num_q_heads=shape.num_q_heads,
        num_kv_heads=shape.num_kv_heads,
        scale=shape.scale,
        max_model_len=max(batch.seq_lens_cpu),
        tp_rank=0,
        tp_size=1,
        device=device,
    )
    selector, group, (out, lse) = FlexSelector(options, layer), group_of(batch, options), empty_results(batch)
    query, cache, scale = batch.query, batch.kv_cache, shape.scale

    def run() -> torch.Tensor:
        lists = selector.block_lists_for(query, cache, group)
        launcher.prefill(query, cache, group, lists, scale, None, out, lse)
        launcher.prefill(query, cache, group, None, scale, None, out, lse, selector.measure(query, cache, group, lse))
        return out

    return run


def write_kv(batch: PagedBatch) -> OutCall:
    """Write the keys and values of the batch's query tokens into their pages; returns what they hold then."""
    shape, device = batch.shape, batch.query.device
    launcher = make_launcher(FarspanConfig(), device, shape.head_dim, shape.dtype)
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
        launcher.write_kv(key, value, batch.kv_cache, slots)
        return batch.kv_cache

    return run
