"""What vLLM takes of a GPU besides KV, beside what `farspan plan` estimates: `python -m benchmarks.footprint`.

Starts one engine a case, with dummy weights of an 8B shape, and prints predicted and measured GiB: the evidence for
the margins in docs/capacity.md. `--dry-run` starts a tiny engine anywhere and prints predictions alone.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import LLAMA_8B, TINY_LLAMA, WORKER_ENV

GIB = 2**30
CASES = ((8192, 1), (2048, 256))
"""Tokens of a step, and requests in one."""


def engine_bytes(model_dir: str, num_tokens: int, num_seqs: int) -> dict[str, int]:
    """Start an engine and read what its worker measured. In a process of its own, it leaves no memory taken."""
    from vllm import LLM

    arguments: dict[str, Any] = {"enforce_eager": True, "dtype": "float32"} if not torch.cuda.is_available() else {}
    llm = LLM(
        model_dir,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=1024,
        max_num_batched_tokens=num_tokens,
        max_num_seqs=num_seqs,
        attention_backend="CUSTOM",
        **arguments,
    )

    def read(worker: Any) -> dict[str, int]:
        worker = getattr(worker, "worker", worker)
        if not torch.cuda.is_available():
            return {}
        free, total = torch.cuda.mem_get_info()
        return {
            "weights": int(worker.model_runner.model_memory_usage),
            "weights and CUDA": int(worker.total_consumed),
            "activations": int(worker.peak_activation_memory),
            "graphs": int(worker.cudagraph_memory_estimate),
            "besides KV, now": total - free - int(worker.available_kv_cache_memory_bytes),
        }

    (answer,) = llm.collective_rpc(read)
    return answer


def predicted_bytes(model_dir: str, num_tokens: int, num_seqs: int) -> dict[str, int]:
    from farspan.model_shape import read_model
    from farspan.scheduler.footprint import activation_bytes, fixed_bytes, weight_bytes

    info = read_model(model_dir)
    weights = weight_bytes(info.shape, 2, 16, 1)
    return {
        "weights": weights,
        "weights and CUDA": weights + fixed_bytes(1),
        "activations": activation_bytes(info.shape, 2, num_tokens, num_seqs, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.footprint")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, anywhere")
    parser.add_argument("--case", nargs=3, metavar=("DIR", "TOKENS", "SEQS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        model_dir, num_tokens, num_seqs = arguments.case
        print("\n" + json.dumps(engine_bytes(model_dir, int(num_tokens), int(num_seqs))))
        return
    if not arguments.dry_run and not torch.cuda.is_available():
        sys.exit("Needs a CUDA GPU; try it out without one by --dry-run.")
    with tempfile.TemporaryDirectory() as model_dir:
        Path(model_dir, "config.json").write_text(json.dumps(TINY_LLAMA if arguments.dry_run else LLAMA_8B))
        for num_tokens, num_seqs in CASES[:1] if arguments.dry_run else CASES:
            command = [
                sys.executable,
                "-m",
                "benchmarks.footprint",
                "--case",
                model_dir,
                str(num_tokens),
                str(num_seqs),
            ]
            child = subprocess.run(command, env=WORKER_ENV | os.environ, stdout=subprocess.PIPE, text=True, check=True)
            measured = json.loads(child.stdout.splitlines()[-1])
            predicted = predicted_bytes(model_dir, num_tokens, num_seqs)
            print(f"steps of {num_tokens} tokens, {num_seqs} requests, GiB:")
            for name in predicted | measured:
                values = [f"{each[name] / GIB:8.3f}" if name in each else " " * 8 for each in (predicted, measured)]
                print(f"  {name:20} predicted {values[0]}   measured {values[1]}", flush=True)


if __name__ == "__main__":
    main()
