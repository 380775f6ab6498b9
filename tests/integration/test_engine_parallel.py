"""Tensor parallelism: two ranks give the tokens of one. On the CPU, or on two GPUs where there are GPUs.

vLLM's CPU workers talk through shared memory and gloo, and need no more than VLLM_CPU_OMP_THREADS_BIND=nobind.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.test_engine_tokens import make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]
if torch.cuda.is_available():
    pytestmark.append(pytest.mark.multi_gpu)

PROMPTS = make_prompts((1, 129, 1800), seed=21)
MASK_BLOCKS = 32


@pytest.fixture(autouse=True)
def spawned_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """On GPUs: a rank that is forked from a process with CUDA, where the engine of one rank has been, cannot start."""
    if torch.cuda.is_available():
        monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


@pytest.fixture
def mask_file(tmp_path: Path) -> Path:
    """One mask per query head, no two alike: a rank that took another's heads would give other tokens."""
    block = np.arange(MASK_BLOCKS)
    distance = block[:, None] - block
    mask = np.stack([(distance == 0) | ((distance % 3 == head % 3) & (distance > head)) for head in range(4)])
    path = tmp_path / "mask.npy"
    np.save(path, mask[None])
    return path


def prefill_options(method: str, mask_file: Path) -> dict[str, Any]:
    if method == "flex":
        return {"method": "flex", "gamma": 0.3, "min_budget": 0, "min_seq_len": 0, "min_chunk_len": 0}
    return {"method": "block_sparse", "pattern": "file", "block_size": 64, "mask_file": str(mask_file)}


def tokens_of(llm: Any, **extra_args: Any) -> list[list[int]]:
    """Greedy tokens of `PROMPTS`."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, extra_args=extra_args or None)
    inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [list(output.outputs[0].token_ids) for output in llm.generate(inputs, params, use_tqdm=False)]


@pytest.mark.parametrize("method", ["flex", "block_sparse"])
@pytest.mark.parametrize("architecture", ["llama", "mqa"], ids=["2-kv-heads", "1-kv-head-on-both-ranks"])
def test_two_ranks_give_the_tokens_of_one(make_llm: Any, mask_file: Path, architecture: str, method: str) -> None:
    """Sparsely, and with `method: dense` for the same requests."""

    def engine(num_ranks: int) -> Any:
        return make_llm(
            architecture,
            # Chunks that hold whole spans of tile rows.
            max_num_batched_tokens=700,
            max_num_seqs=8,
            enable_prefix_caching=False,
            additional_config={"farspan": {"prefill": prefill_options(method, mask_file)}},
            tensor_parallel_size=num_ranks,
        )

    dense, sparse = {"farspan.method": "dense"}, {}
    one = engine(1)
    expected = [tokens_of(one, **how) for how in (dense, sparse)]
    assert expected[0] != expected[1]
    two = engine(2)
    assert [tokens_of(two, **how) for how in (dense, sparse)] == expected
    counts = two.collective_rpc("attention_launches")
    assert [list(rank) for rank in counts] == [["FarspanImpl"]] * 2
    assert counts[0] == counts[1]
    assert counts[0]["FarspanImpl"]["prefill_sparse"] > 0
