"""Offline generation with farspan: `python examples/offline.py [MODEL]`; the small bundled model if none is named."""

import sys

from farspan.needle import model_dir
from farspan.needle.tasks import make_sample
from vllm import LLM, SamplingParams


def main() -> None:
    model = sys.argv[1] if len(sys.argv) > 1 else str(model_dir())
    llm = LLM(
        model,
        attention_backend="CUSTOM",
        additional_config={"farspan": {"prefill": {"method": "flex", "gamma": 0.95}}},
        max_model_len=8192,
    )
    sample = make_sample("niah_multiquery", 4096, seed=1)
    prompts = [sample.prompt, sample.prompt]
    greedy = SamplingParams(temperature=0.0, max_tokens=sample.max_new_tokens)
    # A request may choose for itself: this one is computed exactly.
    exact = SamplingParams(temperature=0.0, max_tokens=sample.max_new_tokens, extra_args={"farspan.method": "dense"})
    for name, output in zip(("flex", "dense"), llm.generate(prompts, [greedy, exact]), strict=True):
        print(f"{name}: {output.outputs[0].text.strip()}")
    print(f"expected: {' '.join(sample.answers)}")


if __name__ == "__main__":
    main()
