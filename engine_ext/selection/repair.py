"""When sparse attention has broken its promise: what gamma means on measured rows."""

import torch

# Heads are computed again where they kept less than gamma by more than this: a few rows tell a chunk's mean no better.
# Chosen by what four rows can tell, not by measurement.
COVERAGE_SLACK = 0.05


def heads_below_gamma(coverage: torch.Tensor, gamma: float) -> torch.Tensor:
    """The heads that kept too little of a request to be left as they are: [num_q_heads, num_reqs] bool, contiguous.

    coverage: [num_q_heads, num_reqs, rows] float32 as measured; gamma: as asked for.
    """
    return coverage.mean(2) < gamma - COVERAGE_SLACK
