"""Attention over short block lists on Hopper: how the launcher of short lists launches the Gluon kernel."""

import torch
from farspan.kernels.hopper import short_lists_forms
from farspan.kernels.hopper.short_lists_kernel import BLOCK_SIZE, KEYS, hopper_short_lists_kernel
from farspan.kernels.hopper.tile_steps import ROWS_AT_ONCE
from farspan.kernels.tiles import BlockLists
from farspan.kernels.tuning import HopperShortListConfig
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor


def hopper_short_lists(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    block_lists: BlockLists,
    scale_log2: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    config: HopperShortListConfig,
) -> None:
    """As `short_list_attention`, for such tensors as `tuning.hopper_short_list_config` takes, without a mask.

    scale_log2: factor on the logits, times log2(e).
    """
    heads = q.shape[2]
    kv_len, kv_heads = k.shape[1:3]
    num_list_heads, num_tiles, max_blocks = block_lists.block_ids.shape
    kernel, form = hopper_short_lists_kernel, {"PEELED": config.form == 1}
    if config.num_rings == 2 or config.registers != 104:
        kernel = short_lists_forms.hopper_short_lists_kernel
        form = {"FORM": config.form, "RINGS": config.num_rings, "REGISTERS": config.registers}
    kernel[(min(num_tiles * heads, config.num_programs),)](
        _rows(q, BLOCK_SIZE.value),
        _rows(k, KEYS.value),
        _rows(v, KEYS.value),
        _rows(out, ROWS_AT_ONCE.value),
        lse,
        block_lists.block_ids,
        block_lists.block_counts,
        scale_log2,
        num_tiles,
        num_tiles // q.shape[0],
        max_blocks,
        kv_len,
        NUM_HEADS=heads,
        GROUP_SIZE=heads // kv_heads,
        HEADS_PER_LIST=heads // num_list_heads,
        HAS_LSE=lse is not None,
        STAGES=config.num_stages,
        **form,
        num_warps=4,
        maxnreg=config.max_registers,
    )


def _rows(tensor: torch.Tensor, box: int) -> TensorDescriptor:
    """The copy engine's view of [batch, length, heads, head_dim]: boxes of `box` tokens of one head."""
    batch, length, heads, head_dim = tensor.shape
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return TensorDescriptor(tensor, [batch * length, heads * head_dim], [tensor.stride(1), 1], [box, head_dim], layout)
