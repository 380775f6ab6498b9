"""Selection by sampled rows on Hopper: how the pass over the keys launches its Gluon kernel."""

import torch
from farspan.kernels.batch import PagedBatch
from farspan.kernels.flex.spans import SPAN_MULTIPLE, Spans
from farspan.kernels.hopper.log_sums_kernel import CONSUMERS, hopper_log_sums_kernel
from farspan.kernels.hopper.prefill import tile_view
from farspan.kernels.hopper.tile_steps import BLOCK_N, ROWS_AT_ONCE
from farspan.kernels.repeated_launch import RepeatedLaunch
from farspan.kernels.row_view import RowView
from farspan.kernels.tuning import HopperLogSumsConfig


def hopper_log_sums_launch(
    query: torch.Tensor,
    key_pages: torch.Tensor,
    batch: PagedBatch,
    spans: Spans,
    num_blocks: int,
    config: HopperLogSumsConfig,
    num_splits: int | None = None,
) -> tuple[RowView, RepeatedLaunch]:
    """How the layers of a step see their keys, and their launch.

    query: [num_tokens, num_q_heads, head_dim]; key_pages: [num_pages, num_kv_heads, page_size, head_dim], such as
    `tuning.hopper_log_sums_config` takes. num_splits: of the keys; chosen if None. A call of the launch brings query,
    keys, log-sums and the factor on the logits, times log2(e).
    """
    num_kv_heads, page_size = key_pages.shape[1:3]
    group, rows = query.shape[1] // num_kv_heads, spans.rule.rows_per_span
    segments = CONSUMERS.value * ROWS_AT_ONCE.value // rows
    assert SPAN_MULTIPLE * group % segments == 0, (spans.rule, group)
    programs = spans.num_spans * group // segments * num_kv_heads
    if num_splits is None:
        num_splits = config.num_splits(programs, num_blocks)
    stride_page, stride_head, stride_token, _ = key_pages.stride()
    launch = RepeatedLaunch(
        hopper_log_sums_kernel,
        (programs * num_splits,),
        ("query_ptr", "keys", "log_sums_ptr", "scale_log2"),
        {
            "block_table_ptr": batch.block_table,
            "span_request_ptr": spans.span_request,
            "span_index_ptr": spans.span_index,
            "span_row_ptr": spans.span_row,
            "num_spans": spans.num_spans,
            "num_blocks": num_blocks,
            "num_splits": num_splits,
            "stride_query_token": query.stride(0),
            "stride_query_head": query.stride(1),
            "stride_block_table": batch.block_table.stride(0),
            "page_rows": stride_page // stride_token,
            "head_rows": stride_head // stride_token,
            "GROUP": group,
            "ROWS": rows,
            "SPAN_LEN": spans.rule.span_len,
            "PAGE_SIZE": page_size,
            "STAGES": config.num_stages,
        },
        num_warps=4,
    )
    return tile_view(key_pages, min(page_size, BLOCK_N.value)), launch
