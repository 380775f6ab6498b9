"""Numbers that change from step to step must not make Triton compile another kernel: a request would wait seconds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from farspan.kernels.decode import paged_decode
from farspan.kernels.flex.select import flex_block_lists
from farspan.kernels.flex.spans import SpanRule, make_spans
from farspan.kernels.flex.tile_rows import tile_row_lists
from farspan.kernels.flex.types import NO_LIMIT, Budget
from farspan.kernels.prefill import paged_prefill

from tests.kernels.helpers import make_batch

SHAPE: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "page_size": 16, "dtype": torch.bfloat16}


def run_step(query_lens: tuple[int, ...], seq_lens: tuple[int, ...]) -> None:
    """Selection, sparse and dense prefill and decode of one batch."""
    batch = make_batch(query_lens, seq_lens, device=torch.device("cuda"), **SHAPE)
    # The same size of programs for all chunks: other sizes are other kernels.
    paged = (batch.query, batch.kv, replace(batch.paged, max_query_len=64))
    tiles = batch.tiles(64)
    selection = flex_block_lists(*paged, tiles, batch.scale, Budget(0.9, 0.1, min_blocks=1, max_blocks=NO_LIMIT))
    paged_prefill(*paged, tiles, batch.scale, block_lists=selection.block_lists)
    paged_prefill(*paged, tiles, batch.scale)
    starts, ends = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    spans = make_spans(starts, ends, tiles, SpanRule(128, 16))
    tile_row_lists(*paged, tiles, spans, batch.scale, Budget(0.9, 0.0, min_blocks=1, max_blocks=NO_LIMIT))
    last = batch.query[batch.query_start_loc[1:].long() - 1]
    paged_decode(last, batch.kv, batch.paged, batch.scale, num_splits=2, min_split_keys=128)


@pytest.mark.gpu
def test_another_batch_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # 9 to 16 blocks, for which selection has one set of kernels; the first chunk holds one whole span of tile rows.
    # Triton specializes on 1 and on multiples of 16.
    run_step((300, 70), (1000, 600))
    compiled: list[str] = []

    def note(*_: Any, fn: Any, **__: Any) -> bool:
        compiled.append(fn.name)
        return False

    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", note)
    for query_lens, seq_lens in [((1000,), (1000,)), ((1,), (993,)), ((64, 64, 64, 1), (640, 1000, 704, 900))]:
        run_step(query_lens, seq_lens)
    assert not compiled
