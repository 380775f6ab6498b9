"""Flash-decoding on paged KV in CUDA graphs, one query token per request: ours, FA3, vLLM's Triton kernel and SDPA.

FlashInfer too, and FlashAttention 4 (CuTe) outside of graphs, where they are installed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import calls, peers
from benchmarks.gate import check_attention
from benchmarks.inputs import LLAMA_8B, TINY, AttentionShape, PagedBatch, make_paged_batch
from benchmarks.record import Recorder
from benchmarks.timing import Work, time_graphs, time_interleaved

CHOOSES_CASES = True
# The copies of the inputs in a graph are together larger than this, so that none is found in the L2 cache.
COLD_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Case:
    """A batch of requests with `seq_lens` keys."""

    seq_lens: tuple[int, ...]
    label: str
    shape: AttentionShape = LLAMA_8B

    @property
    def name(self) -> str:
        return f"{self.label}-b{len(self.seq_lens)}-{self.shape.label}"


def ragged_lens(low: int, high: int, count: int) -> tuple[int, ...]:
    """Draw lengths in [low, high], seeded."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randint(low, high + 1, (count,), generator=generator).tolist())


def cases(dry_run: bool) -> list[Case]:
    """List single requests of three lengths, two full batches, and a batch of different lengths."""
    if dry_run:
        return [Case((100,), "n100", TINY), Case((17, 64, 33), "n17to64", TINY)]
    uniform = [(1, 8192), (1, 32768), (1, 131072), (8, 32768), (32, 8192)]
    ragged = Case(ragged_lens(4096, 8192, 32), "n4096to8192")
    return [*(Case((n,) * b, f"n{n}") for b, n in uniform), ragged]


def builders_of(case: Case) -> dict[str, Callable[[PagedBatch], Callable[[], torch.Tensor]]]:
    """The peers that exist on this machine and can run the case, by name."""
    found: dict[str, Callable[[PagedBatch], Callable[[], torch.Tensor]]] = {}
    if peers.has_module("vllm.vllm_flash_attn"):
        found["fa3"] = lambda batch: peers.fa3(batch, in_graph=True)
        found["triton_attn"] = peers.triton_attn
    if peers.has_module(peers.MODULES["flashinfer"]):
        found["flashinfer"] = peers.flashinfer
    if len(set(case.seq_lens)) == 1:
        found["sdpa"] = peers.sdpa
    return found


def eager_peers(recorder: Recorder, case: Case, batch: PagedBatch) -> dict[str, Work]:
    """Peers outside of CUDA graphs: FA3, which there chooses its number of splits, and what may be installed."""
    found: dict[str, Work] = {}
    for name, build in (("fa3", peers.fa3), ("fa4", peers.fa4)):
        if not peers.has_module(peers.MODULES[name]):
            continue
        try:
            peer = build(batch)
            check_attention(batch, peer(), name=name)
        except Exception as problem:  # of the peer's compiler, or a shape that it does not serve
            recorder.note(f"{case.name}: {name} left out: {type(problem).__name__}: {problem}")
            continue
        found[f"{name}-eager"] = peer
    return found


def run(recorder: Recorder) -> None:
    if missing := peers.missing():
        recorder.note(missing)
    for case in filter(lambda case: recorder.wants(case.name), cases(recorder.dry_run)):
        first = make_paged_batch([1] * len(case.seq_lens), case.seq_lens, case.shape)
        copies = max(1, -(-COLD_BYTES // first.kv_bytes)) if not recorder.dry_run else 1
        batches = [first] + [
            make_paged_batch([1] * len(case.seq_lens), case.seq_lens, case.shape, seed=seed)
            for seed in range(1, copies)
        ]
        recorder.note(
            f"{case.name}: relative error {check_attention(first, *calls.decode(first)()):.1e}, {copies} copies"
        )
        works: dict[str, list[Work]] = {"farspan": [calls.decode(batch) for batch in batches]}
        for name, build in builders_of(case).items():
            try:
                peer_works = [build(batch) for batch in batches]
                check_attention(first, peer_works[0](), name=name)
            except Exception as problem:  # of the peer's compiler, or a shape that it does not serve
                recorder.note(f"{case.name}: {name} left out: {type(problem).__name__}: {problem}")
                continue
            works[name] = list(peer_works)
        times = time_graphs(works)
        times |= time_interleaved(eager_peers(recorder, case, first), repeats=30)
        for name, samples in times.items():
            recorder.add("decode", case.name, name, "time", "ms", samples)
            bandwidths = [first.kv_bytes / (ms * 1e-3) / 1e12 for ms in samples]
            recorder.add("decode", case.name, name, "bandwidth", "TB/s", bandwidths)
