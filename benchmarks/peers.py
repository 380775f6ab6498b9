"""The kernels that we compare with, each called as its own library calls it."""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.inputs import PagedBatch, contiguous_kv

Peer = Callable[[], torch.Tensor]
"""Runs once; returns out [num_tokens, num_q_heads, head_dim]."""

FA3_MAX_SPLITS_IN_GRAPHS = 32  # as in vLLM's FLASH_ATTN backend with CUDA graphs
TRITON_SEGMENTS = 16  # as in vLLM's TRITON_ATTN backend
TRITON_MIN_GRID = 128


MODULES = {
    "fa3": "vllm.vllm_flash_attn",
    "fa4": "vllm.vllm_flash_attn.cute.interface",
    "flashinfer": "flashinfer",
    "triton_attn": "vllm.vllm_flash_attn",
}
"""Of each peer that may be missing, a module that only imports where it can run."""
FLASHINFER_WORKSPACE_BYTES = 128 * 2**20


def has_module(name: str) -> bool:
    """Whether a module can be imported here; vLLM's compiled ones cannot on the CPU."""
    return why_missing(name) is None


def why_missing(module: str) -> str | None:
    """Why a module cannot be imported here; None where it can."""
    try:
        importlib.import_module(module)
    except Exception as problem:  # a missing compiled operator can raise any exception
        return f"{type(problem).__name__}: {problem}".splitlines()[0]
    return None


def missing() -> str:
    """One line about the peers that cannot be imported here, each reason once; empty where there are none."""
    names: dict[str, list[str]] = {}
    for name, module in MODULES.items():
        if reason := why_missing(module):
            names.setdefault(reason, []).append(name)
    return "; ".join(
        f"{' and '.join(peers)} {'is' if len(peers) == 1 else 'are'} not here ({reason})"
        for reason, peers in names.items()
    )


def paged_views(batch: PagedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """View the cache as vLLM's backends do: two [num_pages, page_size, num_kv_heads, head_dim] tensors."""
    key, value = batch.kv_cache.transpose(1, 2).split(batch.shape.head_dim, dim=-1)
    return key, value


def paged_arguments(batch: PagedBatch, out: torch.Tensor) -> dict[str, Any]:
    """What vLLM's backends hand to each of their kernels, by the name that all of these kernels have for it."""
    key, value = paged_views(batch)
    return {
        "q": batch.query,
        "k": key,
        "v": value,
        "out": out,
        "cu_seqlens_q": batch.query_start_loc,
        "max_seqlen_q": max(batch.query_lens_cpu),
        "seqused_k": batch.seq_lens,
        "max_seqlen_k": max(batch.seq_lens_cpu),
        "softmax_scale": batch.shape.scale,
        "causal": True,
        "block_table": batch.block_table,
    }


def fa3(batch: PagedBatch, *, in_graph: bool = False) -> Peer:
    """Build FlashAttention 3 on the pages, as vLLM's FLASH_ATTN backend calls it.

    in_graph: with a schedule that is computed beforehand and a fixed bound on splits, as in vLLM's full CUDA graphs;
        otherwise FA3 chooses by its own heuristic.
    """
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    shape, out = batch.shape, torch.empty_like(batch.query)
    arguments = paged_arguments(batch, out)
    metadata = None
    if in_graph:
        metadata = get_scheduler_metadata(
            batch_size=len(batch.seq_lens_cpu),
            max_seqlen_q=arguments["max_seqlen_q"],
            max_seqlen_k=arguments["max_seqlen_k"],
            num_heads_q=shape.num_q_heads,
            num_heads_kv=shape.num_kv_heads,
            headdim=shape.head_dim,
            cache_seqlens=batch.seq_lens,
            qkv_dtype=shape.dtype,
            cu_seqlens_q=batch.query_start_loc,
            page_size=shape.page_size,
            causal=True,
            num_splits=FA3_MAX_SPLITS_IN_GRAPHS,
        )

    def run() -> torch.Tensor:
        flash_attn_varlen_func(
            **arguments,
            scheduler_metadata=metadata,
            num_splits=FA3_MAX_SPLITS_IN_GRAPHS if in_graph else 0,
            fa_version=3,
        )
        return out

    return run


def fa3_contiguous(batch: PagedBatch) -> Peer:
    """Build FlashAttention 3 on contiguous keys and values, of a batch of one whole prompt."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    key, value = contiguous_kv(batch, 0)
    out = torch.empty_like(batch.query)
    length = batch.seq_lens_cpu[0]

    def run() -> torch.Tensor:
        flash_attn_varlen_func(
            q=batch.query,
            k=key,
            v=value,
            out=out,
            cu_seqlens_q=batch.query_start_loc,
            cu_seqlens_k=batch.query_start_loc,
            max_seqlen_q=length,
            max_seqlen_k=length,
            softmax_scale=batch.shape.scale,
            causal=True,
            fa_version=3,
        )
        return out

    return run


def fa4(batch: PagedBatch) -> Peer:
    """Build FlashAttention 4 (CuTe) on the pages, as vLLM's FLASH_ATTN backend calls it."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    out = torch.empty_like(batch.query)
    arguments = paged_arguments(batch, out)

    def run() -> torch.Tensor:
        flash_attn_varlen_func(**arguments, num_splits=0, fa_version=4)
        return out

    return run


def flashinfer(batch: PagedBatch) -> Peer:
    """Build FlashInfer's prefill on the pages, or its decode where each request has one query token.

    Called as vLLM's FLASHINFER backend does, and planned beforehand, so that CUDA graphs can hold it; the package
    chooses the kernel and compiles it at the first call, for which it needs CUDA's compiler.
    """
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper, BatchPrefillWithPagedKVCacheWrapper

    shape, device = batch.shape, batch.query.device
    counts = [-(-length // shape.page_size) for length in batch.seq_lens_cpu]
    starts = torch.tensor([0, *counts], dtype=torch.int32, device=device).cumsum(0, dtype=torch.int32)
    last = [length - (count - 1) * shape.page_size for length, count in zip(batch.seq_lens_cpu, counts, strict=True)]
    pages = (
        starts,
        torch.cat([row[:count] for row, count in zip(batch.block_table, counts, strict=True)]),
        torch.tensor(last, dtype=torch.int32, device=device),
    )
    heads = (shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.page_size)
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    if set(batch.query_lens_cpu) == {1}:
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        wrapper.plan(*pages, *heads, sm_scale=shape.scale, q_data_type=shape.dtype)
    else:
        wrapper = BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        query_starts = batch.query_start_loc
        wrapper.plan(query_starts, *pages, *heads, causal=True, sm_scale=shape.scale, q_data_type=shape.dtype)
    cache = batch.kv_cache.split(shape.head_dim, dim=-1)
    out = torch.empty_like(batch.query)
    return lambda: wrapper.run(batch.query, cache, out=out)


def triton_attn(batch: PagedBatch) -> Peer:
    """Build the kernel of vLLM's TRITON_ATTN backend."""
    from vllm.v1.attention.ops.triton_unified_attention import unified_attention

    shape, device, out = batch.shape, batch.query.device, torch.empty_like(batch.query)
    arguments = paged_arguments(batch, out)
    threshold = TRITON_MIN_GRID // shape.num_kv_heads
    scratch = (threshold, shape.num_q_heads, TRITON_SEGMENTS)
    segm_output = torch.empty(*scratch, shape.head_dim, dtype=torch.float32, device=device)
    segm_max, segm_expsum = (torch.empty(scratch, dtype=torch.float32, device=device) for _ in range(2))
    descale = torch.ones(1, device=device).expand(len(batch.seq_lens_cpu), shape.num_kv_heads)

    def run() -> torch.Tensor:
        unified_attention(
            **arguments,
            window_size=(-1, -1),
            softcap=0,
            q_descale=None,
            k_descale=descale,
            v_descale=descale,
            seq_threshold_3D=threshold,
            num_par_softmax_segments=TRITON_SEGMENTS,
            softmax_segm_output=segm_output,
            softmax_segm_max=segm_max,
            softmax_segm_expsum=segm_expsum,
        )
        return out

    return run


def sdpa(batch: PagedBatch) -> Peer:
    """Build PyTorch's scaled_dot_product_attention on contiguous keys and values.

    All requests have the same length, and are whole prompts (causal) or have one query token each.
    """
    shape, num_reqs = batch.shape, len(batch.seq_lens_cpu)
    query_len, seq_len = batch.query_lens_cpu[0], batch.seq_lens_cpu[0]
    assert set(batch.query_lens_cpu) == {query_len}
    assert set(batch.seq_lens_cpu) == {seq_len}
    assert query_len in (1, seq_len)
    gathered = [contiguous_kv(batch, request) for request in range(num_reqs)]
    key, value = (torch.stack(part).transpose(1, 2) for part in zip(*gathered, strict=True))
    query = batch.query.view(num_reqs, query_len, shape.num_q_heads, shape.head_dim).transpose(1, 2)

    def run() -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=query_len > 1, scale=shape.scale, enable_gqa=True
        )
        return out.transpose(1, 2).flatten(0, 1)

    return run
