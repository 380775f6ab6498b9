"""Where sparse prefill pays: decided for every request and chunk, on the host, by what was measured."""

from dataclasses import dataclass

from farspan.kernels.tuning import (
    DENSE_TFLOPS,
    FLEX_EXPECTED_DENSITY,
    FLEX_HOST_MS,
    FLEX_SELECTION_MS,
    FLEX_SELECTION_SHARE,
    FLEX_SPEED,
    TILE_ROWS_SPAN_LEN,
)


@dataclass(frozen=True)
class AttentionSize:
    """What a layer computes per token, on one rank."""

    num_q_heads: int
    head_dim: int


def sparse_pays(size: AttentionSize, query_len: int, kv_len: int) -> bool:
    """Whether a chunk of flex takes less time than dense attention on it, in every layer.

    query_len: tokens of the chunk, the last of `kv_len` keys. Times are those of a model fitted to one device; the
    answer is the same on every device, as results depend on it.
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
    dense_ms = pairs * ms_per_pair
    if whole_first >= whole_end:
        return dense_ms, dense_ms
    attended = pairs - whole_pairs + whole_pairs * density
    selection_ms = FLEX_SELECTION_MS + whole_pairs * ms_per_pair * FLEX_SELECTION_SHARE
    sparse_ms = selection_ms + attended * ms_per_pair / FLEX_SPEED[width]
    # The device is idle while it waits for the host, so what it saves below the host's time is not saved.
    return dense_ms, max(sparse_ms, FLEX_HOST_MS)


def _pairs(first: int, end: int) -> int:
    """Causal pairs of the queries at positions [first, end)."""
    return (end * (end + 1) - first * (first + 1)) // 2


def expected_density(kv_len: int) -> float:
    """Share of the causal blocks that real heads read over a prefix of this length, on the dense side."""
    return next(density for length, density in FLEX_EXPECTED_DENSITY if kv_len >= length)
