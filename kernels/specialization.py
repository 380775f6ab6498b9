"""Kernel arguments whose values must not select another compiled kernel, because they change from step to step.

Triton compiles separate kernels for integers that are 1, multiples of 16 or neither, and for pointers that are aligned
to 16 bytes or not, in every combination; a request would wait seconds for each. `triton.jit` takes both lists and uses
the names that a kernel has.
"""

STEP_NUMBERS = [
    "heads_in_a_row",
    "max_blocks",
    "min_blocks",
    "min_split_blocks",
    "num_blocks",
    "num_parts",
    "num_reqs",
    "num_row_blocks",
    "num_rows",
    "num_spans",
    "num_splits",
    "num_tiles",
    "query_len",
    "stride_angle",
    "stride_block_table",
    "stride_lse_head",
    "stride_lse_token",
    "stride_part_lse",
    "stride_part_lse_head",
    "stride_part_lse_token",
    "turn_offset",
]
"""For `do_not_specialize`. `heads_in_a_row` goes by the KV heads of a pass. Not `num_pieces`: see `prefill_kernel`."""

INDEX_POINTERS = [
    "block_table_ptr",
    "cut_tile_ptr",
    "first_pos_ptr",
    "kv_lens_ptr",
    "lse_ptr",
    "query_start_loc_ptr",
    "slot_mapping_ptr",
    "span_index_ptr",
    "span_request_ptr",
    "span_row_ptr",
    "span_tile_ptr",
    "tile_block_ptr",
    "tile_request_ptr",
]
"""For `do_not_specialize_on_alignment`."""
