"""What `benchmarks.compare_revisions` compares: calls of kernels, and requests in vLLM."""

from dataclasses import dataclass
from typing import Any

from benchmarks.engine import CALIBRATED_8B, Request
from benchmarks.inputs import LLAMA_8B, TINY, AttentionShape

TIME_ONCE = "time once"
"""The message that asks a worker for one timing of its case."""
ENGINE_REPEATS = 5
OUTPUT_LEN = 33
# Half the layers of an 8B model: the ratios are the same in half the time.
ENGINE_MODEL = CALIBRATED_8B | {"num_hidden_layers": 16}


@dataclass(frozen=True)
class KernelCase:
    """One call of a function of the adapter module on one batch."""

    kernel: str
    """The function's name."""
    label: str
    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]
    gamma: float | None = None
    """Argument of `prefill_flex`, whose inputs are then calibrated; None for other functions."""
    in_graph: bool = False
    """Whether to time the call in a CUDA graph: calls of few microseconds would measure how fast Python launches."""
    shape: AttentionShape = LLAMA_8B

    @property
    def name(self) -> str:
        gamma = "" if self.gamma is None else f"-g{self.gamma}"
        return f"{self.kernel}{gamma}-{self.label}-b{len(self.seq_lens)}-{self.shape.label}"


def prefill_cases(
    lens: list[tuple[int, int]], gammas: tuple[float, ...], shape: AttentionShape = LLAMA_8B
) -> list[KernelCase]:
    """List dense and flex prefill of one request: (query_len, seq_len) each."""
    kernels: list[tuple[str, float | None]] = [("prefill", None), ("prefill_fa3", None)]
    kernels += [("prefill_flex", gamma) for gamma in gammas]
    return [
        KernelCase(
            kernel, f"n{seq}" if query == seq else f"q{query}-n{seq}", (query,), (seq,), gamma=gamma, shape=shape
        )
        for kernel, gamma in kernels
        for query, seq in lens
    ]


def kernel_cases(dry_run: bool) -> list[KernelCase]:
    """List decode, dense and flex prefill, and the writing of new keys and values."""
    if dry_run:
        return [
            KernelCase("decode", "n100", (1, 1), (100, 33), in_graph=True, shape=TINY),
            *prefill_cases([(70, 200)], (0.9,), TINY),
            KernelCase("write_kv", "n70", (70,), (200,), in_graph=True, shape=TINY),
        ]
    decodes = [(1, 8192), (1, 131072), (8, 32768), (32, 8192)]
    return [
        *(KernelCase("decode", f"n{n}", (1,) * b, (n,) * b, in_graph=True) for b, n in decodes),
        *prefill_cases([(8192, 8192), (32768, 32768), (8192, 131072)], (0.9, 0.95)),
        KernelCase("write_kv", "n8192", (8192,), (8192,), in_graph=True),
        KernelCase("write_kv", "n1", (1,) * 32, (8192,) * 32, in_graph=True),
    ]


@dataclass(frozen=True)
class EngineCase:
    """The options of both engines, and the requests to send to each."""

    prefill: dict[str, Any]
    requests: dict[str, list[Request]]
    """By the name of the method in the rows."""


def engine_cases(dry_run: bool) -> list[EngineCase]:
    """List a dense case, and a flex case with two gammas on one engine."""
    lengths = [50, 200] if dry_run else [32768, 131072]

    def requests(overrides: dict[str, Any] | None = None) -> list[Request]:
        return [Request(n, 4 if dry_run else OUTPUT_LEN, ENGINE_REPEATS, overrides) for n in lengths]

    flex: dict[str, Any] = {"method": "flex", "gamma": 0.95}
    if dry_run:
        flex |= {"min_seq_len": 0, "min_chunk_len": 0, "min_budget": 0}
    return [
        EngineCase({"method": "dense"}, {"dense": requests()}),
        EngineCase(flex, {"flex-g0.95": requests(), "flex-g0.9": requests({"farspan.gamma": 0.9})}),
    ]
