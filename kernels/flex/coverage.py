"""How much attention mass the listed blocks kept, measured on sampled rows, and what reacts to it.

A head that kept clearly too little is told apart by `short_heads`, to be computed again over all its keys;
`BudgetController` raises the budgets of the chunks to come.

A sampled row costs one decode over its prefix, whatever the size of the chunk: about 0.19 ms a layer at 128K (32 query
heads on 8, H100). Of selection and sparse attention there (40 ms a layer for the whole prompt), 4 rows are about 2 % in
one chunk, 8 % in chunks of 16K and 60 % in chunks of 2K; by calculation, not measured.
"""

import torch
from farspan.kernels.cpu_attention import cpu_attention
from farspan.kernels.rotary_turn import RotaryShift

# Heads are computed again where they kept less than gamma by more than this: a few rows tell a chunk's mean no better.
COVERAGE_SLACK = 0.05
# The closed loop never asks for less than this part of the mass that may be lost: gamma 0.95 ends at 0.997.
STRICTEST = 1 / 16
TIGHTEN = 0.5
RELAX = 1.05
# Its multiples modulo 1 fill [0, 1) as evenly as any sequence does.
GOLDEN_RATIO = (5**0.5 - 1) / 2
# Sampled rows lie early in their parts of the chunk, spread over this many tokens. In chunks of 2^n tokens none of the
# usual four then begins a query block, where heads that look a few tokens back lose more than elsewhere.
SPREAD = 512
EARLINESS = 0.25
FIRST_PLACE = 0.37


def sample_rows(query_start_loc: torch.Tensor, rows_per_request: int) -> torch.Tensor:
    """Rows of `query` spread over every request's chunk: [num_reqs, rows_per_request] int64, on the device.

    One row lies in each of as many equal parts of the chunk, early in it, as the first queries of a chunk are the least
    like its last ones, which the blocks were chosen by. The place differs from part to part: at equal distances all
    rows of a chunk of 2^n tokens would have the same place in their query block, and heads that look a few tokens back
    keep all or nothing by that place alone.
    query_start_loc: [num_reqs + 1] int32, no chunk empty. A chunk with fewer tokens has rows more than once.
    """
    starts = query_start_loc[:-1, None].long()
    lens = query_start_loc.diff()[:, None].double()
    parts = torch.arange(rows_per_request, device=query_start_loc.device, dtype=torch.float64)
    part_lens = lens / rows_per_request
    spread = part_lens.clamp_max(SPREAD)
    places = EARLINESS * (part_lens - spread) + (FIRST_PLACE + parts * GOLDEN_RATIO) % 1 * spread
    return starts + (parts * part_lens + places).long()


def measure_coverage(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    scale: float,
    kept_lse: torch.Tensor,
    rows: torch.Tensor,
    string: RotaryShift | None = None,
) -> torch.Tensor:
    """Share of the attention mass that the sparse prefill kept on sampled rows.

    Tensors of the batch as in `flex_block_lists`.
    kept_lse: [num_q_heads, num_tokens] float32, natural log: what the sparse prefill returned.
    rows: [num_reqs, rows_per_request] int64, rows of `query`, as from `sample_rows`.
    string: the shifted rotary positions of the prefill, if any.
    Returns [num_q_heads, num_reqs, rows_per_request] float32, at most 1; no host sync on the GPU.
    """
    num_reqs, rows_per_request = rows.shape
    flat = rows.flatten()
    lens = (seq_lens[:, None] - (query_start_loc[1:, None] - 1 - rows)).flatten().int()
    table = block_table.repeat_interleave(rows_per_request, dim=0)
    sampled = query[flat]
    full_lse = torch.empty(query.shape[1], len(flat), dtype=torch.float32, device=query.device)
    if query.device.type == "cpu":
        starts = torch.arange(len(flat) + 1)
        out = torch.empty_like(sampled)
        cpu_attention(sampled, kv_cache, table, lens, starts, scale, out=out, lse=full_lse, string=string)
    else:
        from farspan.kernels.decode import choose_num_splits, paged_decode

        num_sms = torch.cuda.get_device_properties(query.device).multi_processor_count
        max_seq_len = block_table.shape[1] * kv_cache.shape[2]
        num_splits = choose_num_splits(len(flat), kv_cache.shape[1], max_seq_len, num_sms)
        paged_decode(
            sampled, kv_cache, table, lens, scale, num_splits=num_splits, string=string, lse=full_lse
        )  # fmt: skip
    coverage = (kept_lse[:, flat] - full_lse).exp().clamp_max(1.0)
    return coverage.unflatten(1, (num_reqs, rows_per_request))


def short_heads(coverage: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """The heads that kept too little of a request to be left as they are: [num_q_heads, num_reqs] bool.

    coverage: [num_q_heads, num_reqs, rows] as measured; gamma: [num_reqs] as asked for.
    """
    return coverage.mean(2) < gamma - COVERAGE_SLACK


class BudgetController:
    """Raises the gamma of the heads of one layer that were measured to keep too little. Lives on the device.

    The mass that a head may lose, 1 - gamma, is scaled by a factor in [1/16, 1] of its own: halved when the measured
    coverage falls short, and let go by 5 % a measurement when it does not.
    """

    def __init__(self, num_q_heads: int, device: torch.device) -> None:
        self.strictness = torch.ones(num_q_heads, device=device)
        """[num_q_heads] float32: the factor on 1 - gamma."""
        self.coverage = torch.ones(num_q_heads, device=device)
        """[num_q_heads] float32: mean of the last measurement."""

    def effective_gamma(self, gamma: torch.Tensor) -> torch.Tensor:
        """[num_q_heads, num_reqs] from the requests' gamma [num_reqs]."""
        return 1 - (1 - gamma) * self.strictness[:, None]

    def update(self, coverage: torch.Tensor, gamma: torch.Tensor) -> None:
        """Take in a measurement: coverage [num_q_heads, num_reqs, rows] of requests with gamma [num_reqs]."""
        short = (coverage - gamma[:, None]).mean((1, 2)) < 0
        factor = torch.where(short, self.strictness * TIGHTEN, self.strictness * RELAX)
        self.strictness.copy_(factor.clamp(STRICTEST, 1.0))
        self.coverage.copy_(coverage.mean((1, 2)))
