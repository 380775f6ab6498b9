"""Many requests at once over HTTP, by `vllm bench serve`: servers with FLASH_ATTN, our dense prefill, or flex.

The servers are `vllm serve` as users start it (chunked prefill, prefix caching, torch.compile, CUDA graphs) and run
under `--jit-monitor-mode error`, so that one which compiles a kernel in a request ends. They are started together on
one GPU and asked one after the other, while the others have nothing to do. All requests of a workload arrive at once.
Layers are those of an 8B shape, of which a server has few: the case names how many. Weights are random, with heads that
have patterns (benchmarks.calibrated_model); the tokens of prompts are words of a vocabulary made for this.

Recorded are the time until the last request is done (one sample for each round), the time to the first token and the
mean time between tokens of each request, and the 99th percentile of these two as cases of their own. The goal is that
no median is more than 1.02 times that of FLASH_ATTN.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.engine import CALIBRATED_8B, TINY_LLAMA, WORKER_ENV
from benchmarks.record import ROOT, BenchmarkError, Recorder, quantile
from benchmarks.worker_process import WorkerProcess

CHOOSES_CASES = True
NAME = "serve"
BASELINE = "fa3"
GOAL = 1.02
NUM_LAYERS = 4
TIMEOUT_S = 400
"""Of everything, the start of the servers included."""
OPTIONS: dict[str, dict[str, Any] | None] = {
    BASELINE: None,
    "farspan": {},
    "farspan-g0.95": {"prefill": {"method": "flex", "gamma": 0.95}},
}
"""additional_config["farspan"] of the servers; None is FLASH_ATTN, on the CPU vLLM's own backend."""
MAX_MODEL_LEN, DRY_MAX_MODEL_LEN = 102400, 2048
USUAL_VARIANTS = (BASELINE, "farspan")
# Of servers that share a GPU. Profiling their memory would count what the others take meanwhile, so the KV cache has a
# size: 655K tokens, of which ten prompts of 100K need half at once, since the first are done before the last begin.
GPU_ARGUMENTS = (
    "--gpu-memory-utilization", "0.3", "--kv-cache-memory-bytes", str(10 * 2**30),
    "--max-model-len", str(MAX_MODEL_LEN),
    "--compilation-config", '{"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]}',
)  # fmt: skip
CPU_ARGUMENTS = ("--dtype", "float32", "--enforce-eager", "--max-model-len", str(DRY_MAX_MODEL_LEN))
PERCENTILE = 0.99


@dataclass(frozen=True)
class Workload:
    """Requests that arrive together; prompt lengths are uniform in [shortest, longest] tokens."""

    num_requests: int
    shortest: int
    longest: int
    output_len: int
    rounds: int = 1

    @property
    def name(self) -> str:
        """`10x100000`, `200x1024to8192`."""
        span = f"{self.shortest}to{self.longest}" if self.shortest < self.longest else f"{self.longest}"
        return f"{self.num_requests}x{span}"

    def arguments(self, seed: int) -> list[str]:
        """Of `vllm bench serve`; another seed gives other prompts, so that none is in the prefix cache."""
        mean = (self.shortest + self.longest) / 2
        spread = {"input": (self.longest - mean) / mean, "output": 0.0}
        return [
            "--dataset-name", "random", "--num-prompts", str(self.num_requests), "--seed", str(seed),
            "--random-input-len", str(round(mean)), "--random-output-len", str(self.output_len),
            "--random-range-ratio", json.dumps(spread),
        ]  # fmt: skip


@dataclass(frozen=True)
class Measured:
    """One round of a workload on one server."""

    total_ms: float
    """From the first request sent to the last token received."""
    ttft_ms: list[float]
    """Of each request, its waiting in the server's queue included."""
    tpot_ms: list[float]
    """Of each request, the mean over its tokens but the first."""


def cases(dry_run: bool) -> list[Workload]:
    """List the workloads: long prompts, and a mix of short ones."""
    if dry_run:
        return [Workload(2, 2040, 2040, 4), Workload(4, 20, 60, 4, rounds=2)]
    return [Workload(10, 100000, 100000, 32), Workload(200, 1024, 8192, 32, rounds=2)]


def write_words_model(folder: Path, model: dict[str, Any]) -> None:
    """Write config.json, and a tokenizer whose tokens are the words w0, w1, …: text of n words is n tokens.

    A word's token has the space before it, as in other tokenizers: vLLM refuses a prompt that has more characters than
    max_model_len tokens of the longest kind.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel

    (folder / "config.json").write_text(json.dumps(model))
    words = {f"▁w{index}": index for index in range(model["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="▁w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "▁w0"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


_ports_given: set[int] = set()


def free_port() -> int:
    """A port that nothing listens on, never the same twice: a server takes its own seconds after it was told it."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _ports_given:
            _ports_given.add(port)
            return port


class Server:
    """One `vllm serve` process, which lives as long as the context."""

    def __init__(self, name: str, arguments: list[str], deadline: float) -> None:
        """name: for errors; deadline: of `time.monotonic()`; waiting past it raises BenchmarkError."""
        self.name, self.arguments, self.deadline = name, arguments, deadline
        self.url = ""

    def __enter__(self) -> Self:
        self.log = tempfile.TemporaryFile("w+")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        # What the `vllm serve` command runs; the command itself is missing where vLLM is only on the path.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port), *self.arguments]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        # The core has a process of its own, as in any server; farspan's plugin must be loaded there too.
        environment = os.environ | {name: os.environ.get(name, value) for name, value in WORKER_ENV.items()}
        environment |= {"PYTHONPATH": path, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        # A group of its own: the core would outlive a server that has to be killed.
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=self.log, stderr=self.log, start_new_session=True
        )
        return self

    def wait(self) -> None:
        """Until it answers. Raises BenchmarkError with the end of its log where it ends or is late."""
        while not self.is_healthy():
            self.check_running()
            if time.monotonic() > self.deadline:
                raise BenchmarkError(f"{self.name}: did not answer in time\n{self.log_end()}")
            time.sleep(0.2)

    def is_healthy(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
        return False

    def check_running(self) -> None:
        """Raise BenchmarkError with the end of its log where it has ended."""
        if (status := self.process.poll()) is not None:
            raise BenchmarkError(f"{self.name}: ended with exit status {status}\n{self.log_end()}")

    def log_end(self) -> str:
        self.log.seek(0)
        return self.log.read()[-4000:]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()


def server_arguments(folder: Path, options: dict[str, Any] | None, dry_run: bool) -> list[str]:
    """Of `vllm serve` for one of OPTIONS."""
    arguments = [
        "--model", str(folder), "--served-model-name", "words", "--load-format", "seeded_random",
        "--worker-extension-cls", "benchmarks.serve_weights.RandomWeights", "--jit-monitor-mode", "error",
        "--seed", "0", "--disable-uvicorn-access-log",
        *(CPU_ARGUMENTS if dry_run else GPU_ARGUMENTS),
    ]  # fmt: skip
    if options is not None:
        arguments += ["--attention-backend", "CUSTOM", "--additional-config", json.dumps({"farspan": options})]
    elif not dry_run:
        arguments += ["--attention-backend", "FLASH_ATTN"]
    return arguments


def measured(result: dict[str, Any], workload: Workload) -> Measured:
    """Read what `vllm bench serve` found. Raises BenchmarkError where requests failed or have fewer tokens."""
    errors = [error for error in result["errors"] if error]
    if result["completed"] != workload.num_requests or errors:
        raise BenchmarkError(f"{workload.name}: {result['completed']} requests completed; {errors[:1]}")
    if set(result["output_lens"]) != {workload.output_len}:
        raise BenchmarkError(f"{workload.name}: outputs of {sorted(set(result['output_lens']))} tokens")
    times = list(zip(result["ttfts"], result["latencies"], strict=True))
    between = [(latency - ttft) * 1e3 / (workload.output_len - 1) for ttft, latency in times]
    # On a busy machine the client may read all tokens of a request at once, which says nothing of their times.
    between = [ms for ms in between if ms > 0]
    return Measured(result["duration"] * 1e3, [ttft * 1e3 for ttft, _ in times], between)


def record(recorder: Recorder, workload: Workload, label: str, rounds: dict[str, list[Measured]]) -> None:
    """Add the rows of a workload, and say whether each of ours reaches the goal."""
    case = f"{workload.name}-{label}"
    medians: dict[tuple[str, str], float] = {}
    for name, found in rounds.items():
        kinds = {
            "total": [each.total_ms for each in found],
            "ttft": [ms for each in found for ms in each.ttft_ms],
            "tpot": [ms for each in found for ms in each.tpot_ms],
        }
        for kind, samples in kinds.items():
            if not samples:
                recorder.note(f"{case}: {name}: no request whose tokens were read one after the other; {kind} left out")
                continue
            medians[name, kind] = quantile(samples, 0.5)
            recorder.add(NAME, f"{kind}-{case}", name, "time", "ms", samples)
            if kind != "total":
                recorder.add(NAME, f"{kind}-p99-{case}", name, "time", "ms", [quantile(samples, PERCENTILE)])
    for name in rounds:
        if name == BASELINE or BASELINE not in rounds:
            continue
        ratios = {
            kind: medians[name, kind] / medians[BASELINE, kind]
            for kind in ("total", "ttft", "tpot")
            if (name, kind) in medians and (BASELINE, kind) in medians
        }
        verdict = "reached" if max(ratios.values()) <= GOAL else "MISSED"
        each = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in ratios.items())
        recorder.note(f"{case}: {name} takes of {BASELINE}'s time: {each}; goal {GOAL} {verdict}")


def run(recorder: Recorder, variants: Sequence[str] = ()) -> None:
    """Run the servers named, or the usual ones. Raises BenchmarkError for unknown names and where a server failed."""
    dry_run, variants = recorder.dry_run, variants or USUAL_VARIANTS
    if unknown := set(variants) - set(OPTIONS):
        raise BenchmarkError(f"variants {sorted(unknown)}; known are {', '.join(OPTIONS)}")
    model, label = CALIBRATED_8B | {"num_hidden_layers": NUM_LAYERS}, f"llama8b-{NUM_LAYERS}layers-bf16"
    if dry_run:
        model, label = TINY_LLAMA, "tiny-fp32"
    workloads = [workload for workload in cases(dry_run) if recorder.wants(f"{workload.name}-{label}")]
    if not workloads:
        return
    deadline, started = time.monotonic() + TIMEOUT_S, time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_words_model(folder, model)
        client = stack.enter_context(WorkerProcess("vllm bench serve", "benchmarks.serve_client", [], {}, deadline))
        servers = [
            stack.enter_context(Server(name, server_arguments(folder, OPTIONS[name], dry_run), deadline))
            for name in variants
        ]
        client.receive()
        failed = set()
        for server in servers:
            try:
                server.wait()
                recorder.note(f"{server.name}: ready after {time.monotonic() - started:.0f} s")
            except BenchmarkError as problem:
                recorder.note(f"left out: {problem}")
                failed.add(server.name)
        for number, workload in enumerate(workloads):
            rounds: dict[str, list[Measured]] = {server.name: [] for server in servers}
            # The first round has few requests and warms up.
            for turn, sent in enumerate([warmup_of(workload), *[workload] * workload.rounds]):
                for server in servers if turn % 2 else reversed(servers):
                    if server.name in failed:
                        continue
                    try:
                        found = ask(client, server, sent, str(folder), seed=10 * number + turn)
                    except BenchmarkError as problem:
                        recorder.note(f"left out: {problem}")
                        failed.add(server.name)
                        continue
                    if turn:
                        rounds[server.name].append(found)
            record(recorder, workload, label, {name: found for name, found in rounds.items() if found})
    if failed:
        raise BenchmarkError(f"{', '.join(sorted(failed))} failed")


def ask(client: WorkerProcess, server: Server, workload: Workload, tokenizer: str, seed: int) -> Measured:
    """Send a workload once. Raises BenchmarkError where anything fails."""
    arguments = [
        "--backend", "vllm", "--base-url", server.url, "--model", "words", "--tokenizer", tokenizer,
        "--temperature", "0", "--disable-tqdm", "--save-detailed", *workload.arguments(seed),
    ]  # fmt: skip
    result = client.ask(arguments)
    server.check_running()
    if isinstance(result, str):
        raise BenchmarkError(f"{server.name} {workload.name}: {result}\n{server.log_end()}")
    try:
        return measured(result, workload)
    except BenchmarkError as problem:
        raise BenchmarkError(f"{server.name} {problem}\n{server.log_end()}") from None


def warmup_of(workload: Workload) -> Workload:
    """Two requests of the longest kind."""
    return Workload(2, workload.longest, workload.longest, workload.output_len)
