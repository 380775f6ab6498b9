"""The number of splits, and the workspace that is enough for all of them."""

import pytest
from farspan.engine_ext.splits import most_parts, plan_splits
from farspan.kernels.tuning import DECODE_MAX_SPLITS

# RTX 4090, L4, A100, H100 and a small one.
MULTIPROCESSORS = [16, 58, 108, 128, 132]


@pytest.mark.parametrize("num_sms", MULTIPROCESSORS)
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("max_kv_len", [1, 1000, 131072])
def test_every_batch_fits_the_workspace(num_sms: int, num_kv_heads: int, max_kv_len: int) -> None:
    largest = 0
    for num_reqs in range(1, 301):
        plan = plan_splits(num_reqs, num_kv_heads, max_kv_len, num_sms)
        assert 1 <= plan.num_splits <= min(DECODE_MAX_SPLITS, max_kv_len)
        assert plan.num_splits == 1 or num_reqs * num_kv_heads * plan.num_splits <= 16 * num_sms
        assert plan.is_alone == (num_reqs * num_kv_heads * plan.num_splits <= num_sms)
        largest = max(largest, num_reqs * plan.num_splits)
        # An engine for at most this many requests.
        assert most_parts(num_reqs, num_kv_heads, max_kv_len, num_sms) >= largest
        # Shorter sequences, and smaller batches, never need more.
        assert plan_splits(num_reqs, num_kv_heads, max(max_kv_len // 3, 1), num_sms).num_splits <= plan.num_splits


@pytest.mark.parametrize(("num_sms", "num_kv_heads", "max_num_reqs"), [(128, 8, 16), (58, 8, 8), (132, 2, 2)])
def test_where_the_number_of_splits_jumps_up(num_sms: int, num_kv_heads: int, max_num_reqs: int) -> None:
    """The largest batch needs more parts than all smaller ones, since it is the first to fill the device."""
    full = max_num_reqs * plan_splits(max_num_reqs, num_kv_heads, 131072, num_sms).num_splits
    assert full > most_parts(max_num_reqs - 1, num_kv_heads, 131072, num_sms)
    assert most_parts(max_num_reqs, num_kv_heads, 131072, num_sms) == full
