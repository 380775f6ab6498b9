"""What Triton must not compile kernels anew for: numbers and places that change from step to step.

Triton has a kernel of its own for integers that are 1, multiples of 16 or neither, and for pointers that are aligned to
16 bytes or not, in every combination; a request would wait seconds for each. Both lists are for `triton.jit`, which
takes from them what a kernel has.
"""

STEP_NUMBERS = [
    "max_blocks",
    "min_blocks",
    "min_split_blocks",
    "num_blocks",
    "num_selected",
    "num_splits",
    "num_tiles",
    "num_tokens",
    "shift",
    "stride_gamma_head",
    "stride_gamma_request",
    "stride_head_mask",
    "stride_lse",
    "stride_lse_a",
    "stride_lse_b",
    "stride_lse_head",
    "stride_lse_token",
]
"""For `do_not_specialize`. Not `num_pieces`: see `prefill_kernel`."""

INDEX_POINTERS = [
    "block_table_ptr",
    "lse_a_ptr",
    "lse_b_ptr",
    "lse_ptr",
    "query_start_loc_ptr",
    "query_start_ptr",
    "requests_ptr",
    "seq_lens_ptr",
    "slot_mapping_ptr",
    "table_ptr",
    "tile_block_ptr",
    "tile_request_ptr",
    "tile_slot_ptr",
]
"""For `do_not_specialize_on_alignment`."""
