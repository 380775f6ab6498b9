"""One vLLM engine in a process of its own, timed from its front end: what end-to-end benchmarks share.

`measure(spec)` starts `python -m benchmarks.engine_worker`, so that engines never share a process (or GPU memory).
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import BenchmarkError

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


@dataclass(frozen=True)
class Request:
    """A prompt of random tokens, sent alone, `repeats` times."""

    prompt_len: int
    output_len: int = 1
    repeats: int = 1


@dataclass(frozen=True)
class EngineSpec:
    """An engine and what to send to it."""

    requests: list[Request]
    model: dict[str, Any] = field(default_factory=lambda: LLAMA_8B)
    """config.json; the weights are random and seeded, the same for every engine."""
    backend: str | None = None
    """vLLM's name of an attention backend; None for vLLM's own choice."""
    options: dict[str, Any] | None = None
    """additional_config["farspan"]."""
    engine: dict[str, Any] = field(default_factory=dict)
    """More arguments of `LLM`."""
    model_dir: str | None = None
    """A model with trained weights instead of `model`."""
    reads_selection: bool = False
    """Whether to report what flex prefill kept."""
    warmup_lens: list[int] = field(default_factory=list)
    """Prompts to send beforehand, beside short ones: of a length for which kernels of their own are compiled."""


@dataclass(frozen=True)
class Timing:
    """One request's times, and what its first token was chosen from."""

    prompt_len: int
    ttft_ms: float
    """From handing the request to the engine until its first token is out."""
    tpot_ms: list[float]
    """Between one token and the next, at the front end."""
    token_ids: list[int]
    top_logprobs: dict[str, float]
    """Natural-log probabilities of the first token's best candidates, by token id."""
    peak_gpu_memory_gib: float = 0.0
    """The most that torch allocated while the request ran, weights and KV cache included; 0 without a GPU."""


@dataclass(frozen=True)
class EngineResult:
    """What an engine process reports."""

    start_s: float
    timings: list[Timing]
    peak_gpu_memory_gib: float
    """The most that torch allocated, KV cache included; 0 without a GPU."""
    selection: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By prompt length, what flex prefill did per layer and head; rows of `farspan.metrics.read_selection`."""

    def of(self, prompt_len: int) -> list[Timing]:
        return [timing for timing in self.timings if timing.prompt_len == prompt_len]


def measure(spec: EngineSpec, *, timeout_s: float = 300) -> EngineResult:
    """Start an engine, send it the requests, one behind the other, and stop it.

    Raises BenchmarkError with the end of its log where the engine fails or takes longer than `timeout_s`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        spec_path, result_path, log_path = (Path(scratch, name) for name in ("spec.json", "result.json", "log"))
        spec_path.write_text(json.dumps(asdict(spec)))
        command = [sys.executable, "-m", "benchmarks.engine_worker", str(spec_path), str(result_path)]
        with log_path.open("w") as log:
            try:
                code = subprocess.run(
                    command, env=WORKER_ENV | os.environ, stdout=log, stderr=log, timeout=timeout_s, check=False
                ).returncode
            except subprocess.TimeoutExpired:
                code = -1
        if code != 0:
            reason = f"took longer than {timeout_s} s" if code == -1 else f"ended with exit status {code}"
            raise BenchmarkError(f"engine {spec.backend}: {reason}\n{log_path.read_text()[-4000:]}")
        raw = json.loads(result_path.read_text())
    return EngineResult(
        raw["start_s"], [Timing(**timing) for timing in raw["timings"]], raw["peak_gpu_memory_gib"], raw["selection"]
    )


def logprob_distance(a: Timing, b: Timing) -> float:
    """Largest difference between the log probabilities that two engines give the same first-token candidates.

    Candidates that only one of them lists among its best are left out; infinite if they share none.
    """
    shared = a.top_logprobs.keys() & b.top_logprobs.keys()
    return max((abs(a.top_logprobs[token] - b.top_logprobs[token]) for token in shared), default=float("inf"))
