"""vLLM engines for end-to-end benchmarks: each in its own process, timed at the front end.

`measure(spec)` runs one engine; `measure_in_turns(specs)` keeps several engines on one GPU and sends one request at a
time. Every engine is a `python -m benchmarks.engine_worker`, so that engines never share a process.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.record import BenchmarkError
from benchmarks.worker_process import WorkerProcess

LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 132096,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# The same shape with heads that have patterns: see benchmarks.calibrated_model.
CALIBRATED_8B: dict[str, Any] = LLAMA_8B | {"attention_bias": True}
TINY_LLAMA: dict[str, Any] = LLAMA_8B | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
    "torch_dtype": "float32",
    "attention_bias": True,
}
WORKER_ENV = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


LOGPROB_TOLERANCE = 0.25
"""Nats between the first tokens' candidates of two exact engines in bf16: vLLM's Triton kernel and FlashAttention 3
differ by 0.09 to 0.16 on prompts of random tokens."""


@dataclass(frozen=True)
class Request:
    """A prompt of random tokens, sent alone, `repeats` times."""

    prompt_len: int
    output_len: int = 1
    repeats: int = 1
    overrides: dict[str, Any] | None = None
    """SamplingParams.extra_args."""
    cached_len: int = 0
    """Tokens at the beginning that all repeats share; the engine has them in its cache before the first is timed."""
    stages: str = ""
    """Which stages to time, of the `device` or the `host`; neither if empty. For engines that read stages."""


@dataclass(frozen=True)
class EngineSpec:
    """An engine, and the requests to send to it."""

    requests: list[Request]
    model: dict[str, Any] = field(default_factory=lambda: LLAMA_8B)
    """config.json; the weights are random and seeded, the same for every engine."""
    backend: str | None = None
    """vLLM's name of an attention backend; None for vLLM's own choice."""
    options: dict[str, Any] | None = None
    """additional_config["farspan"]."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Further arguments of `LLM`."""
    model_dir: str | None = None
    """A folder with trained weights, used instead of `model`."""
    texts: tuple[Path, ...] = ()
    """Files whose tokens, one file after the other, the prompts begin with; random tokens if empty. Needs `model_dir`,
    which has the tokenizer."""
    reads_selection: bool = False
    """Whether to report what flex prefill kept."""
    reads_stages: bool = False
    """Whether requests may ask for their stages."""
    warmup_lens: list[int] = field(default_factory=list)
    """Lengths of further warm-up prompts, for which kernels are compiled that the usual warm-up does not reach."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the process, added to `WORKER_ENV` and the caller's."""


@dataclass(frozen=True)
class Timing:
    """One request's times, and the candidates for its first token."""

    prompt_len: int
    ttft_ms: float
    """From adding the request to the engine until its first token is returned."""
    tpot_ms: list[float]
    """Between consecutive tokens, at the front end."""
    token_ids: list[int]
    top_logprobs: dict[str, float]
    """Natural-log probabilities of the first token's best candidates, by token id."""
    peak_gpu_memory_gib: float = 0.0
    """Largest allocation of torch while the request ran, weights and KV cache included; 0 without a GPU."""
    device_memory_gib: float = 0.0
    """Taken of the whole GPU after the request, by whatever process; torch keeps what it has had. 0 without a GPU."""
    host_memory_gib: float = 0.0
    """Largest resident memory of the engine's process so far, pinned pages included."""
    max_model_len: int = 0
    """Tokens of the longest request that the engine takes."""
    memory_parts: dict[str, float] = field(default_factory=dict)
    """What the memory of the GPU went to, in GiB, and the pools of offload; empty without offload."""
    stages: dict[str, float] = field(default_factory=dict)
    """As `benchmarks.stages_worker.StageMetrics.end_stages` returns them, where they were asked for."""
    selected_pages: tuple[int, ...] = ()
    """With selective decode: pages in host memory that the engine's steps read so far, and those it chose from."""


@dataclass(frozen=True)
class Answer:
    """What an engine process sends back for one request."""

    timing: Timing
    selection: list[dict[str, Any]]
    """Rows of `farspan.metrics.read_selection` since the first request of this length; empty if not asked for."""


@dataclass(frozen=True)
class EngineResult:
    """The answers of one engine to all its requests."""

    start_s: float
    timings: list[Timing]
    selection: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By prompt length, rows of `farspan.metrics.read_selection`, one per layer and head."""

    def of(self, prompt_len: int) -> list[Timing]:
        return [timing for timing in self.timings if timing.prompt_len == prompt_len]


class Engine(WorkerProcess):
    """One engine process, which lives as long as the context. It first sends how many seconds its start took."""

    def __init__(self, spec: EngineSpec, deadline: float) -> None:
        """`deadline`: of `time.monotonic()`; waiting for the engine past it raises BenchmarkError."""
        environment = {name: os.environ.get(name, value) for name, value in WORKER_ENV.items()} | spec.environment
        super().__init__(f"engine {spec.backend}", "benchmarks.engine_worker", [], environment, deadline)
        self.spec = spec

    def __enter__(self) -> Self:
        super().__enter__()
        self.send(self.spec)
        return self

    def answer(self, request: Request, repeat: int) -> Answer:
        """Run one request to its end; `repeat`: 0 for the first request of a prompt length."""
        answer: Answer = self.ask((request, repeat))
        return answer


def measure_in_turns(
    specs: Mapping[str, EngineSpec],
    *,
    timeout_s: float = 300,
    tell: Callable[[Request, dict[str, EngineResult]], None] = lambda request, results: None,
) -> dict[str, EngineResult]:
    """Start the engines together and send each the same requests; only one request runs at any time.

    Engines take turns, in an order that is reversed with every repeat, so that clocks and heat are the same for all.
    Together they must fit into one GPU's memory. All specs need the same `requests`. tell: called as soon as a request
    has its last repeat in all engines, with all results so far. Raises BenchmarkError with the end of the log where an
    engine fails or the whole measurement takes longer than `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    requests = next(iter(specs.values())).requests
    with ExitStack() as stack:
        engines = {name: stack.enter_context(Engine(spec, deadline)) for name, spec in specs.items()}
        results = {name: EngineResult(engine.receive(), []) for name, engine in engines.items()}
        for request in requests:
            for repeat in range(request.repeats):
                for name in list(engines) if repeat % 2 == 0 else reversed(engines):
                    answer = engines[name].answer(request, repeat)
                    results[name].timings.append(answer.timing)
                    results[name].selection[str(request.prompt_len)] = answer.selection
            tell(request, results)
    return results


def measure(spec: EngineSpec, *, timeout_s: float = 300) -> EngineResult:
    """Start an engine, send it the requests one after the other, and stop it; see `measure_in_turns`."""
    return measure_in_turns({"": spec}, timeout_s=timeout_s)[""]


def logprob_distance(a: Timing, b: Timing) -> float:
    """Largest difference between two engines' log probabilities (in nats) of the same first-token candidates.

    Candidates that only one engine lists are left out; infinite if there is no common candidate.
    """
    shared = a.top_logprobs.keys() & b.top_logprobs.keys()
    return max((abs(a.top_logprobs[token] - b.top_logprobs[token]) for token in shared), default=float("inf"))


def check_first_tokens(case: str, ours: Sequence[Timing], theirs: Sequence[Timing]) -> float:
    """The largest `logprob_distance` of two exact engines that got the same requests.

    Raises BenchmarkError where it is more than LOGPROB_TOLERANCE.
    """
    distance = max(logprob_distance(*pair) for pair in zip(ours, theirs, strict=True))
    if not distance <= LOGPROB_TOLERANCE:
        raise BenchmarkError(f"{case}: log probabilities off by {distance:.3f}, allowed {LOGPROB_TOLERANCE}")
    return distance
