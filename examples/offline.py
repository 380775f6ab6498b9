"""Offline generation with farspan: `python examples/offline.py [MODEL]`; the small bundled model if none is named."""

import argparse
import sys

from farspan.command import run_command
from farspan.needle import model_dir
from farspan.needle.tasks import make_sample
from vllm import LLM, SamplingParams

# Flex is sparse from here on. By default it is where that is faster, which is no prompt of a model so small.
MIN_SEQ_LEN = 4096
PROMPT_LEN = 8192


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask one long question sparsely and exactly.")
    parser.add_argument("model", nargs="?", default=str(model_dir()), help="a folder or a Hugging Face name")
    llm = LLM(
        parser.parse_args().model,
        attention_backend="CUSTOM",
        additional_config={"farspan": {"prefill": {"method": "flex", "gamma": 0.95, "min_seq_len": MIN_SEQ_LEN}}},
        max_model_len=16384,
    )
    sample = make_sample("niah_multiquery", PROMPT_LEN, seed=1)
    prompts = [sample.prompt, sample.prompt]
    greedy = SamplingParams(temperature=0.0, max_tokens=sample.max_new_tokens)
    # A request may choose for itself: this one is computed exactly.
    exact = SamplingParams(temperature=0.0, max_tokens=sample.max_new_tokens, extra_args={"farspan.method": "dense"})
    for name, output in zip(("flex", "dense"), llm.generate(prompts, [greedy, exact]), strict=True):
        print(f"{name}: {output.outputs[0].text.strip()}")
    print(f"expected: {' '.join(sample.answers)}")


if __name__ == "__main__":
    sys.exit(run_command("examples/offline.py", main))
