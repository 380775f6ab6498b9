"""Prefill over random block lists, one call: our kernel of the device, the portable one, and FA3 over all keys.

Every tile reads the first block, its diagonal one, and each other block with the same probability. The rate counts the
blocks that the lists hold, the diagonal ones whole. Inputs are random, so nothing is said about quality.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from farspan.kernels.tiles import BlockLists, PrefillTiles

from benchmarks import calls, peers
from benchmarks.gate import relative_error
from benchmarks.inputs import TINY, AttentionShape, PagedBatch, PrefillCase, make_paged_batch
from benchmarks.record import BenchmarkError, Recorder
from benchmarks.timing import time_interleaved

NAME = "prefill_lists"
# Two kernels that round alike at different places differ by the sum of what each loses.
ALLOWED_ERROR = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Case:
    """A chunk and the density of its lists."""

    chunk: PrefillCase
    density: float
    shared: bool = False
    """One list for the query heads of a KV head, instead of one for each."""

    @property
    def name(self) -> str:
        return f"{self.chunk.name}-density{self.density:g}" + "-shared" * self.shared


def cases(dry_run: bool) -> list[Case]:
    """List a whole prompt and chunks of 8K and 16K, with the densities that flex reaches there."""
    if dry_run:
        return [Case(PrefillCase(70, 200, TINY), 0.5), Case(PrefillCase(70, 200, TINY), 0.5, shared=True)]
    narrow = AttentionShape(head_dim=64)
    return [
        Case(PrefillCase(65536, 65536), 0.3),
        Case(PrefillCase(65536, 65536), 0.3, shared=True),
        Case(PrefillCase(65536, 65536), 0.1),
        Case(PrefillCase(8192, 32768), 0.2),
        Case(PrefillCase(8192, 32768), 0.4),
        Case(PrefillCase(8192, 32768), 0.7),
        Case(PrefillCase(2048, 16384), 0.4),
        Case(PrefillCase(16384, 131072), 0.1),
        Case(PrefillCase(16384, 131072), 0.3),
        Case(PrefillCase(8192, 32768, narrow), 0.2),
        Case(PrefillCase(8192, 32768, narrow), 0.4),
        Case(PrefillCase(8192, 32768, narrow), 0.7),
    ]


def random_lists(tiles: PrefillTiles, num_list_heads: int, density: float) -> BlockLists:
    """Draw a list for each list head and tile, seeded."""
    diagonal = tiles.tile_block.cpu()[:, None]
    block = torch.arange(tiles.max_kv_blocks)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(num_list_heads, tiles.num_tiles, tiles.max_kv_blocks, generator=generator) < density
    kept = (kept | (block == 0)) & (block < diagonal) | (block == diagonal)
    ids = torch.where(kept, block, tiles.max_kv_blocks).sort(-1).values.int()
    device = tiles.tile_block.device
    return BlockLists(ids.contiguous().to(device), kept.sum(-1).int().to(device))


def run(recorder: Recorder) -> None:
    for case in cases(recorder.dry_run):
        run_case(recorder, case, make_paged_batch([case.chunk.query_len], [case.chunk.seq_len], case.chunk.shape))


def run_case(recorder: Recorder, case: Case, batch: PagedBatch) -> None:
    """Check, measure and record every variant of one case."""
    shape, tiles = case.chunk.shape, calls.tiles_of(batch)
    num_list_heads = shape.num_kv_heads if case.shared else shape.num_q_heads
    lists = random_lists(tiles, num_list_heads, case.density)
    ours = calls.prefill(batch, block_lists=lists)
    portable = calls.prefill(batch, block_lists=lists, portable=True)
    error = relative_error(ours()[0], portable()[0].float())
    allowed = ALLOWED_ERROR[shape.dtype]
    recorder.note(f"{case.name}: differs from the portable kernel by {error:.1e}")
    if not error <= allowed:
        raise BenchmarkError(f"{case.name}: differs from the portable kernel by {error:.2e}, allowed {allowed:.2e}")
    works: dict[str, Callable[[], object]] = {"farspan": ours, "farspan-portable": portable}
    if peers.has_module("vllm.vllm_flash_attn"):
        works["fa3"] = peers.fa3(batch)
    blocks = float(lists.block_counts.double().sum()) * shape.num_q_heads / num_list_heads
    flops = 4.0 * tiles.block_size**2 * shape.head_dim * blocks
    for name, samples in time_interleaved(works, repeats=10).items():
        recorder.add(NAME, case.name, name, "time", "ms", samples)
        computed = batch.causal_flops if name == "fa3" else flops
        recorder.add(NAME, case.name, name, "rate", "TFLOP/s", [computed / (ms * 1e-3) / 1e12 for ms in samples])
