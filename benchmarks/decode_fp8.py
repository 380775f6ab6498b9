"""Flash-decoding on an fp8 KV cache beside bf16, and of four tokens per request beside one, in CUDA graphs."""

from dataclasses import dataclass, replace

import torch
from farspan.kernels.batch import FP8

from benchmarks import calls, peers
from benchmarks.decode import COLD_BYTES
from benchmarks.gate import check_attention
from benchmarks.inputs import LLAMA_8B, TINY, AttentionShape, PagedBatch, make_paged_batch
from benchmarks.record import BenchmarkError, Recorder
from benchmarks.timing import Work, time_graphs

DRAFTED = 4
"""Tokens of a request that verifies three drafts."""


@dataclass(frozen=True)
class Case:
    """`num_reqs` requests of `seq_len` keys."""

    num_reqs: int
    seq_len: int
    shape: AttentionShape = LLAMA_8B

    @property
    def name(self) -> str:
        return f"n{self.seq_len}-b{self.num_reqs}-{self.shape.label}"


def cases(dry_run: bool) -> list[Case]:
    """List batches with as many keys as fill the bandwidth, and a short request."""
    if dry_run:
        return [Case(1, 100, TINY), Case(3, 64, TINY)]
    return [Case(1, 131072), Case(8, 32768), Case(32, 8192), Case(1, 8192)]


def make_batch(case: Case, query_len: int, seed: int) -> PagedBatch:
    """A batch whose keys and values are numbers that float8 has."""
    batch = make_paged_batch([query_len] * case.num_reqs, [case.seq_len] * case.num_reqs, case.shape, seed=seed)
    return replace(batch, kv_cache=batch.kv_cache.to(FP8).to(case.shape.dtype))


def run(recorder: Recorder) -> None:
    for case in cases(recorder.dry_run):
        first = make_batch(case, 1, 0)
        # The copies in fp8 are half as large.
        copies = max(1, -(-2 * COLD_BYTES // first.kv_bytes)) if not recorder.dry_run else 1
        batches = [first, *(make_batch(case, 1, seed) for seed in range(1, copies))]
        drafted = [make_batch(case, DRAFTED, seed) for seed in range(copies)]
        in_fp8 = [replace(batch, kv_cache=batch.kv_cache.to(FP8)) for batch in batches]
        works: dict[str, list[Work]] = {
            "farspan": [calls.decode(batch) for batch in batches],
            "farspan-fp8": [calls.decode(batch) for batch in in_fp8],
            f"farspan-q{DRAFTED}": [calls.decode(batch) for batch in drafted],
            f"farspan-fp8-q{DRAFTED}": [
                calls.decode(replace(batch, kv_cache=batch.kv_cache.to(FP8))) for batch in drafted
            ],
        }
        if peers.has_module("vllm.vllm_flash_attn"):
            works["fa3"] = [peers.fa3(batch, in_graph=True) for batch in batches]
        for name in list(works):
            checked = drafted[0] if name.endswith(f"q{DRAFTED}") else first
            try:
                result = works[name][0]()
                out, lse = result if isinstance(result, tuple) else (result, None)
                error = check_attention(checked, out, lse, name=name)
            except (BenchmarkError, RuntimeError) as problem:
                recorder.note(f"{case.name}: {name} left out: {problem}")
                del works[name]
                continue
            recorder.note(f"{case.name}: {name}: relative error {error:.1e}")
        for name, samples in time_graphs(works).items():
            num_bytes = first.kv_bytes // (2 if "fp8" in name else 1)
            recorder.add("decode_fp8", case.name, name, "time", "ms", samples)
            bandwidths = [num_bytes / (ms * 1e-3) / 1e12 for ms in samples]
            recorder.add("decode_fp8", case.name, name, "bandwidth", "TB/s", bandwidths)
        del batches, drafted, in_fp8, works
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
