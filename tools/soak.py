"""Many short requests through one server, and what it holds afterwards: `python -m tools.soak` (or `make soak`).

Starts vLLM's server with farspan on a model, the small bundled one unless `--model` names another, and sends requests
that share prefixes, answer 1 to 8 tokens, choose their own method, and sometimes hang up in the middle. Memory,
descriptors and threads of the server's processes, and memory of the GPUs, are read at every twentieth part of the
requests: the middle of the second quarter and of the last one are compared. Exits with 1 where one has grown by more
than is allowed, or where a request failed. Arguments after `--` go to the server.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from farspan.command import run_command
from farspan.engine_ext.errors import ConfigError

OPTIONS = '{"farspan": {"prefill": {"method": "flex", "min_seq_len": 0, "min_chunk_len": 0}}}'
START_TIMEOUT_S = 300
NUM_READINGS = 20
MOST_PROMPT_LEN, MOST_TOKENS = 300, 8
HANG_UP_SHARE = 0.05
MIB = 2**20
GPU_DEVICE = Path("/dev/nvidiactl")


@dataclass(frozen=True)
class Held:
    """What the processes of a server hold, or how much more of it."""

    host_mib: float
    """Memory of their own; shared pages count once."""
    descriptors: float
    threads: float
    gpu_mib: float
    """Of all GPUs that the server may use; 0 where there is none."""


ALLOWED_GROWTH = Held(host_mib=48, descriptors=16, threads=8, gpu_mib=64)


def held_by(root: psutil.Process) -> Held:
    """Read a process and those that it started."""
    memory = descriptors = threads = 0
    for process in (root, *root.children(recursive=True)):
        try:
            memory += process.memory_full_info().pss
            descriptors += process.num_fds()
            threads += process.num_threads()
        except psutil.NoSuchProcess:
            continue
    return Held(memory / MIB, descriptors, threads, gpu_mib())


def gpu_mib() -> float:
    """Of the GPUs that the server may use. Raises ConfigError where there are some and nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--id={visible}")
    try:
        return float(sum(map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())))
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        if GPU_DEVICE.exists():
            raise ConfigError(f"{' '.join(command)} does not tell how much GPU memory is used: {error}") from error
        return 0.0


def growth(readings: Sequence[Held]) -> Held:
    """How much more the last quarter of the readings has than the second, medians of each; at least 8 readings."""
    quarter = len(readings) // 4
    early, late = readings[quarter : 2 * quarter], readings[-quarter:]
    return Held(
        *(
            median(after) - median(before)
            for before, after in zip(
                zip(*map(astuple, early), strict=True), zip(*map(astuple, late), strict=True), strict=True
            )
        )
    )


def too_much(grown: Held) -> list[str]:
    """A sentence for each thing of which more is held than is allowed."""
    return [
        f"{each.name} grew by {getattr(grown, each.name):.0f}; allowed: {getattr(ALLOWED_GROWTH, each.name):.0f}"
        for each in fields(Held)
        if getattr(grown, each.name) > getattr(ALLOWED_GROWTH, each.name)
    ]


@contextmanager
def server(model: str, arguments: Sequence[str]) -> Any:
    """Yield the process and the address of a server that answers. Raises ConfigError where it ends, with its log."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--served-model-name", "soak", "--attention-backend", "CUSTOM", "--additional-config", OPTIONS]
    command += ["--max-model-len", "1024", "--disable-uvicorn-access-log", *arguments]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not answers(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise ConfigError(f"the server did not start; its last lines:\n{log.read()[-3000:]}")
                time.sleep(0.5)
            yield psutil.Process(process.pid), f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def answers(port: int) -> bool:
    import httpx

    try:
        return httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


async def ask(session: Any, rng: random.Random, prefixes: Sequence[list[int]]) -> None:
    """One request, of which some hang up after the first token. Raises ConfigError where it fails."""
    is_ended = rng.random() >= HANG_UP_SHARE
    body: dict[str, Any] = {
        "model": "soak",
        "prompt": [*rng.choice(prefixes), *(rng.randrange(3, 500) for _ in range(rng.randrange(1, 100)))],
        "max_tokens": rng.randint(1, MOST_TOKENS),
        "temperature": rng.choice([0.0, 1.0]),
        "ignore_eos": True,
        "stream": not is_ended,
    }
    if rng.random() < 0.3:
        body["vllm_xargs"] = {"farspan.method": "dense"}
    async with session.post("/v1/completions", json=body) as response:
        answer = await (response.text() if is_ended or response.status >= 400 else response.content.readline())
        if response.status >= 400 or not answer:
            raise ConfigError(f"the server answered {response.status}: {answer!r}")
        if is_ended:
            assert json.loads(answer)["usage"]["completion_tokens"] == body["max_tokens"], answer
        else:
            response.close()


async def send(url: str, process: psutil.Process, requests: int, concurrency: int, seed: int) -> list[Held]:
    """Send all requests, `concurrency` at a time; prints and returns what was held, in order."""
    import aiohttp

    rng = random.Random(seed)
    prefixes = [[rng.randrange(3, 500) for _ in range(rng.randrange(MOST_PROMPT_LEN - 100))] for _ in range(50)]
    readings: list[Held] = []
    started = time.monotonic()
    # One connection for each request at a time.
    async with aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=concurrency)) as session:
        for part in range(NUM_READINGS):
            last = (part + 1) * requests // NUM_READINGS
            left = iter(range(part * requests // NUM_READINGS, last))

            async def work(left: Iterator[int] = left) -> None:
                for _ in left:
                    await ask(session, rng, prefixes)

            await asyncio.gather(*(work() for _ in range(concurrency)))
            readings.append(held_by(process))
            print(f"{last:6d} requests, {time.monotonic() - started:4.0f} s  {readings[-1]}", flush=True)
    return readings


def run(arguments: argparse.Namespace) -> int:
    """Run it; returns the exit status. Raises ConfigError for what it cannot start with."""
    from farspan.needle import model_dir

    if arguments.requests < NUM_READINGS:
        raise ConfigError(f"--requests {arguments.requests}; allowed: at least {NUM_READINGS}")
    if arguments.concurrency < 1:
        raise ConfigError(f"--concurrency {arguments.concurrency}; allowed: at least 1")
    model = arguments.model or str(model_dir())
    started = time.monotonic()
    with server(model, arguments.server) as (process, url):
        print(f"server ready after {time.monotonic() - started:.0f} s", flush=True)
        readings = asyncio.run(send(url, process, arguments.requests, arguments.concurrency, arguments.seed))
    grown = growth(readings)
    print(f"growth: {grown}")
    for sentence in (problems := too_much(grown)):
        print(sentence, file=sys.stderr)
    return int(bool(problems))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a model; the bundled one if left out")
    parser.add_argument("--requests", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--concurrency", type=int, default=16, help="requests at a time; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the requests; default: %(default)s")
    parser.add_argument("server", nargs="*", metavar="ARGUMENT", help="further arguments of the server, after --")
    arguments = parser.parse_args()
    return run_command("python -m tools.soak", lambda: run(arguments), (ConfigError,))


if __name__ == "__main__":
    sys.exit(main())
