"""`make demo-star`: one question over a long context on two hosts, exact and in blocks, on whatever machine this is.

Without GPUs both hosts are processes of this CPU: the tokens are those of two GPUs, the times are not.
"""

import argparse
import os
import sys
import time
from typing import Any

ENGINE_ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve each other where cores are shared
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
SHARES = (1, 2, 4, 8)
"""Blocks of the context; one is exact attention, and two on two hosts see as much."""


def main() -> int:
    from farspan.command import run_command

    parser = argparse.ArgumentParser(description="Ask one long question on two hosts, in blocks of several sizes.")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the question's prompt (default: 2048)")
    parser.add_argument("--hosts", type=int, default=2, help="engines that share the context (default: 2)")
    arguments = parser.parse_args()
    for name, value in ENGINE_ENV.items():
        os.environ.setdefault(name, value)
    return run_command("examples/star_demo.py", lambda: compare(arguments.length, arguments.hosts))


def compare(length: int, hosts: int) -> None:
    """Ask the question with every number of blocks."""
    import torch
    from farspan.engine_ext.errors import ConfigError
    from farspan.needle.tasks import MIN_LENGTH, make_sample
    from farspan.star import StarLLM
    from farspan.star.command import Bar, describe, split_question
    from vllm import SamplingParams

    if length < MIN_LENGTH:
        raise ConfigError(f"--length {length}; prompts have at least {MIN_LENGTH} tokens. Use 2048.")
    sample = make_sample("niah_multiquery", length, seed=7)
    context, query = split_question(sample.prompt)
    print(f"A question of {length} tokens: “{query}”", flush=True)
    print(f"expected: {' '.join(sample.answers)}", flush=True)
    params = SamplingParams(temperature=0.0, max_tokens=sample.max_new_tokens)
    engine: dict[str, Any] = {} if torch.cuda.is_available() else {"dtype": "float32"}
    started = time.monotonic()
    with StarLLM(
        "needle", hosts, enforce_eager=True, max_model_len=length + 256, block_size=32,
        max_num_batched_tokens=512, seed=0, **engine,
    ) as llm:  # fmt: skip
        print(f"{hosts} hosts started in {time.monotonic() - started:.0f} s", flush=True)
        page = llm.page_size
        for share in SHARES:
            block = -(-length // (share * page)) * page
            bar = Bar(os.fdopen(os.dup(2), "w"))
            show = bar.show if bar.stream.isatty() else None
            output = llm.generate(context, query, params, block_len=block, on_progress=show)
            bar.end()
            found = sum(answer in output.text.split() for answer in sample.answers)
            name = "exact" if output.shards is None else f"blocks of N/{share}"
            print(f"\n{name}: {found} of {len(sample.answers)} right: {output.text.strip()}")
            print(describe(output), flush=True)


if __name__ == "__main__":
    sys.exit(main())
