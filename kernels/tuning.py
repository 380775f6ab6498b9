"""Tile shapes and other measured constants, each with the hardware and the date it was tuned on.

Constants of one kernel stay here so that a new device means one new row in one file. What was only compiled for a
device, not run there, says so.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class PrefillConfig:
    """How `paged_prefill` cuts its work into programs."""

    block_t: int
    """Query tokens of a program, a power of two."""
    heads_per_tile: int
    """Query heads of one KV head that a program computes side by side."""
    block_n: int
    """Keys of one step; divides the block size of the lists."""
    num_warps: int
    num_stages: int
    use_tma: bool
    """Load keys and values through the tensor copy engine where the pages allow it."""
    kv_heads_together: int
    """KV heads whose tiles run side by side, before the next ones."""

    @property
    def block_m(self) -> int:
        """Rows of a program: its tokens times its heads, these padded to a power of two."""
        return self.block_t * next_power_of_2(self.heads_per_tile)


def next_power_of_2(number: int) -> int:
    """The smallest power of two at or above a positive number."""
    return 1 << (number - 1).bit_length()


@lru_cache
def device_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) for the CPU, where kernels run in Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@lru_cache
def prefill_config(
    head_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    block_size: int,
    tokens_per_tile: int,
    heads_that_share: int,
    has_shift: bool,
) -> PrefillConfig:
    """Choose the tile shapes of `paged_prefill`.

    capability: of the device, (0, 0) for the interpreter.
    block_size: tokens of a KV block and of a query tile, 64 or 128.
    tokens_per_tile: the most tokens a query tile can have.
    heads_that_share: query heads that read the same keys, values and block lists.
    has_shift: whether a second, rotated query tile is held.
    """
    is_hopper = capability[0] == 9
    is_wide = dtype == torch.float32
    # Rows of a program, keys of a step, warps, stages. Shapes of 16-bit types that only were compiled, for 8.0 and 9.0,
    # have no spills and stay within the 99 KiB of shared memory that 8.6 and 8.9 have.
    if is_wide:
        # Three tf32 products stand for each float32 one, which costs registers. Compiled only.
        rows, block_n, num_warps, num_stages = (16, 32, 4, 2) if head_dim <= 128 else (16, 16, 8, 2)
    elif head_dim > 128 and has_shift:
        # Compiled only.
        rows, block_n, num_warps, num_stages = 64, 16, 8, 2
    elif head_dim > 128:
        # Compiled only.
        rows, block_n, num_warps, num_stages = (128, 32, 8, 3) if is_hopper else (64, 32, 8, 3)
    elif is_hopper:
        # H100 80GB, 2026-11-22.
        rows, block_n, num_warps, num_stages = 128, 128, 8, 2 if has_shift else 3
    else:
        # Compiled only.
        rows, block_n, num_warps, num_stages = 128, 64 if head_dim <= 64 else 32, 8, 3

    block_t = min(block_size, next_power_of_2(tokens_per_tile), rows)
    heads_per_tile = max(
        heads
        for heads in range(1, heads_that_share + 1)
        if heads_that_share % heads == 0 and (heads == 1 or block_t * next_power_of_2(heads) <= rows)
    )
    # The tensor cores take no fewer than 16 rows.
    block_t = max(block_t, 16 // next_power_of_2(heads_per_tile))
    block_m = block_t * next_power_of_2(heads_per_tile)
    return PrefillConfig(
        block_t=block_t,
        heads_per_tile=heads_per_tile,
        block_n=min(block_n, block_size),
        # Fewer rows than planned for want fewer warps; wide heads keep them for their registers.
        num_warps=num_warps if block_m == rows or (head_dim > 128 and block_m >= 64) else 4,
        num_stages=num_stages,
        use_tma=is_hopper and not is_wide,
        kv_heads_together=1,
    )
