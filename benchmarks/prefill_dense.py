"""Dense causal prefill on paged KV, one call: our kernels, FA3, vLLM's Triton kernel and SDPA.

FlashAttention 4 (CuTe) and FlashInfer too, where they are installed; vLLM asks for both.
"""

from collections.abc import Callable

from benchmarks import calls, peers
from benchmarks.gate import check_attention
from benchmarks.inputs import TINY, AttentionShape, PagedBatch, PrefillCase, make_paged_batch
from benchmarks.record import Recorder
from benchmarks.timing import time_interleaved

CHOOSES_CASES = True
SLOW_REPEATS = 2  # vLLM's Triton kernel needs seconds per call at 128K


def cases(dry_run: bool) -> list[PrefillCase]:
    """List whole prompts, and the last chunk of a long prompt."""
    if dry_run:
        return [PrefillCase(100, 100, TINY), PrefillCase(40, 100, TINY)]
    whole = [PrefillCase(n, n) for n in (2048, 8192, 32768)]
    narrow = [PrefillCase(n, n, AttentionShape(head_dim=64)) for n in (8192, 32768)]
    return [*whole, *narrow, PrefillCase(65536, 65536), PrefillCase(8192, 131072), PrefillCase(131072, 131072)]


def builders_of(is_whole_prompt: bool) -> dict[str, Callable[[PagedBatch], peers.Peer]]:
    """The peers that can be imported on this machine, by name."""
    found: dict[str, Callable[[PagedBatch], peers.Peer]] = {}
    if peers.has_module(peers.MODULES["fa3"]):
        found["fa3"] = peers.fa3
        if is_whole_prompt:
            found["fa3-contiguous"] = peers.fa3_contiguous
        found["triton_attn"] = peers.triton_attn
    for name, build in (("fa4", peers.fa4), ("flashinfer", peers.flashinfer)):
        if peers.has_module(peers.MODULES[name]):
            found[name] = build
    if is_whole_prompt:
        found["sdpa"] = peers.sdpa
    return found


def run(recorder: Recorder) -> None:
    if missing := peers.missing():
        recorder.note(missing)
    for case in filter(lambda case: recorder.wants(case.name), cases(recorder.dry_run)):
        batch = make_paged_batch([case.query_len], [case.seq_len], case.shape)
        call = calls.prefill(batch)
        error = check_attention(batch, *call())
        recorder.note(f"{case.name}: relative error {error:.1e}")
        portable = calls.prefill(batch, portable=True)
        check_attention(batch, *portable())
        works: dict[str, Callable[[], object]] = {"farspan": call, "farspan-portable": portable}
        for name, build in builders_of(case.query_len == case.seq_len).items():
            try:
                peer = build(batch)
                check_attention(batch, peer(), name=name)
            except Exception as problem:  # of the peer's compiler, or a shape that it does not serve
                recorder.note(f"{case.name}: {name} left out: {type(problem).__name__}: {problem}")
                continue
            works[name] = peer
        repeats = 10 if case.seq_len > 60000 else 30
        times = time_interleaved(works, repeats=repeats, repeats_of={"triton_attn": SLOW_REPEATS})
        for name, samples in times.items():
            recorder.add("prefill_dense", case.name, name, "time", "ms", samples)
            rates = [batch.causal_flops / (ms * 1e-3) / 1e12 for ms in samples]
            recorder.add("prefill_dense", case.name, name, "rate", "TFLOP/s", rates)
