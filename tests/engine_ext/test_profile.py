"""The largest chunk of sparse prefill, as vLLM's memory profile sees it."""

import pytest
import torch
from farspan.engine_ext import launch, parts, profile
from farspan.engine_ext.config import DensePrefill, FlexPrefill
from farspan.kernels.prefill import paged_prefill

FLEX = FlexPrefill(min_seq_len=0, min_chunk_len=0, min_budget=0)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(query_len, kv_len) of each prefill; kernels are launched as on a GPU, for Triton's interpreter."""
    seen = []

    def spy(query, kv, batch, *args, **kwargs):
        seen.append((len(query), batch.max_kv_len))
        return paged_prefill(query, kv, batch, *args, **kwargs)

    monkeypatch.setattr(launch, "paged_prefill", spy)
    for module in (profile, launch, parts):
        monkeypatch.setattr(module, "is_on_host", lambda tensor: False)
    return seen


@pytest.mark.parametrize(
    ("num_tokens", "query_len"), [(128, 128), (512, 384)], ids=["a-chunk", "a-step-of-more-than-one-request"]
)
def test_largest_chunk_ends_the_longest_prompt(launched: list[tuple[int, int]], num_tokens: int, query_len: int):
    profile.run_largest_chunk(FLEX, torch.randn(num_tokens, 2, 32), 1, 0.2, 384)
    assert launched == [(query_len, 384)]


def test_other_methods_have_nothing_to_show(launched: list[tuple[int, int]]):
    profile.run_largest_chunk(DensePrefill(), torch.randn(128, 2, 32), 1, 0.2, 384)
    assert launched == []
