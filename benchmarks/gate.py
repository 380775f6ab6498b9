"""The correctness check before every timing: no time is recorded for a kernel whose result is wrong."""

import math

import torch
from farspan.kernels.rotary_turn import Turn, apply_turn

from benchmarks.inputs import PagedBatch, contiguous_kv
from benchmarks.record import BenchmarkError

SAMPLED_ROWS = 24
LSE_TOLERANCE = 2e-3


def sample_rows(batch: PagedBatch, request: int, num_rows: int) -> torch.Tensor:
    """Choose query rows of a request: the first, the last, both sides of tile edges, and random ones, seeded."""
    length = batch.query_lens_cpu[request]
    wanted = {0, length - 1, length // 2, min(63, length - 1), min(64, length - 1), min(128, length - 1)}
    generator = torch.Generator().manual_seed(request)
    wanted |= set(torch.randint(length, (max(num_rows - len(wanted), 0),), generator=generator).tolist())
    return torch.tensor(sorted(wanted))


def attend_rows(
    batch: PagedBatch, request: int, rows: torch.Tensor, dtype: torch.dtype, turn: Turn | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute some rows of a request in plain PyTorch: products in `dtype`, softmax in float32.

    rows: [num_rows] indices into the request's chunk. turn: that of shifted positions, or None.
    Returns out [num_rows, num_q_heads, head_dim] and lse [num_q_heads, num_rows], both float32.
    """
    shape, start = batch.shape, int(batch.query_start_loc[request])
    context = batch.seq_lens_cpu[request] - batch.query_lens_cpu[request]
    key, value = contiguous_kv(batch, request)
    device = key.device
    query = batch.query[start + rows.to(device)].to(dtype)
    turned_query = None if turn is None else apply_turn(query, turn)
    position = (rows.to(device) + context)[:, None]
    key_position = torch.arange(batch.seq_lens_cpu[request], device=device)
    group = shape.num_q_heads // shape.num_kv_heads
    outs, lses = [], []
    for head in range(shape.num_kv_heads):  # one at a time: the scores of all heads would not fit at 128K
        heads = slice(head * group, (head + 1) * group)
        k = key[:, head].to(dtype).T
        logits = query[:, heads].transpose(0, 1) @ k
        if turn is not None and turned_query is not None:
            is_turned = key_position < turn.bounds(position)
            logits = torch.where(is_turned, turned_query[:, heads].transpose(0, 1) @ k, logits)
        logits = (logits.float() * shape.scale).masked_fill(key_position > position, -math.inf)
        lse = logits.logsumexp(-1)
        weights = (logits - lse[..., None]).exp().to(dtype)
        outs.append((weights @ value[:, head].to(dtype)).float())
        lses.append(lse)
    return torch.cat(outs).transpose(0, 1), torch.cat(lses)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error of a row relative to the row's norm; both are [..., head_dim]."""
    difference = torch.linalg.vector_norm(actual.float() - expected, dim=-1)
    return float((difference / torch.linalg.vector_norm(expected, dim=-1).clamp_min(1e-6)).max())


def check_attention(
    batch: PagedBatch,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    *,
    name: str = "farspan",
    turn: Turn | None = None,
) -> float:
    """Compare causal attention with float32 on sampled rows of (up to four) requests.

    out: [num_tokens, num_q_heads, head_dim]; lse: [num_q_heads, num_tokens] float32, natural log, or None.
    turn: the one that it was computed with. name: the variant, for errors.
    Allowed is twice the error of plain PyTorch at the batch's dtype. Returns the largest relative error; raises
    BenchmarkError where an error is larger than allowed.
    """
    worst = 0.0
    num_reqs = len(batch.seq_lens_cpu)
    for request in sorted({0, num_reqs // 3, 2 * num_reqs // 3, num_reqs - 1}):
        rows = sample_rows(batch, request, SAMPLED_ROWS)
        expected, expected_lse = attend_rows(batch, request, rows, torch.float32, turn)
        plain, _ = attend_rows(batch, request, rows, batch.shape.dtype, turn)
        allowed = 2 * relative_error(plain, expected) + 1e-5
        index = int(batch.query_start_loc[request]) + rows.to(out.device)
        error = relative_error(out[index], expected)
        if not error <= allowed:
            raise BenchmarkError(f"{name}: request {request}: relative error {error:.2e}, allowed {allowed:.2e}")
        if lse is not None:
            lse_error = float((lse[:, index] - expected_lse).abs().max())
            if not lse_error <= LSE_TOLERANCE:
                raise BenchmarkError(f"{name}: request {request}: LSE off by {lse_error:.2e}, allowed {LSE_TOLERANCE}")
        worst = max(worst, error)
    return worst
