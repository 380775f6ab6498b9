"""Two hosts on this machine, shared by the tests of a module: starting them takes longer than any test."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from farspan.star.blocks import BlockSizes

from tests.integration.star.faulty import FAULT_FILE, FaultyStarLLM
from tests.integration.tiny_models import write_model

ROOT = Path(__file__).resolve().parent.parent.parent.parent
PATIENCE_S = 60.0
"""With hosts: no host of a test is late by itself, however busy the machine is."""
TIMEOUT_S = 6.0
"""In requests that wait for a late one."""
ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # It compiles for a minute where its cache is empty.
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
PAGE = 16


@pytest.fixture(scope="session")
def star_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny Llama."""
    return write_model(tmp_path_factory.mktemp("star") / "llama", "llama")


def start_hosts(model: Path, num_hosts: int, fault_file: Path, **arguments: Any) -> FaultyStarLLM:
    """Hosts of the tiny model; arguments are StarLLM's."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    engine = {
        "dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "block_size": PAGE,
        "num_gpu_blocks_override": 256, "max_num_batched_tokens": 64,
    }  # fmt: skip
    return FaultyStarLLM(
        str(model),
        num_hosts,
        env={**ENV, "PYTHONPATH": path, FAULT_FILE: str(fault_file)},
        **({"timeout_s": PATIENCE_S, "start_timeout_s": 600} | engine | arguments),
    )


@contextmanager
def impatience(llm: FaultyStarLLM) -> Iterator[None]:
    """Requests in which a host is late after `TIMEOUT_S`."""
    llm.hosts.patience_s = TIMEOUT_S
    try:
        yield
    finally:
        llm.hosts.patience_s = PATIENCE_S


@pytest.fixture(scope="module")
def fault_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fault") / "fault.json"


@pytest.fixture(scope="module")
def star(star_model: Path, fault_file: Path) -> Iterator[FaultyStarLLM]:
    """Two hosts with pages of 16 tokens and chunks of 64."""
    with start_hosts(star_model, 2, fault_file, visibility="all") as llm:
        # What a request says nothing of.
        llm.sizes = BlockSizes(anchor="recompute")
        yield llm


@pytest.fixture
def fault(fault_file: Path) -> Iterator[Callable[..., None]]:
    """`fault(rank, phase, action, …)`: what happens to a host when it next does that phase."""

    def plan(rank: int, phase: str, action: str, **more: Any) -> None:
        fault_file.write_text(json.dumps({"rank": rank, "phase": phase, "action": action, **more}))

    yield plan
    fault_file.unlink(missing_ok=True)
