"""The process that `benchmarks.engine.Engine` starts: it receives an EngineSpec, runs a vLLM engine, answers requests.

Its argument is the file descriptor of a `multiprocessing` connection. It sends how many seconds the start took, then an
Answer for every (Request, repeat) that it receives, and ends when the other side closes the connection.
"""

import itertools
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.calibrated_model import attention_biases
from benchmarks.engine import Answer, EngineSpec, Request, Timing

# No compilation at start-up and no graphs for more than one request, which would only lengthen the run: prefill of long
# prompts does not depend on them, and decode runs in full graphs where the backend can.
ENGINE: dict[str, Any] = {
    "enable_prefix_caching": False,
    "max_num_seqs": 4,
    "seed": 0,
    "disable_log_stats": True,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1]},
}
WEIGHT_STD = 0.02  # as Llama models are initialised
# Factor on the weights of queries and keys where these have biases: content then spreads a row's logits by
# about half a nat.
CONTENT_SHARE = 0.25
WARMUP_LEN = 512
TOP_LOGPROBS = 20


def register_random_weights() -> str:
    """Register a loader that gives a model seeded random weights of a usual scale; returns its load format.

    vLLM's dummy weights are too small: after the first norm nothing depends on the prompt. Attention biases, where the
    model has them, give its heads patterns; see `benchmarks.calibrated_model`.
    """
    from vllm.config import ModelConfig
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @register_model_loader("seeded_random")
    class SeededRandomLoader(BaseModelLoader):
        def __init__(self, load_config: LoadConfig) -> None:
            super().__init__(load_config)

        def download_model(self, model_config: ModelConfig) -> None:
            """Nothing to download."""

        def load_weights(self, model: torch.nn.Module, model_config: ModelConfig) -> None:
            from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

            config = model_config.hf_config
            # Of this tensor-parallel rank.
            num_ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
            q_size = config.num_attention_heads * config.head_dim // num_ranks
            kv_size = config.num_key_value_heads * config.head_dim // num_ranks
            for index, (name, parameter) in enumerate(sorted(model.named_parameters())):
                generator = torch.Generator(parameter.device).manual_seed(index)
                if "norm" in name:
                    parameter.data.fill_(1.0)
                elif name.endswith("bias"):
                    parameter.data.zero_()
                else:
                    parameter.data.normal_(0.0, WEIGHT_STD, generator=generator)
                if not config.attention_bias or ".qkv_proj." not in name:
                    continue
                if name.endswith("weight"):
                    parameter.data[: q_size + kv_size] *= CONTENT_SHARE
                else:
                    query, key = attention_biases(
                        config.num_attention_heads,
                        config.num_key_value_heads,
                        config.head_dim,
                        config.rope_parameters["rope_theta"],
                        config.max_position_embeddings // 2,
                        seed=index,
                    )
                    parameter.data[:q_size] = query[rank * q_size : (rank + 1) * q_size]
                    parameter.data[q_size : q_size + kv_size] = key[rank * kv_size : (rank + 1) * kv_size]

    return "seeded_random"


def start(spec: EngineSpec, model_dir: str) -> Any:
    """Start the engine; returns an `LLM`."""
    from vllm import LLM

    arguments: dict[str, Any] = dict(ENGINE)
    arguments["max_model_len"] = max(request.prompt_len + request.output_len for request in spec.requests) + 1
    if spec.backend is not None:
        arguments["attention_backend"] = spec.backend
    if spec.options is not None:
        arguments["additional_config"] = {"farspan": spec.options}
    if spec.reads_selection:
        arguments["worker_extension_cls"] = "farspan.metrics.SelectionMetrics"
    if spec.reads_stages:
        arguments["worker_extension_cls"] = "benchmarks.stages_worker.StageMetrics"
    if spec.model_dir is None:
        arguments |= {"load_format": register_random_weights(), "skip_tokenizer_init": True}
    if not torch.cuda.is_available():
        if "kv_cache_memory_bytes" in spec.engine:
            # The CPU platform takes the variable before the argument.
            os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        del arguments["compilation_config"]
        arguments |= {"enforce_eager": True, "dtype": "float32"}
    return LLM(spec.model_dir or model_dir, **(arguments | spec.engine))


def send(llm: Any, prompt: list[int], request: Request, name: str) -> Timing:
    """Send one request and step the engine until it is done."""
    from vllm import SamplingParams

    parameters = SamplingParams(
        max_tokens=request.output_len,
        temperature=0.0,
        ignore_eos=True,
        detokenize=False,
        logprobs=TOP_LOGPROBS,
        extra_args=request.overrides,
    )
    engine = llm.llm_engine
    arrivals: list[float] = []
    started = time.perf_counter()
    engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
    while engine.has_unfinished_requests():
        for output in engine.step():
            now = time.perf_counter()
            completion = output.outputs[0]
            arrivals += [now] * (len(completion.token_ids) - len(arrivals))
    first = completion.logprobs[0]
    return Timing(
        prompt_len=len(prompt),
        ttft_ms=(arrivals[0] - started) * 1e3,
        tpot_ms=[(late - early) * 1e3 for early, late in itertools.pairwise(arrivals)],
        token_ids=list(completion.token_ids),
        top_logprobs={str(token): entry.logprob for token, entry in first.items()},
    )


def memory_parts(worker: Any) -> dict[str, float]:
    """See `Timing.memory_parts`; runs in the worker. What vLLM has by other names is left out."""
    from farspan.vllm_compat.runner import state_of

    found: dict[str, float | None] = {
        "vLLM may take": getattr(worker, "requested_memory", None),
        "weights": getattr(worker.model_runner, "model_memory_usage", None),
        "weights and what else stays after the profile": getattr(worker, "total_consumed", None),
        "activations": getattr(worker, "peak_activation_memory", None),
        "vLLM leaves for KV": getattr(worker, "available_kv_cache_memory_bytes", None),
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        at_start = getattr(worker, "init_snapshot", None)
        found |= {
            "taken before vLLM counts": None if at_start is None else total - at_start.free_memory,
            "torch has": torch.cuda.memory_reserved(),
            "torch uses": torch.cuda.memory_allocated(),
            "outside torch": total - free - torch.cuda.memory_reserved(),
            "taken of the GPU": total - free,
        }
    cold = state_of(worker.model_runner).cold
    if cold is not None:
        found |= {
            "slots": cold.pools.slots.nbytes,
            "buffers for prefill": 0 if cold.staging is None else cold.staging.buffers.nbytes,
            "tables of pages": cold.entries.nbytes + cold.table.slot_of.nbytes,
            "host pool": cold.host.num_bytes,
        }
    return {name: num_bytes / 2**30 for name, num_bytes in found.items() if num_bytes is not None}


def selected_pages(worker: Any) -> list[int]:
    """See `Timing.selected_pages`; runs in the worker."""
    from farspan.vllm_compat.runner import state_of

    cold = state_of(worker.model_runner).cold
    return [] if cold is None or cold.selection is None else cold.selection.buffers.totals.tolist()


def measure_request(llm: Any, prompt: list[int], request: Request, name: str) -> Timing:
    """Send one request and read what memory it and its engine took."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    if request.stages:
        llm.collective_rpc("begin_stages", args=(request.stages == "device",))
    timing = send(llm, prompt, request, name)
    if request.stages:
        timing = replace(timing, stages=llm.collective_rpc("end_stages")[0])
    peak = taken = 0.0
    parts: dict[str, float] = {}
    pages: tuple[int, ...] = ()
    if "offload" in (llm.llm_engine.vllm_config.additional_config or {}).get("farspan", {}):
        parts = llm.collective_rpc(memory_parts)[0]
        pages = tuple(llm.collective_rpc(selected_pages)[0])
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        peak, taken = torch.cuda.max_memory_allocated() / 2**30, (total - free) / 2**30
    return replace(
        timing,
        peak_gpu_memory_gib=peak,
        device_memory_gib=taken,
        host_memory_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        max_model_len=llm.llm_engine.model_config.max_model_len,
        memory_parts=parts,
        selected_pages=pages,
    )


def main() -> None:
    from farspan.metrics import read_selection

    connection: Connection[Any, Any] = Connection(int(sys.argv[1]))
    spec: EngineSpec = connection.recv()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as model_dir:
        Path(model_dir, "config.json").write_text(json.dumps(spec.model))
        llm = start(spec, model_dir)
        vocab_size = llm.llm_engine.model_config.get_vocab_size()

    written: list[int] = []
    if spec.texts:
        text = "\n".join(path.read_text() for path in spec.texts)
        written = llm.get_tokenizer().encode(text, add_special_tokens=False)

    def prompt_of(length: int, repeat: int, cached_len: int = 0) -> list[int]:
        """Tokens of the texts, or random ones; engines get the same ones for a length, repeat and cached beginning."""
        if cached_len > 0:
            return prompt_of(cached_len, 0) + prompt_of(length - cached_len, 1 + repeat)
        if written:
            assert len(written) >= length + repeat, (len(written), length)
            return written[repeat : length + repeat]
        generator = torch.Generator().manual_seed(length + repeat)
        return torch.randint(vocab_size, (length,), generator=generator).tolist()

    warmup_len = min(WARMUP_LEN, max(request.prompt_len for request in spec.requests))
    # Compiles kernels and makes first-use allocations.
    for index, length in enumerate([warmup_len, warmup_len, *spec.warmup_lens]):
        send(llm, prompt_of(length, index), Request(length, 4), f"warmup-{index}")
    connection.send(time.perf_counter() - started)
    for index in itertools.count():
        try:
            request, repeat = connection.recv()
        except EOFError:
            break
        if spec.reads_selection and repeat == 0:
            read_selection(llm, reset=True)
        prompt = prompt_of(request.prompt_len, repeat, request.cached_len)
        if request.cached_len > 0 and repeat == 0:
            send(llm, prompt[: request.cached_len], Request(request.cached_len), f"cached-{index}")
        timing = measure_request(llm, prompt, request, str(index))
        connection.send(Answer(timing, read_selection(llm) if spec.reads_selection else []))


if __name__ == "__main__":
    main()
