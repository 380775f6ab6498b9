"""Tile shapes and other measured constants, each with the hardware and the date it was tuned on.

Constants of one kernel stay here so that a new device means one new row in one file. What was only compiled for a
device, not run there, says so.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

# Shared memory that one program may use, in bytes, by compute capability (CUDA C++ Programming Guide, table of
# technical specifications per compute capability).
SHARED_MEMORY_BYTES = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (12, 0): 99 * 1024,
    (12, 1): 99 * 1024,
}
SMALLEST_SHARED_MEMORY_BYTES = 99 * 1024


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
    is_wide = dtype == torch.float32
    max_rows, block_n, num_stages = 128, 64, 2
    shared_memory = SHARED_MEMORY_BYTES.get(capability, SMALLEST_SHARED_MEMORY_BYTES)
    is_hopper = capability[0] == 9
    if is_wide:
        # Tensor cores in three tf32 passes: right to float32, and rarely used. Compiled for 8.0 and 9.0, not tuned.
        max_rows, block_n, num_stages = (64, 32, 2) if head_dim <= 128 else (32, 16, 2)
    elif head_dim > 128:
        # Compiled for 8.0 and 9.0, not tuned.
        block_n = 64 if shared_memory > 200 * 1024 else 32
    elif is_hopper:
        # H100 80GB, 2026-11-22.
        num_stages = 3 if has_shift else 4

    block_t = min(block_size, next_power_of_2(tokens_per_tile), max_rows)
    heads_per_tile = max(
        heads
        for heads in range(1, heads_that_share + 1)
        if heads_that_share % heads == 0 and (heads == 1 or block_t * next_power_of_2(heads) <= max_rows)
    )
    # The tensor cores take no fewer than 16 rows.
    block_t = max(block_t, 16 // next_power_of_2(heads_per_tile))
    block_m = block_t * next_power_of_2(heads_per_tile)
    return PrefillConfig(
        block_t=block_t,
        heads_per_tile=heads_per_tile,
        block_n=min(block_n, block_size),
        num_warps=8 if block_m >= 128 else 4,
        num_stages=num_stages,
        use_tma=is_hopper and not is_wide,
        kv_heads_together=2,
    )
