"""Tensor and pipeline parallelism: two ranks give the tokens of one. On the CPU, or on two GPUs where there are GPUs.

vLLM's CPU workers talk through shared memory and gloo, and need no more than VLLM_CPU_OMP_THREADS_BIND=nobind.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.integration.test_engine_tokens import make_prompts
from tests.integration.tiny_models import LAYERS

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
    """A mask for each layer and query head, none like its neighbours: a rank with another's would give other tokens."""
    block = np.arange(MASK_BLOCKS)
    distance = block[:, None] - block
    masks = [
        [(distance == 0) | ((distance % 3 == (head + layer) % 3) & (distance > head)) for head in range(4)]
        for layer in range(LAYERS)
    ]
    path = tmp_path / "mask.npy"
    np.save(path, np.array(masks))
    return path


def options_of(method: str, mask_file: Path) -> dict[str, Any]:
    flex = {"method": "flex", "gamma": 0.3, "min_budget": 0, "min_seq_len": 0, "min_chunk_len": 0}
    mask = {"method": "block_sparse", "pattern": "file", "block_size": 64, "mask_file": str(mask_file)}
    prefill = {"flex": flex, "block_sparse": mask, "string-block_sparse": mask}[method]
    return {"prefill": prefill, **({"string": {"shift": 300, "window": 32}} if method.startswith("string") else {})}


def tokens_of(llm: Any, **extra_args: Any) -> list[list[int]]:
    """Greedy tokens of `PROMPTS`."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, extra_args=extra_args or None)
    inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    return [list(output.outputs[0].token_ids) for output in llm.generate(inputs, params, use_tqdm=False)]


TENSOR, PIPELINE = {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}
# The second stage of vLLM's CPU build has no place for what it receives: it fails at the first step.
STAGES = pytest.mark.multi_gpu


@pytest.mark.parametrize(
    ("architecture", "method", "ranks"),
    [
        pytest.param("llama", "flex", TENSOR, id="2-kv-heads-flex"),
        pytest.param("llama", "string-block_sparse", TENSOR, id="2-kv-heads-string-block_sparse"),
        pytest.param("mqa", "flex", TENSOR, id="1-kv-head-on-both-ranks-flex"),
        pytest.param("mqa", "block_sparse", TENSOR, id="1-kv-head-on-both-ranks-block_sparse"),
        pytest.param("llama", "flex", PIPELINE, id="2-stages-flex", marks=STAGES),
        pytest.param("llama", "string-block_sparse", PIPELINE, id="2-stages-string-block_sparse", marks=STAGES),
    ],
)
def test_two_ranks_give_the_tokens_of_one(
    make_llm: Any, mask_file: Path, architecture: str, method: str, ranks: dict[str, int]
) -> None:
    """Sparsely, and with `method: dense` for the same requests. Stages have a layer each, and a mask of its own."""

    def engine(ranks: dict[str, int]) -> Any:
        return make_llm(
            architecture,
            # Chunks that hold whole spans of tile rows.
            max_num_batched_tokens=700,
            max_num_seqs=8,
            enable_prefix_caching=False,
            additional_config={"farspan": options_of(method, mask_file)},
            **ranks,
        )

    dense, sparse = {"farspan.method": "dense"}, {}
    one = engine({})
    expected = [tokens_of(one, **how) for how in (dense, sparse)]
    assert expected[0] != expected[1]
    # What its process group is in, two ranks cannot be made from.
    one.llm_engine.engine_core.shutdown()
    two = engine(ranks)
    assert [tokens_of(two, **how) for how in (dense, sparse)] == expected
    counts = two.collective_rpc("attention_launches")
    assert [list(rank) for rank in counts] == [["FarspanImpl"]] * 2
    assert counts[0] == counts[1]
    assert counts[0]["FarspanImpl"]["prefill_sparse"] > 0
