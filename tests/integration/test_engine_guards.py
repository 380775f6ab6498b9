"""On a GPU: no step waits for the device, compiles a kernel once the engine is up, or takes memory nobody left for it.

vLLM checks the first two itself. VLLM_GPU_SYNC_CHECK=error raises where a step synchronises, and --jit-monitor-mode
error where a kernel is compiled after warm-up; a warm-up is what enforce_eager leaves out. Either is switched on once
for a whole process, so these engines run in processes of their own, and an engine that raises ends its test.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.integration.test_engine_tokens import generate, make_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.e2e, pytest.mark.filterwarnings("default")]

MAX_MODEL_LEN = 20480
"""A table of 160 pages, and 161 where heads are cold: Triton tells multiples of 16 from other numbers."""
CHUNK_LEN = 4096
LADDER = (1, 2, 17, 128, 129, 1000, 2049, 4097, 9000, 19000)
"""Prompt lengths in tokens: one per order of magnitude of tiles and of KV blocks, most of them on no edge."""
OPTIONS: dict[str, dict[str, Any]] = {
    "dense": {},
    "flex": {"prefill": {"method": "flex", "gamma": 0.9, "min_budget": 0, "min_seq_len": 0, "min_chunk_len": 0}},
    "block_sparse": {"prefill": {"method": "block_sparse", "local_blocks": 2}},
    "string": {"string": {"shift": 64, "window": 16}},
    "offload": {"offload": {"host_memory": 1}},
    "select": {"offload": {"host_memory": 1, "cold_decode": {"method": "select"}}},
}


@pytest.fixture
def own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines of this test run in a fresh process."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")


def make_engine(make_llm: Any, options: dict[str, Any] | None, **kwargs: Any) -> Any:
    """An engine for `LADDER` in bfloat16, which FlashAttention 3 computes; options None for vLLM's own backend."""
    return make_llm(
        "llama",
        None if options is None else "CUSTOM",
        dtype="bfloat16",
        hf_overrides={"max_position_embeddings": MAX_MODEL_LEN},
        max_model_len=MAX_MODEL_LEN,
        num_gpu_blocks_override=4 * MAX_MODEL_LEN // 128,
        max_num_batched_tokens=CHUNK_LEN,
        max_num_seqs=8,
        additional_config={} if options is None else {"farspan": options},
        **kwargs,
    )


def prefill_every_way(llm: Any) -> None:
    """Send whole prompts and long ones in chunks, each alone; short chunks on a long prefix; and mixed batches.

    llm: an engine with prefix caching.
    """
    prompts = make_prompts(LADDER)
    for prompt in prompts:
        generate(llm, [prompt], 4)
    longest = prompts[-1]
    for tail in make_prompts((1, 5, 60, 300), seed=1):
        generate(llm, [longest + tail], 4)
    # Short prompts decode while the chunks of long ones are computed.
    generate(llm, make_prompts((5, 9000, 40, 700, 4097, 64), seed=2), [60, 4, 50, 30, 8, 40])


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.usefixtures("own_process")
def test_no_step_waits_for_the_device(make_llm: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("VLLM_GPU_SYNC_CHECK", "error")
    prefill_every_way(make_engine(make_llm, OPTIONS[name]))


GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4, 8]}


@pytest.mark.parametrize("name", ["vllm", *OPTIONS])
@pytest.mark.usefixtures("own_process")
def test_no_kernel_is_compiled_after_warm_up(make_llm: Any, name: str) -> None:
    """The case `vllm` is the control: the same requests with the backend that vLLM chooses itself."""
    llm = make_engine(
        make_llm, OPTIONS.get(name), enforce_eager=False, compilation_config=GRAPHS, jit_monitor_mode="error"
    )
    prefill_every_way(llm)


@contextmanager
def synchronising_raises() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def watch_waits(monkeypatch: pytest.MonkeyPatch, *methods: tuple[type[Any], str]) -> Counter[str]:
    """From here on, raise where one of the methods waits for the device. Returns how often each is called, by name."""
    calls: Counter[str] = Counter()

    def watch(owner: type[Any], method: str) -> None:
        stock = getattr(owner, method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            calls[method] += 1
            with synchronising_raises():
                return stock(*args, **kwargs)

        monkeypatch.setattr(owner, method, watched)

    for owner, method in methods:
        watch(owner, method)
    return calls


@pytest.mark.parametrize("name", OPTIONS)
def test_attention_never_waits_for_the_device(make_llm: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """PyTorch's own check, around what vLLM calls once per step and once per layer."""
    from farspan.engine_ext.impl import FarspanImpl
    from farspan.engine_ext.metadata import FarspanMetadataBuilder

    llm = make_engine(make_llm, OPTIONS[name])
    per_layer = ((FarspanImpl, "do_kv_cache_update"), (FarspanImpl, "forward"))
    calls = watch_waits(monkeypatch, (FarspanMetadataBuilder, "build"), *per_layer)
    prefill_every_way(llm)
    assert calls["forward"] >= calls["build"] > 0
    assert calls["do_kv_cache_update"] > 0


def test_the_longest_chunk_takes_no_more_memory_than_profiled(make_llm: Any) -> None:
    """What selection allocates for a while is left free beside the KV cache: most of what this small model takes."""
    max_len, chunk_len = 131072, 16384
    llm = make_llm(
        "llama",
        dtype="bfloat16",
        hf_overrides={"max_position_embeddings": max_len},
        max_model_len=max_len,
        num_gpu_blocks_override=max_len // 128 + 2,
        max_num_batched_tokens=chunk_len,
        max_num_seqs=1,
        additional_config={"farspan": OPTIONS["flex"]},
    )
    (left_free,) = llm.collective_rpc("memory_for_activations")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    generate(llm, make_prompts((max_len - 1,)), 1)
    assert 0 < torch.cuda.max_memory_allocated() - before <= left_free
