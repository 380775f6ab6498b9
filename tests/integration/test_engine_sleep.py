"""vLLM's sleep mode: what farspan keeps on the GPU survives it, or is made anew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.integration.test_engine_tokens import generate, make_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.e2e, pytest.mark.filterwarnings("default")]

PROMPTS = make_prompts((5, 700, 1800), seed=3)


@pytest.fixture
def mask_file(tmp_path: Path) -> Path:
    """A mask per query head: block ids that have to be right after a sleep, or the kernel reads anywhere."""
    block = np.arange(16)
    distance = block[:, None] - block
    path = tmp_path / "mask.npy"
    np.save(path, np.stack([(distance == 0) | (distance == head + 1) for head in range(4)])[None])
    return path


@pytest.mark.parametrize("level", [1, 2])
@pytest.mark.parametrize("method", ["dense", "string", "block_sparse", "flex"])
def test_same_tokens_after_sleep(
    make_llm: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, mask_file: Path, method: str, level: int
) -> None:
    options: dict[str, dict[str, Any]] = {
        "dense": {},
        "string": {"string": {"shift": 64, "window": 16}},
        "block_sparse": {"prefill": {"method": "block_sparse", "pattern": "file", "mask_file": str(mask_file)}},
        "flex": {"prefill": {"method": "flex", "gamma": 0.6, "min_budget": 0, "min_seq_len": 0, "min_chunk_len": 0}},
    }
    # The allocator that sleeps serves one engine per process.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    llm = make_llm(enable_sleep_mode=True, additional_config={"farspan": options[method]})
    expected = generate(llm, PROMPTS)
    llm.sleep(level)
    llm.wake_up(["weights"])
    if level == 2:
        llm.collective_rpc("reload_weights")
    llm.wake_up(["kv_cache"])
    llm.reset_prefix_cache()
    assert generate(llm, PROMPTS) == expected
