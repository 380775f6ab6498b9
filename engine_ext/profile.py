"""Let vLLM's memory profile see what sparse prefill, and prefill over spans, allocate for a while."""

import torch
from farspan.engine_ext.config import DensePrefill, FarspanConfig, FlexPrefill, Prefill
from farspan.engine_ext.launch import attend, is_on_host
from farspan.engine_ext.parts import RunningSum
from farspan.engine_ext.pass_maker import PassMaker
from farspan.engine_ext.passes import LayerContext
from farspan.engine_ext.selection.methods import FlexSelector
from farspan.engine_ext.splits import num_multiprocessors
from farspan.engine_ext.support import PREFERRED_PAGE_SIZE
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.tiles import to_device


def run_largest_chunk(
    prefill: Prefill, query: torch.Tensor, num_kv_heads: int, scale: float, max_model_len: int
) -> None:
    """Prefill a chunk of all the query's tokens at the end of the longest prompt, over one page of zeros.

    It holds as much temporary memory as a real chunk does, so vLLM leaves room for it beside the KV cache. Nothing is
    done for other methods than flex, whose temporaries grow with neither the prompt nor the heads, and on the CPU,
    where vLLM profiles no memory.
    query: [num_tokens, num_q_heads, head_dim], of which at most the first `max_model_len` tokens are the chunk.
    """
    if is_on_host(query) or not isinstance(prefill, FlexPrefill):
        return
    # vLLM profiles all tokens of a step, which may be more than one request can have.
    query = query[:max_model_len]
    num_tokens, device = len(query), query.device
    num_pages = -(-max_model_len // PREFERRED_PAGE_SIZE)
    pages = query.new_zeros(1, num_kv_heads, PREFERRED_PAGE_SIZE, 2 * query.shape[2])
    both = to_device([[0, num_tokens], [max_model_len, 0]], device)
    batch = PagedBatch(
        query_start_loc=both[0],
        kv_lens=both[1, :1],
        block_table=torch.zeros(1, num_pages, dtype=torch.int32, device=device),
        max_query_len=num_tokens,
        max_kv_len=max_model_len,
    )
    maker = PassMaker(num_kv_heads, "triton", num_multiprocessors(device), None, False, device)
    each = maker.prefill(prefill, batch, [0, num_tokens], [max_model_len], 0, turns=False)
    attend(each, query, KVView(pages), LayerContext(0, None, None, FlexSelector()), scale, torch.empty_like(query))


def largest_sums(config: FarspanConfig, query: torch.Tensor, num_kv_heads: int) -> RunningSum | None:
    """Allocate what a chunk of all the query's tokens takes while its attention goes over spans of a context.

    query: [num_tokens, num_q_heads, head_dim]. None where there are no spans. vLLM's profile sees the peak, so the
    caller may drop the result at once.
    """
    if is_on_host(query) or config.offload is None or not isinstance(config.prefill, DensePrefill):
        return None
    group_size = 1 if config.offload.group_size == "auto" else min(config.offload.group_size, num_kv_heads)
    sums = RunningSum(query[:, : group_size * (query.shape[1] // num_kv_heads)])
    sums.total = sums.widened()
    return sums
