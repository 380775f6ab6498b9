"""A Ray job: many engines answer a file of long prompts, with sparse prefill, or with cold KV heads in host memory.

`python examples/ray_batch.py prompts.jsonl answers.jsonl --model MODEL`, or through `ray job submit --working-dir . --
python examples/ray_batch.py …`. A line of prompts.jsonl is {"prompt": "…"}; a line of answers.jsonl is
{"number": N, "text": "…"} or {"number": N, "error": "…"}, as they come, N being the prompt's place from 0.

Started again, the job goes on with the prompts that have no text yet. When an engine dies, its prompts are given to
another one, once. An engine without a GPU has 1 GiB of KV cache, or what VLLM_CPU_KVCACHE_SPACE says.
"""

import argparse
import json
import os
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from farspan.command import run_command
from farspan.engine_ext.errors import ConfigError
from farspan.needle import local_name
from ray.exceptions import RayActorError, RayTaskError

TRIES = 2
"""Engines that get a prompt."""


class Engine:
    """One vLLM engine, on a GPU of its own or a CPU slot."""

    def __init__(self, model: str, options: dict[str, Any], max_model_len: int | None) -> None:
        # Without a GPU vLLM asks for nearly all memory of the machine, which the engines share.
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        from vllm import LLM

        self.llm = LLM(
            local_name(model),
            attention_backend="CUSTOM",
            additional_config={"farspan": options},
            max_model_len=max_model_len,
            # The engine is in the actor; vLLM would otherwise start actors of its own inside it.
            distributed_executor_backend="uni",
        )

    def ready(self) -> None:
        """Return once the engine is there."""

    def answer(self, prompts: list[str], max_tokens: int) -> list[str]:
        """The texts of some prompts, batched by vLLM."""
        from vllm import SamplingParams

        outputs = self.llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_tokens), use_tqdm=False)
        return [output.outputs[0].text for output in outputs]


class Job:
    """Hands prompts to engines, some at a time, and replaces engines that die."""

    def __init__(
        self,
        start_engine: Callable[[], Any],
        prompts: dict[int, str],
        batch: int,
        max_tokens: int,
        write: Callable[[dict[str, Any]], None],
    ) -> None:
        """Take the prompts by number. write: called with each answer."""
        self.start_engine = start_engine
        self.prompts = prompts
        self.max_tokens = max_tokens
        self.write = write
        numbers = list(prompts)
        self.todo = deque(numbers[first : first + batch] for first in range(0, len(numbers), batch))
        self.tries = dict.fromkeys(numbers, 0)
        self.running: dict[Any, tuple[Any, list[int]]] = {}
        """By the reference of the answers: the engine and its prompts."""

    def run(self, num_engines: int) -> None:
        """Return when every prompt has an answer or an error. Raises ConfigError where engines do not start."""
        engines = [self.start_engine() for _ in range(min(num_engines, len(self.todo)))]
        for engine in engines:
            wait_for(engine)
            self.ask(engine)
        while self.running:
            (ready,), _ = ray.wait(list(self.running), num_returns=1)
            engine, numbers = self.running.pop(ready)
            try:
                texts = ray.get(ready)
            except (RayActorError, RayTaskError) as error:
                if is_alive(error):
                    self.refuse(numbers, error)
                else:
                    self.give_again(numbers, f"its engine died ({str(error).splitlines()[0]})")
                    ray.kill(engine)
                    if not self.todo:
                        continue
                    engine = self.start_engine()
                    wait_for(engine)
            else:
                for number, text in zip(numbers, texts, strict=True):
                    self.write({"number": number, "text": text})
            self.ask(engine)

    def ask(self, engine: Any) -> None:
        """Give an engine its next prompts; without any it ends."""
        if not self.todo:
            ray.kill(engine)
            return
        numbers = self.todo.popleft()
        for number in numbers:
            self.tries[number] += 1
        prompts = [self.prompts[number] for number in numbers]
        self.running[engine.answer.remote(prompts, self.max_tokens)] = (engine, numbers)

    def refuse(self, numbers: list[int], error: Exception) -> None:
        """Answer with an engine's error; of several prompts each is asked alone first, as one spoils all."""
        if len(numbers) > 1:
            for number in numbers:
                self.tries[number] -= 1
                self.todo.append([number])
        else:
            self.write({"number": numbers[0], "error": last_line(error)})

    def give_again(self, numbers: list[int], reason: str) -> None:
        """Give prompts to another engine, one by one; those that had their chance get an error."""
        for number in numbers:
            if self.tries[number] < TRIES:
                self.todo.append([number])
            else:
                self.write({"number": number, "error": f"{reason}, for the second time"})


def is_alive(error: Exception) -> bool:
    """Whether an engine that raised can answer further prompts: it refused these, or vLLM's own process has ended."""
    return isinstance(error, RayTaskError) and type(error.cause).__name__ != "EngineDeadError"


def wait_for(engine: Any) -> None:
    """Return once an engine has started. Raises ConfigError where it cannot."""
    try:
        ray.get(engine.ready.remote())
    except RayActorError as error:
        raise ConfigError(f"an engine did not start: {last_line(error)}. Its log above says more.") from error


def last_line(error: Exception) -> str:
    """What an exception of another process says after its traceback."""
    return str(error).strip().splitlines()[-1].strip()


def cut_last_line(path: Path) -> None:
    """Remove a line of which only the start was written: its job was ended."""
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        path.write_bytes(content[: content.rfind(b"\n") + 1])


def read_lines(path: Path, key: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises ConfigError for a line that is none, or lacks the key."""
    found = []
    for line_number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(
                f"{path}, line {line_number}, is not JSON ({error}). Mend or remove that line."
            ) from error
        if not isinstance(row, dict) or key not in row:
            raise ConfigError(f'{path}, line {line_number}, has no {key!r}; a line is {{"{key}": …}}')
        found.append(row)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer a file of prompts with many engines under Ray.")
    add = parser.add_argument
    add("prompts", type=Path, help='JSON lines, each {"prompt": "…"}')
    add("answers", type=Path, help="JSON lines; answers that are there already are kept")
    add("--model", default="needle", help="a folder or name; the small bundled model if left out")
    add("--engines", type=int, help="one for each GPU of the cluster, or each CPU where it has no GPU, if left out")
    add("--cpus-per-engine", type=float, default=1.0, help="of the cluster's CPUs; cores for an engine without a GPU")
    add("--host-memory", type=float, help="offload: GiB of host memory for the cold KV heads of each engine")
    add(
        "--gamma",
        type=float,
        help="sparse prefill: attention mass to keep; 0.95 if neither this nor offload is asked for",
    )
    add("--max-model-len", type=int, help="tokens of prompt and answer; the model's own if left out")
    add("--max-tokens", type=int, default=128, help="tokens of an answer")
    add("--batch", type=int, default=8, help="prompts that an engine gets at a time")
    return parser.parse_args()


def options_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The farspan options of every engine."""
    options: dict[str, Any] = {}
    if arguments.host_memory is not None:
        # Of one engine, not of the machine: several share it.
        options["offload"] = {"host_memory": arguments.host_memory}
    if arguments.gamma is not None or arguments.host_memory is None:
        options["prefill"] = {"method": "flex", "gamma": 0.95 if arguments.gamma is None else arguments.gamma}
    return options


def main() -> int:
    arguments = parse_arguments()
    prompts = dict(enumerate(str(row["prompt"]) for row in read_lines(arguments.prompts, "prompt")))
    done = set()
    if arguments.answers.exists():
        cut_last_line(arguments.answers)
        done = {row["number"] for row in read_lines(arguments.answers, "number") if "text" in row}
    todo = {number: prompt for number, prompt in prompts.items() if number not in done}
    print(f"{len(done)} of {len(prompts)} prompts have answers", flush=True)
    if not todo:
        return 0
    ray.init(ignore_reinit_error=True)
    resources = ray.cluster_resources()
    has_gpu = resources.get("GPU", 0) >= 1
    places = resources["GPU"] if has_gpu else resources["CPU"] / arguments.cpus_per_engine
    num_engines = arguments.engines or int(places)
    if not 1 <= num_engines <= places:
        raise ConfigError(
            f"{num_engines} engines, but the cluster's {resources.get('GPU', 0):g} GPUs and {resources['CPU']:g} CPUs "
            f"have room for {int(places)}. Ask for fewer --engines or --cpus-per-engine."
        )
    remote = ray.remote(num_gpus=1 if has_gpu else 0, num_cpus=arguments.cpus_per_engine)(Engine)
    failed = 0
    with arguments.answers.open("a", encoding="utf-8") as stream:

        def write(answer: dict[str, Any]) -> None:
            nonlocal failed
            failed += "error" in answer
            stream.write(json.dumps(answer) + "\n")
            stream.flush()
            print(f"prompt {answer['number']}: {answer.get('error', 'answered')}", flush=True)

        def start_engine() -> Any:
            return remote.remote(arguments.model, options_of(arguments), arguments.max_model_len)

        Job(start_engine, todo, arguments.batch, arguments.max_tokens, write).run(num_engines)
    if failed:
        print(f"{failed} prompts have no answer; start the job again to ask them once more", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(run_command("examples/ray_batch.py", main))
