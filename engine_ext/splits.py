"""How flash-decoding cuts its key sequences: the one decision, and the room that all of its answers need."""

from dataclasses import dataclass

import torch
from farspan.kernels.tuning import (
    DECODE_MAX_SPLITS,
    DECODE_MIN_QUEUED_SPLIT_KEYS,
    DECODE_MIN_SPLIT_KEYS,
    DECODE_PROGRAMS_PER_SM,
    DECODE_QUEUED_PROGRAMS_PER_SM,
)


@dataclass(frozen=True)
class SplitPlan:
    """How one launch cuts its sequences."""

    num_splits: int
    """Parts of each sequence, at least 1."""
    min_split_keys: int
    """Fewest keys of a part."""
    is_alone: bool = False
    """Whether every part of every KV head has a multiprocessor to itself."""


def plan_splits(num_reqs: int, num_kv_heads: int, max_kv_len: int, num_sms: int) -> SplitPlan:
    """Cut sequences so that the multiprocessors of a device are loaded evenly, whatever the lengths of a batch.

    max_kv_len: an upper bound in tokens; under graph capture the longest that the graph may see.
    num_sms: multiprocessors of the device.
    """
    tiles = max(num_reqs * num_kv_heads, 1)
    if tiles >= num_sms:
        wanted, min_keys = DECODE_QUEUED_PROGRAMS_PER_SM * num_sms // tiles, DECODE_MIN_QUEUED_SPLIT_KEYS
    elif num_reqs > 1:
        wanted, min_keys = DECODE_PROGRAMS_PER_SM * num_sms // tiles, DECODE_MIN_SPLIT_KEYS
    else:
        # Nothing to even out: of one, two or three programs per multiprocessor the first that leaves few without.
        per_sms = range(1, DECODE_PROGRAMS_PER_SM + 1)
        shares = [(per_sm * num_sms // tiles) * tiles / (per_sm * num_sms) for per_sm in per_sms]
        per_sm = 1 + next((index for index, share in enumerate(shares) if share >= 0.9), shares.index(max(shares)))
        wanted, min_keys = per_sm * num_sms // tiles, DECODE_MIN_SPLIT_KEYS
    num_splits = max(min(wanted, -(-max_kv_len // min_keys), DECODE_MAX_SPLITS), 1)
    is_queued = num_splits * tiles > DECODE_PROGRAMS_PER_SM * num_sms
    return SplitPlan(
        num_splits,
        DECODE_MIN_QUEUED_SPLIT_KEYS if is_queued else DECODE_MIN_SPLIT_KEYS,
        is_alone=num_splits * tiles <= num_sms,
    )


def most_parts(max_num_reqs: int, num_kv_heads: int, max_kv_len: int, num_sms: int) -> int:
    """Requests times splits, at most, over all batches of 1 to `max_num_reqs` requests.

    Every batch size is asked, as the number of splits jumps up where the tiles first fill the device.
    """
    return max(
        num_reqs * plan_splits(num_reqs, num_kv_heads, max_kv_len, num_sms).num_splits
        for num_reqs in range(1, max_num_reqs + 1)
    )


def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; 1 for the CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
