"""A Ray job that answers a question about a long file, spread over the cluster's GPUs.

    ray job submit --address http://HEAD:8265 --working-dir . -- \
        python examples/star_job.py MODEL --hosts 8 --context report.txt --query "What changed in the third quarter?"

farspan, vLLM and Ray must be installed on all machines, and the model be readable there. Inside a job Ray is found by
itself.
"""

import argparse
import sys
from pathlib import Path

from farspan.command import run_command
from farspan.star import StarLLM
from farspan.star.command import describe
from vllm import SamplingParams


def main() -> int:
    parser = argparse.ArgumentParser(description="Answer a question about a long file on several GPUs.")
    parser.add_argument("model")
    parser.add_argument("--hosts", type=int, required=True, help="engines that share the context")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="GPUs of a host, on one machine")
    parser.add_argument("--context", type=Path, required=True, help="a text file")
    parser.add_argument("--query", required=True)
    parser.add_argument("--max-model-len", type=int, help="tokens that one host can hold; the model's own if left out")
    arguments = parser.parse_args()
    return run_command("examples/star_job.py", lambda: answer(arguments))


def answer(arguments: argparse.Namespace) -> None:
    """Ask and print."""
    engine = {"tensor_parallel_size": arguments.tensor_parallel_size}
    if arguments.max_model_len:
        engine["max_model_len"] = arguments.max_model_len
    with StarLLM(arguments.model, arguments.hosts, address="auto", strategy="SPREAD", **engine) as llm:
        output = llm.generate(
            arguments.context.read_text(), arguments.query, SamplingParams(max_tokens=512, temperature=0.0)
        )
    print(output.text)
    print(describe(output))


if __name__ == "__main__":
    sys.exit(main())
