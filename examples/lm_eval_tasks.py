"""lm-eval tasks over long prompts, under vLLM's own attention and under farspan: what sparse prefill costs in accuracy.

    pip install "lm_eval[vllm,ruler]"
    python examples/lm_eval_tasks.py MODEL --tasks niah_single_1,ruler_vt --lengths 4096,16384 --max-model-len 16640

Prints every score of every task, one column a way of attention. Tasks of your own lie under `--include-path`.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from farspan.command import floats, integers, run_command, words
from farspan.engine_ext.errors import ConfigError


def main() -> int:
    parser = argparse.ArgumentParser(description="Hold farspan's answers against vLLM's own on tasks of lm-eval.")
    parser.add_argument("model")
    parser.add_argument("--tasks", type=words, default="niah_single_1", help="names, separated by commas")
    parser.add_argument("--lengths", type=integers, default="", help="of the prompts, for tasks of RULER; in tokens")
    parser.add_argument("--gammas", type=floats, default="0.95,0.9", help="of flex; default: %(default)s")
    parser.add_argument(
        "--max-model-len", type=int, help="tokens of a prompt and its answer; the model's own if left out"
    )
    parser.add_argument("--limit", type=int, help="questions of a task; all if left out")
    parser.add_argument("--include-path", type=Path, help="folder with further tasks")
    arguments = parser.parse_args()
    return run_command("examples/lm_eval_tasks.py", lambda: compare(arguments))


def compare(arguments: argparse.Namespace) -> None:
    """Ask with one engine after the other, and print the scores beside each other."""
    if find_spec("lm_eval") is None:
        raise ConfigError('lm-eval is not installed. pip install "lm_eval[vllm,ruler]".')
    columns = {"vLLM's own": scores_of(arguments, {})}
    for gamma in arguments.gammas:
        prefill = {"method": "flex", "gamma": gamma}
        ours = {"attention_backend": "CUSTOM", "additional_config": {"farspan": {"prefill": prefill}}}
        columns[f"flex γ {gamma:g}"] = scores_of(arguments, ours)
    print(f"{'':40}" + "".join(f"{name:>14}" for name in columns))
    for score in columns["vLLM's own"]:
        print(f"{score:40}" + "".join(f"{found[score]:14.3f}" for found in columns.values()))


def scores_of(arguments: argparse.Namespace, ours: dict[str, Any]) -> dict[str, float]:
    """Every score by "task metric". ours: arguments of `vllm.LLM`, to which lm-eval hands what it does not know."""
    from lm_eval import simple_evaluate
    from lm_eval.models.vllm_causallms import VLLM
    from lm_eval.tasks import TaskManager

    model = VLLM(arguments.model, max_model_len=arguments.max_model_len, batch_size="auto", **ours)
    try:
        lengths = {"max_seq_lengths": arguments.lengths} if arguments.lengths else {}
        results = simple_evaluate(
            model,
            tasks=list(arguments.tasks),
            limit=arguments.limit,
            task_manager=TaskManager(
                include_path=arguments.include_path and str(arguments.include_path),
                metadata={"pretrained": arguments.model, **lengths},
            ),
        )["results"]
    finally:
        # The next engine needs its memory.
        model.model.llm_engine.engine_core.shutdown()
    return {
        f"{task} {metric.partition(',')[0]}": float(score)
        for task, found in results.items()
        for metric, score in found.items()
        # RULER's tasks have a score for each length, and -1 for lengths that were not asked.
        if isinstance(score, int | float) and "stderr" not in metric and metric != "sample_len" and score >= 0
    }


if __name__ == "__main__":
    sys.exit(main())
