"""Dense causal prefill on paged KV: our kernel against FA3, vLLM's Triton kernel and SDPA, one call each."""

from collections.abc import Callable

import torch
from farspan.kernels.prefill import paged_prefill
from farspan.kernels.tiles import make_prefill_tiles

from benchmarks import peers
from benchmarks.gate import check_attention
from benchmarks.inputs import TINY, PagedBatch, PrefillCase, make_paged_batch
from benchmarks.record import BenchmarkError, Recorder
from benchmarks.timing import time_interleaved

BLOCK_SIZE = 128
SLOW_REPEATS = 2  # vLLM's Triton kernel needs seconds a call at 128K


def cases(dry_run: bool) -> list[PrefillCase]:
    """List whole prompts, and the last chunk of a long one as chunked prefill computes it."""
    if dry_run:
        return [PrefillCase(100, 100, TINY), PrefillCase(40, 100, TINY)]
    return [PrefillCase(n, n) for n in (8192, 32768, 65536, 131072)] + [PrefillCase(8192, 131072)]


def ours(batch: PagedBatch, block_size: int = BLOCK_SIZE) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """Build our kernel's call on a batch; the tiles are cut beforehand, as the backend does once per step."""
    tiles = make_prefill_tiles(batch.query_start_loc.tolist(), batch.seq_lens_cpu, block_size, batch.query.device)
    out = torch.empty_like(batch.query)
    lse = torch.empty(batch.shape.num_q_heads, batch.query.shape[0], dtype=torch.float32, device=batch.query.device)
    return lambda: paged_prefill(
        batch.query, batch.kv_cache, batch.block_table, batch.seq_lens, batch.query_start_loc, tiles,
        batch.shape.scale, out=out, lse=lse,
    )  # fmt: skip


def peers_of(batch: PagedBatch, is_whole_prompt: bool) -> dict[str, peers.Peer]:
    """Build the peers that exist on this machine."""
    found = {}
    if peers.has_module("vllm.vllm_flash_attn"):
        found["fa3"] = peers.fa3(batch)
        if is_whole_prompt:
            found["fa3-contiguous"] = peers.fa3_contiguous(batch)
        found["triton_attn"] = peers.triton_attn(batch)
    if is_whole_prompt:
        found["sdpa"] = peers.sdpa(batch)
    return found


def run(recorder: Recorder) -> None:
    for case in cases(recorder.dry_run):
        batch = make_paged_batch([case.query_len], [case.seq_len], case.shape)
        call = ours(batch, 64 if recorder.dry_run else BLOCK_SIZE)
        error = check_attention(batch, *call())
        recorder.note(f"{case.name}: relative error {error:.1e}")
        works: dict[str, Callable[[], object]] = {"farspan": call}
        for name, peer in peers_of(batch, case.query_len == case.seq_len).items():
            try:
                check_attention(batch, peer(), name=name)
            except (BenchmarkError, RuntimeError) as problem:
                recorder.note(f"{case.name}: {name} left out: {problem}")
                continue
            works[name] = peer
        repeats = 10 if case.seq_len > 60000 else 30
        times = time_interleaved(works, repeats=repeats, repeats_of={"triton_attn": SLOW_REPEATS})
        for name, samples in times.items():
            recorder.add("prefill_dense", case.name, name, "time", "ms", samples)
            rates = [batch.causal_flops / (ms * 1e-3) / 1e12 for ms in samples]
            recorder.add("prefill_dense", case.name, name, "rate", "TFLOP/s", rates)
