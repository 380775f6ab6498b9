"""Where sparse prefill pays: decided for every request and chunk, on the host, by what was measured."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from farspan.engine_ext.support import config_of
from farspan.kernels.tuning import (
    DENSE_SPLIT_SHARE,
    DENSE_TFLOPS,
    FLEX_EXPECTED_DENSITY,
    FLEX_HOST_MS,
    FLEX_SELECTION_MS,
    FLEX_SELECTION_SHARE,
    FLEX_SPEED,
    HOPPER_MULTIPROCESSORS,
    TILE_ROWS_SPAN_LEN,
    hopper_log_sums_config,
    hopper_prefill_config,
)

SparseKernel = Literal["hopper", "portable"]
"""Of selection and sparse attention."""


@dataclass(frozen=True)
class AttentionSize:
    """What a layer computes per token, on one rank."""

    num_q_heads: int
    head_dim: int
    kernel: SparseKernel = "portable"


def sparse_kernel(
    capability: tuple[int, int], head_dim: int, kv_dtype: torch.dtype, page_size: int, *, has_turn: bool
) -> SparseKernel:
    """Which kernels prefill whole tiles sparsely.

    capability: of the device, (0, 0) for the CPU; kv_dtype: of the KV cache; page_size: tokens of its pages; has_turn:
    whether queries are turned, for which selection has the portable kernel alone.
    """
    if has_turn:
        return "portable"
    device = (head_dim, kv_dtype, capability)
    selects = hopper_log_sums_config(*device, block_size=128, page_size=page_size, rows_per_padded_spans=256)
    attends = hopper_prefill_config(
        *device,
        block_size=128,
        page_size=page_size,
        tokens_per_tile=128,
        num_heads=1,
        num_kv_heads=1,
        has_turn=False,
        has_lists=True,
    )
    return "portable" if selects is None or attends is None else "hopper"


def sparse_kernel_of(vllm_config: Any, head_dim: int) -> SparseKernel:
    """Which kernels prefill sparsely in an engine; does not initialise CUDA, and is the same in every process of it."""
    from vllm.platforms import current_platform

    capability = current_platform.get_device_capability() if current_platform.is_cuda() else None
    if capability is None:
        return "portable"
    config, cache = config_of(vllm_config), vllm_config.cache_config
    kv_dtype = torch.float8_e4m3fn if cache.cache_dtype.startswith("fp8") else vllm_config.model_config.dtype
    has_turn = config.string is not None or config.star is not None
    return sparse_kernel(tuple(capability), head_dim, kv_dtype, cache.block_size, has_turn=has_turn)


def sparse_pays(size: AttentionSize, query_len: int, kv_len: int) -> bool:
    """Whether a chunk of flex takes less time than dense attention on it, in every layer.

    query_len: tokens of the chunk, the last of `kv_len` keys. Times are those of a model fitted to one device for each
    kernel; the answer is the same on every device with that kernel, as results depend on it.
    """
    dense_ms, sparse_ms = layer_ms(size, query_len, kv_len, expected_density(kv_len))
    return sparse_ms < dense_ms


def layer_ms(size: AttentionSize, query_len: int, kv_len: int, density: float) -> tuple[float, float]:
    """What one layer's attention of a chunk takes by the model: dense, and sparse with its selection, in ms.

    density: of the spans of query tiles that the chunk holds whole; without one, both are equal.
    """
    first = kv_len - query_len
    whole_first = -(-first // TILE_ROWS_SPAN_LEN) * TILE_ROWS_SPAN_LEN
    whole_end = kv_len // TILE_ROWS_SPAN_LEN * TILE_ROWS_SPAN_LEN
    # Pairs of a query and a key: of all queries, and of those in spans that the chunk holds whole.
    pairs, whole_pairs = _pairs(first, kv_len), _pairs(whole_first, whole_end)
    width = 64 if size.head_dim <= 64 else 128
    ms_per_pair = 4 * size.num_q_heads * size.head_dim / (DENSE_TFLOPS[width] * 1e9)
    # One program, of a head and a tile, that reads all keys alone on its multiprocessor: no launch ends before it.
    longest = kv_len * 128 * ms_per_pair * HOPPER_MULTIPROCESSORS / size.num_q_heads
    dense_ms = pairs * ms_per_pair
    num_programs = size.num_q_heads * (-(-kv_len // 128) - first // 128)
    if num_programs >= DENSE_SPLIT_SHARE * HOPPER_MULTIPROCESSORS:
        dense_ms = max(dense_ms, longest)
    if whole_first >= whole_end:
        return dense_ms, dense_ms
    attended = pairs - whole_pairs + whole_pairs * density
    # Programs of tiles that a cut leaves dense read all keys.
    longest *= 1.0 if whole_pairs < pairs else density
    sparse_ms = max(attended * ms_per_pair, longest) / FLEX_SPEED[size.kernel][width]
    sparse_ms += FLEX_SELECTION_MS + whole_pairs * ms_per_pair * FLEX_SELECTION_SHARE[size.kernel][width]
    # The device is idle while it waits for the host, so what it saves below the host's time is not saved.
    return dense_ms, max(sparse_ms, FLEX_HOST_MS)


def _pairs(first: int, end: int) -> int:
    """Causal pairs of the queries at positions [first, end)."""
    return (end * (end + 1) - first * (first + 1)) // 2


def expected_density(kv_len: int) -> float:
    """Share of the causal blocks that real heads read over a prefix of this length, on the dense side."""
    return next(density for length, density in FLEX_EXPECTED_DENSITY if kv_len >= length)
