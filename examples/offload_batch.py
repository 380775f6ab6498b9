"""A Ray job: many engines answer a file of long prompts, each with its cold KV heads in host memory.

`python examples/offload_batch.py prompts.jsonl answers.jsonl --model MODEL --engines 4 --host-memory 64`, or through
`ray job submit --working-dir . -- python examples/offload_batch.py …`. A line of prompts.jsonl is {"prompt": "…"};
a line of answers.jsonl has its number and the text, as they come.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import ray
from farspan.needle import model_dir


class Engine:
    """One vLLM engine on a GPU of its own."""

    def __init__(self, model: str, host_memory: float, max_model_len: int | None) -> None:
        from vllm import LLM

        self.llm = LLM(
            model,
            attention_backend="CUSTOM",
            # Of one engine, not of the machine: several share it.
            additional_config={"farspan": {"offload": {"host_memory": host_memory}}},
            max_model_len=max_model_len,
            distributed_executor_backend="uni",
        )

    def answer(self, number: int, prompt: str, max_tokens: int) -> dict[str, Any]:
        """The answer to line `number`."""
        from vllm import SamplingParams

        (output,) = self.llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=max_tokens), use_tqdm=False)
        return {"number": number, "text": output.outputs[0].text}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Answer a file of prompts with many engines under Ray.")
    parser.add_argument("prompts", type=Path, help='JSON lines, each {"prompt": "…"}')
    parser.add_argument("answers", type=Path)
    parser.add_argument(
        "--model", default=str(model_dir()), help="a folder or name; the small bundled model if left out"
    )
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--host-memory", type=float, default=8.0, help="GiB of host memory for each engine's KV")
    parser.add_argument("--max-model-len", type=int, help="tokens of prompt and answer; the model's own if left out")
    parser.add_argument("--max-tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--gpus-per-engine", type=float, default=1.0, help="0 for the CPU platform")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    lines = arguments.prompts.read_text().splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines if line.strip()]
    ray.init(ignore_reinit_error=True)
    remote = ray.remote(num_gpus=arguments.gpus_per_engine, num_cpus=1)(Engine)
    engines = [
        remote.remote(arguments.model, arguments.host_memory, arguments.max_model_len) for _ in range(arguments.engines)
    ]
    pool = ray.util.ActorPool(engines)
    with arguments.answers.open("w") as stream:
        asked = pool.map_unordered(
            lambda engine, line: engine.answer.remote(*line, arguments.max_tokens), list(enumerate(prompts))
        )
        for count, answer in enumerate(asked, start=1):
            stream.write(json.dumps(answer) + "\n")
            stream.flush()
            print(f"{count} of {len(prompts)}", flush=True)


if __name__ == "__main__":
    main()
