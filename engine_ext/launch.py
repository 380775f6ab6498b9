"""One attention call: which kernel computes a pass, on which device. The only place that chooses either.

Which form of our prefill kernel a call takes, portable or Hopper's, its launcher reads from `kernels.tuning`. Every
call writes its result in place and can give the log-sum-exp of its logits.
"""

from collections.abc import Sequence
from functools import cache

import torch
from farspan.engine_ext.config import FarspanConfig
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.passes import (
    Decode,
    Dense,
    DenseKernel,
    LayerContext,
    LayerSelection,
    Pass,
    SampledRows,
    Sparse,
)
from farspan.engine_ext.selection.methods import Chunks, DeviceSelections
from farspan.engine_ext.splits import SplitPlan
from farspan.engine_ext.star.positions import Turns
from farspan.kernels.batch import FP8, KVView, PagedBatch
from farspan.kernels.cpu_attention import cpu_attention, write_kv_cpu
from farspan.kernels.decode import paged_decode
from farspan.kernels.decode_workspace import DecodeWorkspace
from farspan.kernels.flex import reference as flex_on_host
from farspan.kernels.flex import select as flex_on_gpu
from farspan.kernels.flex import tile_rows as tile_rows_on_gpu
from farspan.kernels.flex import tile_rows_reference as tile_rows_on_host
from farspan.kernels.flex.coverage import kept_share
from farspan.kernels.kv_write import write_kv as write_kv_triton
from farspan.kernels.page_choice_reference import selected_decode_cpu
from farspan.kernels.prefill import paged_prefill
from farspan.kernels.rotary_turn import Turn, apply_turn, turn_rows
from farspan.kernels.selected_decode import selected_decode
from farspan.kernels.tiles import BlockLists, PrefillTiles

FA3_MAX_HEAD_SIZE = 256
FA3_DTYPES = (torch.float16, torch.bfloat16)


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
) -> None:
    """Store a step's [num_tokens, num_kv_heads, head_dim] keys and values in their slots; slot -1 is skipped.

    pages: [num_pages, num_kv_heads, page_size, 2 * head_dim]; slot_mapping: [num_tokens] int. key_scale, value_scale:
    what they are divided by first, for float8.
    """
    write = write_kv_cpu if is_on_host(key) else write_kv_triton
    write(key, value, pages, slot_mapping, key_scale=key_scale, value_scale=value_scale)


def as_pages(kv_cache: torch.Tensor) -> torch.Tensor:
    """A layer's KV cache in the dtype of its numbers: vLLM brings a float8 cache as bytes."""
    return kv_cache.view(FP8) if kv_cache.dtype == torch.uint8 else kv_cache


def attend(
    each: Pass,
    query: torch.Tensor,
    kv: KVView,
    layer: LayerContext,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute one pass.

    query, out: [num_tokens, num_q_heads, head_dim], the rows of the pass and the query heads that `kv` serves.
    kv: the KV heads of the pass, this step's tokens included. scale: factor on the logits of true keys. lse: where the
    LSE goes, for passes that are parts; its rows are contiguous.
    Returns the LSE, [num_q_heads, num_tokens] float32, natural log, -inf where a query sees no key.
    """
    turn, work = layer.turn if each.turns else None, each.work
    scale *= kv.key_scale
    if isinstance(work, Decode) and work.selections is not None:
        assert turn is None
        assert lse is None
        return decode_selected(query, kv, each.batch, scale, work, work.selections[layer.index], out)
    if isinstance(work, Dense) and work.kernel == "fa3" and each.batch.max_kv_len > 0:
        assert turn is None
        assert not kv.is_fp8
        found = prefill_fa3(query, kv, each.batch, scale, out, causal=each.is_causal)
        return found if lse is None else lse.copy_(found)
    if lse is None:
        lse = torch.empty(query.shape[1], query.shape[0], dtype=torch.float32, device=query.device)
    if each.batch.max_kv_len == 0:
        out.zero_()
        lse.fill_(float("-inf"))
    elif isinstance(work, Decode):
        assert each.is_causal or work.query_len == 1
        decode(
            query,
            kv,
            each.batch,
            scale,
            work.splits,
            turn,
            out,
            lse,
            work.workspace,
            causal=each.is_causal,
            query_len=work.query_len,
        )
    elif isinstance(work, Dense):
        prefill(query, kv, each.batch, work.tiles, scale, turn, out, lse, causal=each.is_causal)
    else:
        attend_sparse(query, kv, each, work, layer, scale, turn, out, lse)
    return lse


def attend_sparse(
    query: torch.Tensor,
    kv: KVView,
    each: Pass,
    work: Sparse,
    layer: LayerContext,
    scale: float,
    turn: Turn | None,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Select blocks and attend to them; where statistics ask for it, also measure what the blocks kept."""
    assert each.is_causal
    chunks = Chunks(query, kv, each.batch, work.tiles, scale, turn, work.spans)
    lists = work.lists
    if lists is None:
        assert layer.selector is not None
        lists = layer.selector.block_lists(work.prefill, chunks, selections_of(query))
    prefill(query, kv, each.batch, work.tiles, scale, turn, out, lse, block_lists=lists)
    stats = layer.selector.stats if layer.selector is not None else None
    if stats is not None and work.samples is not None:
        coverage = measure_coverage(query, kv, work.samples, scale, turn, lse)
        by_request = coverage.unflatten(1, (each.batch.num_reqs, -1))
        stats.add_coverage(by_request, chunks.q_heads, work.samples.has_choice)


def measure_coverage(
    query: torch.Tensor, kv: KVView, samples: SampledRows, scale: float, turn: Turn | None, kept_lse: torch.Tensor
) -> torch.Tensor:
    """Share of the attention mass that a sparse launch kept on sampled rows: [num_q_heads, num_rows] float32."""
    sampled = query.index_select(0, samples.rows)
    full_lse = torch.empty(query.shape[1], len(sampled), dtype=torch.float32, device=query.device)
    decode(sampled, kv, samples.batch, scale, samples.splits, turn, torch.empty_like(sampled), full_lse, None)
    return kept_share(kept_lse, full_lse, samples.rows)


def decode(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    scale: float,
    splits: SplitPlan,
    turn: Turn | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    workspace: DecodeWorkspace | None,
    *,
    causal: bool = True,
    query_len: int = 1,
) -> None:
    """A few query tokens per request, each over the keys up to its own; one alone sees all keys, causal or not."""
    if is_on_host(query):
        cpu_attention(query, kv, batch, scale, out=out, lse=lse, causal=causal, turn=turn)
        return
    paged_decode(
        query,
        kv,
        batch,
        scale,
        num_splits=splits.num_splits,
        min_split_keys=splits.min_split_keys,
        query_len=query_len,
        is_alone=splits.is_alone,
        turn=turn,
        out=out,
        lse=lse,
        workspace=workspace,
    )


def decode_selected(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    scale: float,
    work: Decode,
    selection: LayerSelection,
    out: torch.Tensor,
) -> torch.Tensor:
    """One query token per request over its pages on the device and a choice of those in host memory.

    Returns the LSE of what was read, until the layer's next call.
    """
    record, num_reqs = selection.record, len(query)
    record.scale = scale
    record.query[:num_reqs].copy_(query)
    lse, left = record.lse[:, :num_reqs], record.left[:, :num_reqs]
    if is_on_host(query):
        selected_decode_cpu(
            query,
            kv,
            selection.bounds,
            batch,
            scale,
            selection.rule,
            out=out,
            lse=lse,
            left=left,
            totals=selection.buffers.totals,
        )
        return lse
    selected_decode(
        query,
        kv,
        selection.bounds,
        batch,
        scale,
        selection.rule,
        selection.buffers,
        num_splits=work.splits.num_splits,
        min_split_keys=work.splits.min_split_keys,
        out=out,
        lse=lse,
        left=left,
        workspace=work.workspace,
        num_sms=selection.num_sms,
    )
    return lse


def prefill(
    query: torch.Tensor,
    kv: KVView,
    batch: PagedBatch,
    tiles: PrefillTiles | None,
    scale: float,
    turn: Turn | None,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    block_lists: BlockLists | None = None,
    causal: bool = True,
) -> None:
    """Chunks over all their keys, or over the blocks listed, by our own kernel of the device.

    Arguments as in `paged_prefill`; the CPU needs tiles for block lists alone.
    """
    if is_on_host(query):
        cpu_attention(
            query,
            kv,
            batch,
            scale,
            out=out,
            lse=lse,
            tiles=tiles,
            block_lists=block_lists,
            causal=causal,
            turn=turn,
        )
        return
    assert tiles is not None
    paged_prefill(
        query,
        kv,
        batch,
        tiles,
        scale,
        block_lists=block_lists,
        causal=causal,
        turn=turn,
        out=out,
        lse=lse,
    )


def prefill_fa3(
    query: torch.Tensor, kv: KVView, batch: PagedBatch, scale: float, out: torch.Tensor, *, causal: bool
) -> torch.Tensor:
    """Dense prefill by vLLM's FlashAttention 3; returns the LSE, [num_q_heads, num_tokens] float32, natural log."""
    # Its causal chunks are the last of their keys.
    assert batch.first_pos is None or not causal
    from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    if kv.are_adjacent:
        assert batch.num_reqs == 1
        # Without a causal mask its tiles have 176 keys (heads of 128), and it reads pages that they do not divide
        # without the copy engine: 600 TFLOP/s instead of 690 (H200, 8K queries on 80K keys, 2026-11).
        views = [each[None] for each in kv.tokens(batch.max_kv_len)]
        max_kv_len, block_table = views[0].shape[1], None
    else:
        views = [each.transpose(1, 2) for each in kv.split()]  # [num_pages, page_size, num_kv_heads, head_dim]
        max_kv_len, block_table = batch.max_kv_len, batch.block_table
    # The copy engine rejects the odd strides that torch gives to dimensions of size 1.
    key, value = (canonicalize_singleton_dim_strides(each) for each in views)
    _, lse = flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        out=out,
        cu_seqlens_q=batch.query_start_loc,
        max_seqlen_q=batch.max_query_len,
        seqused_k=batch.kv_lens,
        max_seqlen_k=max_kv_len,
        softmax_scale=scale,
        causal=causal,
        block_table=block_table,
        return_softmax_lse=True,
        fa_version=3,
    )
    return lse


ON_HOST = DeviceSelections(flex_on_host.flex_block_lists, tile_rows_on_host.tile_row_lists)
ON_GPU = DeviceSelections(flex_on_gpu.flex_block_lists, tile_rows_on_gpu.tile_row_lists)


def selections_of(query: torch.Tensor) -> DeviceSelections:
    """The dynamic selections of a tensor's device."""
    return ON_HOST if is_on_host(query) else ON_GPU


def choose_dense_kernel(config: FarspanConfig, device: torch.device, head_size: int, dtype: torch.dtype) -> DenseKernel:
    """Which kernel computes dense prefill without a turn. Raises ConfigError where `kernel` cannot be honoured.

    dtype: of the KV cache; uint8 for float8, as vLLM has it. With a turn it is always "triton", or "cpu" there.
    """
    if device.type == "cpu":
        if config.kernel != "auto":
            raise ConfigError(
                f"kernel={config.kernel!r}; on the CPU platform attention is computed in PyTorch, allowed: 'auto'. "
                "Leave kernel out."
            )
        return "cpu"
    if config.kernel == "triton":
        return "triton"
    reason = fa3_refusal(head_size, dtype)
    if reason is None:
        return "fa3"
    if config.kernel == "fa3":
        raise ConfigError(f"kernel='fa3'; {reason}. Use 'auto' or 'triton'.")
    return "triton"


@cache
def fa3_refusal(head_size: int, dtype: torch.dtype) -> str | None:
    """Why FlashAttention 3 cannot serve these layers on this GPU, or None if it can."""
    if head_size > FA3_MAX_HEAD_SIZE:
        return f"FlashAttention 3 supports head sizes up to {FA3_MAX_HEAD_SIZE}, not {head_size}"
    if dtype in (FP8, torch.uint8):
        return "with a KV cache in fp8, FlashAttention 3 would round queries to fp8 too"
    if dtype not in FA3_DTYPES:
        return f"FlashAttention 3 supports float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    try:
        from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported
    except ImportError as error:
        return f"this vLLM has no FlashAttention ({error})"
    return None if is_fa_version_supported(3) else "FlashAttention 3 needs an NVIDIA Hopper GPU and vLLM's build of it"


def at_true_positions(
    heads: torch.Tensor, moved: Sequence[tuple[slice, int | None]], turns: Turns | None
) -> torch.Tensor:
    """Rotate the rows that do not stand at their true positions; the input stays as it is.

    heads: [num_tokens, num_heads, head_dim], queries or keys of a step. moved: (rows, distance in tokens), ascending;
    None: each row by its own angle in `turns.rows`. Returns `heads` itself where nothing moves.
    """
    if not moved:
        return heads
    assert turns is not None, "a layer of an engine with star has its turns"
    is_all = sum(rows.stop - rows.start for rows, _ in moved) == len(heads)
    out = torch.empty_like(heads) if is_all else heads.clone()
    for rows, distance in moved:
        turn = turns.of(distance) if distance is not None else turns.of_rows(rows)
        if is_on_host(heads):
            out[rows] = apply_turn(heads[rows], turn)
        else:
            turn_rows(heads[rows], turn, out=out[rows])
    return out


def is_on_host(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu"
