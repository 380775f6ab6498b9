"""How much attention mass the listed blocks kept, on sampled query rows: kept LSE against full LSE.

A sampled row costs one decode over its prefix, whatever the size of the chunk: about 0.19 ms per layer at 128K (32
query heads on 8, H100). Of selection and sparse attention there (40 ms per layer for the whole prompt), 4 rows are
about 2 % in one chunk, 8 % in chunks of 16K and 60 % in chunks of 2K; by calculation, not measured.
"""

import torch
from farspan.kernels.tuning import SAMPLE_EARLINESS, SAMPLE_FIRST_PLACE, SAMPLE_SPREAD

# Its multiples modulo 1 are a low-discrepancy sequence on [0, 1).
GOLDEN_RATIO = (5**0.5 - 1) / 2


def sample_places(query_len: int, num_rows: int) -> list[int]:
    """Places in [0, query_len) of the rows of one chunk on which the kept mass is measured, ascending.

    One row is in each of `num_rows` equal parts of the chunk, early in it, as the first queries of a chunk are the
    least like its last ones, which the blocks were chosen by. The place differs from part to part: at equal distances
    all rows of a chunk of 2^n tokens would have the same place in their query block, and heads that look a few tokens
    back keep all or nothing by that place alone. A chunk with fewer tokens than rows has rows more than once.
    """
    part_len = query_len / num_rows
    spread = min(part_len, SAMPLE_SPREAD)
    return [
        int(
            part * part_len
            + SAMPLE_EARLINESS * (part_len - spread)
            + (SAMPLE_FIRST_PLACE + part * GOLDEN_RATIO) % 1 * spread
        )
        for part in range(num_rows)
    ]


def kept_share(kept_lse: torch.Tensor, full_lse: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Share of the attention mass that sparse attention kept on sampled rows.

    kept_lse: [num_q_heads, num_tokens] float32, natural log, of the sparse attention; full_lse: [num_q_heads, num_rows]
        float32 of the same queries over all their keys; rows: [num_rows] int32 or int64, places in `kept_lse`.
    Returns [num_q_heads, num_rows] float32, at most 1; no host sync.
    """
    return (kept_lse.index_select(1, rows) - full_lse).exp_().clamp_max_(1.0)
