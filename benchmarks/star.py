"""Star Attention over two GPUs: one long prompt in blocks of N/4 and N/8, against one GPU and tensor parallelism 2.

Whole engines of an 8B shape with fewer layers (`l8` in the case: 8 of 32), random seeded weights, one request alone.
Times to the first token count from the request to the token, both phases included; the anchor is recomputed on the
second host. Between tokens, every layer exchanges once. Before anything is reported, two hosts with blocks of N/2,
which see all of the context, must agree with one GPU on the first token's log probabilities.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from farspan.star import StarLLM, StarOutput
from farspan.star.host import StarHost
from farspan.star.protocol import HostFacts

from benchmarks.engine import LLAMA_8B, TINY_LLAMA, WORKER_ENV, EngineSpec, Request, measure
from benchmarks.record import ROOT, BenchmarkError, Recorder

NAME = "star"
NUM_HOSTS = 2
NUM_LAYERS = 8
QUERY_LEN, OUTPUT_LEN, REPEATS = 64, 33, 2
SHARES = (2, 4, 8)
"""Blocks of a context; two of them on two hosts are exact attention."""
LOGPROB_TOLERANCE = 0.25
TOP_LOGPROBS = 20


class BenchHost(StarHost):
    """A host whose engine can load seeded random weights."""

    def start(self, address: str, ports: Sequence[int]) -> HostFacts:
        """As StarHost's, with the loader of the benchmarks' engines registered."""
        from benchmarks.engine_worker import register_random_weights

        register_random_weights()
        return super().start(address, ports)


class BenchStar(StarLLM):
    """StarLLM on such hosts."""

    host_class = BenchHost


def cases(dry_run: bool) -> list[int]:
    """List context lengths, the one that matters most first."""
    return [256, 512] if dry_run else [n * 1024 for n in (128, 64, 256)]


def model_of(dry_run: bool) -> tuple[dict[str, Any], str]:
    """The shape and its label in cases."""
    if dry_run:
        return TINY_LLAMA, "tiny-fp32"
    longest = max(cases(dry_run))
    shape = LLAMA_8B | {
        "num_hidden_layers": NUM_LAYERS, "max_position_embeddings": longest + 4096, "attention_bias": False,
    }  # fmt: skip
    return shape, f"llama8b-l{NUM_LAYERS}-bf16"


def prompt_of(length: int, vocab_size: int, seed: int) -> list[int]:
    """Random tokens, in the way of `benchmarks.engine_worker`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (length,), generator=generator).tolist()


def ask_star(llm: StarLLM, num_tokens: int, share: int, seed: int, output_len: int = OUTPUT_LEN) -> StarOutput:
    """One request: a context of `num_tokens` less the query, in `share` blocks."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=output_len, temperature=0.0, ignore_eos=True, detokenize=False, logprobs=TOP_LOGPROBS
    )
    prompt = prompt_of(num_tokens, llm.hosts.facts[0].vocab_size, seed)
    block = -(-num_tokens // (share * llm.page_size)) * llm.page_size
    return llm.generate(prompt[:-QUERY_LEN], prompt[-QUERY_LEN:], params, block_len=block)


def distance(output: StarOutput, expected: dict[str, float]) -> float:
    """Largest difference of the first token's log probabilities to another engine's; see `logprob_distance`."""
    entries = output.output.outputs[0].logprobs[0]
    ours = {str(token): entry.logprob for token, entry in entries.items()}
    shared = ours.keys() & expected.keys()
    return max((abs(ours[token] - expected[token]) for token in shared), default=float("inf"))


def run(recorder: Recorder) -> None:
    dry_run = recorder.dry_run
    if not dry_run and torch.cuda.device_count() < NUM_HOSTS:
        recorder.note(f"left out: needs {NUM_HOSTS} GPUs, there is {torch.cuda.device_count()}")
        return
    model, label = model_of(dry_run)
    lens = cases(dry_run)
    # What is new goes first; it becomes rows only once one GPU has said what is right.
    answers = {False: ask_hosts(recorder, model, lens, graphs=False)}
    firsts = measure_peer(recorder, "fa3", None if dry_run else "FLASH_ATTN", {}, model, label, lens)
    record_star(recorder, answers[False], firsts, label, "")
    if dry_run:
        return
    record_star(recorder, ask_hosts(recorder, model, lens, graphs=True), firsts, label, "-graphs")
    measure_peer(recorder, "tp2-fa3", "FLASH_ATTN", {"tensor_parallel_size": NUM_HOSTS}, model, label, lens)


def measure_peer(
    recorder: Recorder,
    name: str,
    backend: str | None,
    arguments: dict[str, Any],
    model: dict[str, Any],
    label: str,
    lens: list[int],
) -> dict[int, dict[str, float]]:
    """Another engine's times; returns the first token's log probabilities by length."""
    requests = [Request(length, OUTPUT_LEN, REPEATS) for length in lens]
    result = measure(EngineSpec(requests, model, backend, engine=arguments), timeout_s=300)
    for length in lens:
        timings = result.of(length)
        case = f"n{length}-b1-{label}"
        recorder.add(NAME, case, name, "time", "ms", [each.ttft_ms for each in timings])
        steps = [ms for each in timings for ms in each.tpot_ms[1:]]
        recorder.add(NAME, f"{case}-tpot", name, "time", "ms", steps)
    return {length: result.of(length)[0].top_logprobs for length in lens}


def ask_hosts(
    recorder: Recorder, model: dict[str, Any], lens: list[int], *, graphs: bool
) -> dict[tuple[int, int], list[StarOutput]]:
    """Answers of two hosts by length and number of blocks; graphs: whether they decode in CUDA graphs."""
    engine: dict[str, Any] = {"load_format": "seeded_random", "skip_tokenizer_init": True, "seed": 0}
    engine["max_model_len"] = max(lens) + 1024
    environment = dict(WORKER_ENV)
    environment["PYTHONPATH"] = python_path()
    if recorder.dry_run:
        engine |= {"enforce_eager": True, "dtype": "float32", "block_size": 16}
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    else:
        engine["compilation_config"] = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1]}
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(model))
        with BenchStar(
            folder, NUM_HOSTS, timeout_s=60, start_timeout_s=300, graphs=graphs, env=environment, **engine
        ) as llm:
            for length in lens:
                ask_star(llm, length, 4, seed=1, output_len=2)  # fills what is allocated at first use
                for share in SHARES:
                    # The first prompt is that of the other engines' first.
                    outputs = [ask_star(llm, length, share, seed=length + repeat) for repeat in range(REPEATS)]
                    first_s = [round(each.times.first_token_s, 3) for each in outputs]
                    recorder.note(f"n{length} in {share} blocks{', graphs' if graphs else ''}: {first_s} s, unchecked")
                    answers[length, share] = outputs
    return answers


def record_star(
    recorder: Recorder,
    answers: dict[tuple[int, int], list[StarOutput]],
    firsts: dict[int, dict[str, float]],
    label: str,
    suffix: str,
) -> None:
    """Rows of the answers. Raises BenchmarkError where blocks that see all give another first token's probabilities."""
    for (length, share), outputs in answers.items():
        far = distance(outputs[0], firsts[length])
        recorder.note(f"n{length} in {share} blocks: first-token log probabilities differ by {far:.3f}")
        if share == NUM_HOSTS and not far <= LOGPROB_TOLERANCE:
            raise BenchmarkError(f"n{length}: log probabilities off by {far:.3f} with blocks that see all")
        record(recorder, outputs, f"n{length}-b1-{label}", f"farspan-star-n{share}{suffix}")


def record(recorder: Recorder, outputs: list[StarOutput], case: str, variant: str) -> None:
    """Add the times of requests with the same blocks."""
    times = [each.times for each in outputs]
    recorder.add(NAME, case, variant, "time", "ms", [each.first_token_s * 1e3 for each in times])
    recorder.add(NAME, f"{case}-phase1", variant, "time", "ms", [each.phase_1_s * 1e3 for each in times])
    steps = [second * 1e3 for each in times for second in each.token_s[1:]]
    recorder.add(NAME, f"{case}-tpot", variant, "time", "ms", steps)
    hosts = ", ".join(f"{seconds:.3f}" for seconds in times[-1].host_s)
    shards = outputs[-1].shards or []
    recorder.note(
        f"{case} {variant}: hosts at work {hosts} s with {[shard.num_blocks for shard in shards]} blocks; "
        f"{times[-1].exchanged_bytes} bytes exchanged"
    )


def python_path() -> str:
    import os

    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
