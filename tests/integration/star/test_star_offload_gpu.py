"""Cold KV heads on two hosts with a GPU each: the tokens of the same hosts without, over NCCL, with few slots."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from farspan.star import StarLLM, StarOutput

from tests.integration.star.conftest import start_hosts
from tests.integration.star.test_star_gpu import CONTEXT, LOGPROB_TOLERANCE, QUERY, distance
from tests.integration.star.test_star_llm import greedy
from tests.integration.star.test_star_offload import pools

pytest.importorskip("ray")

pytestmark = [pytest.mark.ray, pytest.mark.e2e, pytest.mark.multi_gpu, pytest.mark.filterwarnings("default")]

LAYERS, KV_HEADS, PAGE, NUM_SLOTS, NUM_BLOCKS, MAX_LEN = 2, 2, 128, 10, 96, 4096
HEAD_PAGE, STUB = PAGE * 2 * 64 * 2, PAGE * 2
"""Bytes of a head's page in bfloat16, and of a page of a layer without hot heads."""


def cold_arguments(hot: Sequence[int]) -> dict[str, Any]:
    """Of hosts with few slots. hot: heads of each layer."""
    cold_page = sum(KV_HEADS - count for count in hot) * HEAD_PAGE
    block = sum(count * HEAD_PAGE or STUB for count in hot)
    staging = 2 * MAX_LEN // PAGE * HEAD_PAGE
    offload = {"host_memory": 2 * (NUM_BLOCKS + 0.5) * cold_page / (1 << 30), "hot_heads": list(hot), "group_size": 1}
    return {
        "options": {"offload": offload},
        "kv_cache_memory_bytes": NUM_SLOTS * cold_page + NUM_BLOCKS * block + staging,
        "num_gpu_blocks_override": NUM_BLOCKS,
    }


def ask_all(star: StarLLM) -> dict[str, StarOutput]:
    """Blocks of several lengths, a second question, another context, and one host alone."""
    params, found = greedy(16, logprobs=20), {}
    requests: dict[str, tuple[list[int], list[int], dict[str, Any]]] = {
        "blocks of N/4": (CONTEXT, QUERY, {}),
        "a second question": (CONTEXT, QUERY[:50], {}),
        "small blocks": (CONTEXT, QUERY, {"block_len": 512, "anchor_len": 256}),
        "two blocks": (CONTEXT, QUERY, {"block_len": 1536}),
        "another context": (CONTEXT[700:], QUERY, {}),
        "one host": (CONTEXT, QUERY, {"block_len": 3072}),
    }
    for name, (context, query, sizes) in requests.items():
        output = found[name] = star.generate(context, query, params, **sizes)
        times = output.times
        token_ms = 1e3 * sum(times.token_s) / len(times.token_s)
        print(f"{name}: {output.token_ids}, first token {times.first_token_s:.3f} s, {token_ms:.2f} ms", flush=True)
    return found


@pytest.mark.parametrize("hot", [(0, 0), (1, 0)], ids=["all-cold", "by-layer"])
def test_cold_heads_on_two_gpus(star_model: Path, fault_file: Path, hot: tuple[int, ...]) -> None:
    found = []
    for arguments in (cold_arguments(hot), {"kv_cache_memory_bytes": 2**28, "num_gpu_blocks_override": NUM_BLOCKS}):
        started = time.monotonic()
        with start_hosts(
            star_model,
            2,
            fault_file,
            dtype="bfloat16",
            max_model_len=MAX_LEN,
            block_size=PAGE,
            max_num_batched_tokens=512,
            gpu_memory_utilization=0.3,
            timeout_s=30,
            anchor="recompute",
            **arguments,
        ) as star:
            print(f"hosts up after {time.monotonic() - started:.1f} s: {sorted(arguments)}", flush=True)
            found.append(ask_all(star))
            if "options" in arguments:
                stream = star.stream(CONTEXT, QUERY, greedy(200))
                assert next(stream)
                stream.close()
                again = star.generate(CONTEXT, QUERY, greedy(16, logprobs=20))
                assert again.token_ids == found[0]["blocks of N/4"].token_ids
                assert star.restart_s == 0
                moves = pools(star)
                print(moves, flush=True)
                assert all(min(moved["spilled"], moved["staged"]) > 0 for moved in moves)
                # Two blocks see all of the context.
                print(f"two blocks: {distance(found[0]['two blocks'], found[0]['one host']):.4f} from one host")
                assert distance(found[0]["two blocks"], found[0]["one host"]) < LOGPROB_TOLERANCE
    for name, cold in found[0].items():
        away = distance(cold, found[1][name])
        same = cold.token_ids == found[1][name].token_ids
        print(f"{name}: first token's log probabilities {away:.4f} from those without offload, same tokens: {same}")
        assert away < LOGPROB_TOLERANCE
        assert same
