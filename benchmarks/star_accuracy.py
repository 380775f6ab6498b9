"""What blocks cost in answers: retrieval of the bundled needle model under Star Attention's masks, against dense.

One engine holds all blocks of a context, which computes the masks of any number of hosts. Blocks of N/2, N/4 and N/8
with the anchor as long as a block; at N/4 also the anchor of a quarter of a block and none (the paper's table 3).
"""

import os
import uuid
from dataclasses import dataclass
from typing import Any

import torch
from farspan.engine_ext.star.shard import NAME as STAR
from farspan.needle import model_dir
from farspan.needle.tasks import Sample, make_sample
from farspan.star.blocks import BlockSizes, plan_shards
from farspan.star.command import split_question

from benchmarks.engine import WORKER_ENV
from benchmarks.record import Recorder

NAME = "star"
TASKS = ("niah_single", "niah_multikey_2", "niah_multiquery", "variable_tracking")
PAGE_SIZE = 16
CHUNK = 8192


@dataclass(frozen=True)
class Blocks:
    """How a context is cut: `share` blocks (1 is dense), and the anchor as a fraction of a block."""

    share: int
    anchor: float = 1.0

    @property
    def variant(self) -> str:
        if self.share == 1:
            return "farspan"
        return f"farspan-star-n{self.share}" + ("" if self.anchor == 1 else f"-anchor{self.anchor:g}")

    def extra_args(self, num_tokens: int) -> dict[str, Any] | None:
        """The option of a request whose context has `num_tokens` tokens, whole pages."""
        if self.share == 1:
            return None
        block_len = -(-num_tokens // (self.share * PAGE_SIZE)) * PAGE_SIZE
        anchor_len = int(block_len * self.anchor) // PAGE_SIZE * PAGE_SIZE
        shards = plan_shards(uuid.uuid4().hex, num_tokens, 1, PAGE_SIZE, BlockSizes(block_len, anchor_len), 1.0)
        assert shards is not None
        import msgspec

        return {STAR: msgspec.to_builtins(shards[0])}


BLOCKS = (Blocks(1), Blocks(2), Blocks(4), Blocks(8), Blocks(4, 0.25), Blocks(4, 0.0))


def cases(dry_run: bool) -> list[tuple[int, int]]:
    """List (prompt tokens, questions of each task)."""
    return [(512, 2)] if dry_run else [(2048, 50), (8192, 50), (32768, 20)]


def run(recorder: Recorder) -> None:
    for name, value in WORKER_ENV.items():
        os.environ.setdefault(name, value)
    from vllm import LLM

    longest = max(length for length, _ in cases(recorder.dry_run))
    arguments: dict[str, Any] = {"max_model_len": longest + 256, "max_num_batched_tokens": CHUNK, "seed": 0}
    if not torch.cuda.is_available():
        arguments |= {"dtype": "float32"}
    llm = LLM(
        str(model_dir()),
        attention_backend="CUSTOM",
        additional_config={"farspan": {"star": {}}},
        enable_prefix_caching=True,
        block_size=PAGE_SIZE,
        enforce_eager=True,
        **arguments,
    )
    for length, count in cases(recorder.dry_run):
        for task in TASKS:
            samples = [make_sample(task, length, seed=20_000 + index) for index in range(count)]
            for blocks in BLOCKS:
                scores = answer(llm, samples, blocks)
                recorder.add(NAME, f"n{length}-{task}-needle", blocks.variant, "accuracy", "fraction", [mean(scores)])


def answer(llm: Any, samples: list[Sample], blocks: Blocks) -> list[float]:
    """The share of right answers to each question."""
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    prompts, params = [], []
    for sample in samples:
        tokens = tokenizer.encode(sample.prompt)
        query_len = len(tokenizer.encode(split_question(sample.prompt)[1], add_special_tokens=False))
        num_context = (len(tokens) - query_len) // PAGE_SIZE * PAGE_SIZE
        prompts.append({"prompt_token_ids": tokens})
        params.append(
            SamplingParams(temperature=0.0, max_tokens=sample.max_new_tokens, extra_args=blocks.extra_args(num_context))
        )
    outputs = llm.generate(prompts, params, use_tqdm=False)
    scores = []
    for sample, output in zip(samples, outputs, strict=True):
        words = output.outputs[0].text.split()
        scores.append(mean([float(expected in words) for expected in sample.answers]))
    return scores


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
