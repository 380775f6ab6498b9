import itertools

import pytest
import torch
from farspan.kernels.tuning import prefill_config

CAPABILITIES = [(0, 0), (8, 0), (8, 6), (9, 0), (12, 0)]


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("capability", CAPABILITIES, ids=lambda pair: f"sm{pair[0]}{pair[1]}")
def test_prefill_shapes_fit_the_work(head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> None:
    for block_size, tokens, heads, keys, has_turn, has_lists in itertools.product(
        (64, 128), (1, 5, 64, 100, 128), (1, 4, 6, 7, 8), (0, 16, 32, 64, 128), (False, True), (False, True)
    ):
        config = prefill_config(
            head_dim,
            dtype,
            capability,
            block_size=block_size,
            tokens_per_tile=min(tokens, block_size),
            heads_that_share=heads,
            keys_in_a_row=keys,
            has_turn=has_turn,
            has_lists=has_lists,
        )
        assert heads % config.heads_per_tile == 0
        assert block_size % config.block_n == 0
        assert 16 <= config.block_m <= 128
        # A copy of more keys than are in consecutive rows would read another page's.
        assert not config.use_tma or keys >= config.block_n
