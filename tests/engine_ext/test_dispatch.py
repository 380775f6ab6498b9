"""The launchers: each writes what the reference computes, out of the same metadata."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from farspan.engine_ext.config import DensePrefill, parse_config
from farspan.engine_ext.dispatch import CpuLauncher, CudaLauncher, DecodePlanner, choose_dense_kernel, fa3_refusal
from farspan.engine_ext.errors import ConfigError
from farspan.engine_ext.metadata import PrefillGroup, StepMetadata
from farspan.kernels.tiles import make_prefill_tiles

from tests.kernels.helpers import PagedBatch, make_batch, random_block_lists, reference_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAUNCHERS = {"cuda": CudaLauncher} if DEVICE.type == "cuda" else {"cpu": CpuLauncher, "cuda": CudaLauncher}


def group_of(batch: PagedBatch) -> PrefillGroup:
    query_start_loc, seq_lens = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
    return PrefillGroup(
        prefill=DensePrefill(),
        token_start=0,
        num_tokens=batch.query.shape[0],
        query_start_loc=batch.query_start_loc,
        seq_lens=batch.seq_lens,
        block_table=batch.block_table,
        max_query_len=max(end - start for start, end in pairwise(query_start_loc)),
        max_seq_len=max(seq_lens),
        tiles=make_prefill_tiles(query_start_loc, seq_lens, 64, DEVICE),
        request_ids=torch.arange(len(seq_lens), dtype=torch.int32, device=DEVICE),
    )


def step_of(batch: PagedBatch, num_decodes: int, num_splits: int) -> StepMetadata:
    return StepMetadata(
        num_decodes=num_decodes,
        seq_lens=batch.seq_lens,
        block_table=batch.block_table,
        query_start_loc=batch.query_start_loc,
        num_splits=num_splits,
        decode_workspace=None,
        prefill_groups=(),
    )


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "lists"])
def test_prefill(launcher: Any, sparse: bool) -> None:
    batch = make_batch([7, 130], [7, 200], device=DEVICE)
    group = group_of(batch)
    lists = random_block_lists(group.tiles, 4, 0.5) if sparse else None
    out = torch.full_like(batch.query, float("nan"))
    lse = torch.full((4, len(out)), float("nan"), device=DEVICE) if sparse else None
    launcher().prefill(batch.query, batch.kv_cache, group, lists, batch.scale, None, out, lse)
    expected, expected_lse = reference_attention(batch, tiles=group.tiles, block_lists=lists)
    torch.testing.assert_close(out, expected.to(out), atol=2e-5, rtol=1e-4)
    if lse is not None:
        torch.testing.assert_close(lse, expected_lse.to(lse), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_decode(launcher: Any) -> None:
    batch = make_batch([1, 1, 1, 9], [5, 63, 150, 9], device=DEVICE)
    out = torch.full_like(batch.query[:3], float("nan"))
    num_splits = 1 if launcher is CpuLauncher else 2
    launcher().decode(batch.query[:3], batch.kv_cache, step_of(batch, 3, num_splits), batch.scale, None, out)
    expected, _ = reference_attention(batch)
    torch.testing.assert_close(out, expected[:3].to(out), atol=2e-5, rtol=1e-4)


def test_a_host_has_no_workspace() -> None:
    planner = DecodePlanner(
        max_num_reqs=4, max_seq_len=100, num_q_heads=4, num_kv_heads=2, head_dim=64, device=torch.device("cpu")
    )
    assert planner.workspace is None
    assert planner.num_splits(3, 100) == 1


def test_kernel_choice_on_a_gpu() -> None:
    device = torch.device("cuda")
    assert choose_dense_kernel(parse_config({"kernel": "triton"}), device, 128, torch.bfloat16) == "triton"
    assert choose_dense_kernel(parse_config(None), device, 128, torch.float32) == "triton"
    assert "float16 and bfloat16, not float32" in str(fa3_refusal(128, torch.float32))
    assert "head sizes up to 256, not 512" in str(fa3_refusal(512, torch.bfloat16))
    with pytest.raises(ConfigError, match="kernel='fa3'; FlashAttention 3 supports float16 and bfloat16"):
        choose_dense_kernel(parse_config({"kernel": "fa3"}), device, 128, torch.float32)
