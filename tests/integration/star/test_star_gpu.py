"""Two hosts with a GPU each: keys over NCCL, decode in CUDA graphs that hold the exchange, and nothing left behind."""

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from farspan.engine_ext.errors import StarError
from farspan.star import StarLLM, StarOutput
from farspan.star.blocks import BlockSizes

from tests.integration.star.conftest import start_hosts
from tests.integration.star.test_star_llm import first_logprobs, forget_pages, greedy
from tests.integration.test_engine_tokens import make_prompts

pytest.importorskip("ray")

pytestmark = [pytest.mark.ray, pytest.mark.e2e, pytest.mark.multi_gpu, pytest.mark.filterwarnings("default")]

(PROMPT,) = make_prompts((3100,), seed=5)
CONTEXT, QUERY = PROMPT[:3000], PROMPT[3000:]
LOGPROB_TOLERANCE = 0.1
MEMORY_TOLERANCE_MIB = 64


def used_mib() -> list[int]:
    """Memory in use on each GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return [int(line) for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]


@pytest.fixture(scope="module")
def star_in_graphs(star_model: Path, fault_file: Path) -> Iterator[StarLLM]:
    """Hosts in bfloat16 with chunks of four pages."""
    before, started = used_mib(), time.monotonic()
    graphs = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2, 4]}
    with start_hosts(
        star_model,
        2,
        fault_file,
        graphs=True,
        dtype="bfloat16",
        enforce_eager=False,
        compilation_config=graphs,
        max_model_len=4096,
        block_size=128,
        num_gpu_blocks_override=256,
        max_num_batched_tokens=512,
        # Nothing is profiled, which fails where another process frees memory meanwhile.
        kv_cache_memory_bytes=2**28,
        gpu_memory_utilization=0.3,
        timeout_s=6,
        visibility="all",
    ) as llm:
        llm.sizes = BlockSizes(anchor="recompute")
        print(f"hosts up after {time.monotonic() - started:.1f} s")
        yield llm
    deadline = time.monotonic() + 10
    while max(now - then for now, then in zip(used_mib(), before, strict=True)) > MEMORY_TOLERANCE_MIB:
        assert time.monotonic() < deadline, (before, used_mib())
        time.sleep(0.5)
    print(f"memory in MiB before {before}, after {used_mib()}")


def distance(output: StarOutput, expected: StarOutput) -> float:
    """Largest difference of the first token's log probabilities that both tell."""
    ours, theirs = first_logprobs(output)[0], first_logprobs(expected)[0]
    return max(abs(ours[token] - theirs[token]) for token in ours.keys() & theirs.keys())


def test_all_ways_over_two_gpus(star_in_graphs: StarLLM) -> None:
    """An anchor that is sent is the computed one bit for bit; what sees all gives what one host gives."""
    from vllm import SamplingParams

    star, params = star_in_graphs, greedy(16, logprobs=20)
    exact = star.generate(CONTEXT, QUERY, params, block_len=3072)
    for name, output in {
        "two blocks": star.generate(CONTEXT, QUERY, params, block_len=1536),
        "all": star.generate(CONTEXT, QUERY, params, visibility="all"),
        "all again": star.generate(CONTEXT, QUERY, params, visibility="all"),
    }.items():
        times = output.times
        print(f"{name}: {distance(output, exact):.4f} from one host, {times}")
        assert distance(output, exact) < LOGPROB_TOLERANCE
    forget_pages(star)
    sent = star.generate(CONTEXT, QUERY, params, block_len=1536, anchor="share")
    forget_pages(star)
    computed = star.generate(CONTEXT, QUERY, params, block_len=1536, anchor="recompute")
    print(f"sent {sent.times}\ncomputed {computed.times}")
    assert min(sent.times.key_exchange_s) > 0
    assert max(computed.times.key_exchange_s) == 0
    assert first_logprobs(sent) == first_logprobs(computed)
    rates = star.hosts.measure()
    print(f"rates {rates}")
    assert star.generate(CONTEXT, QUERY, params, anchor="auto").token_ids
    # Hosts have prompts of other lengths, and must draw the same tokens.
    hot = SamplingParams(temperature=1.5, max_tokens=16, ignore_eos=True, seed=7)
    draws = [star.generate(CONTEXT, QUERY, hot).token_ids for _ in range(2)]
    assert draws[0] == draws[1]


def test_queries_together_decode_in_one_graph(star_in_graphs: StarLLM) -> None:
    """Three requests in the graph of four rows; a batch of another size may round otherwise."""
    prompts = [(CONTEXT[at:], QUERY) for at in (0, 700, 1500)]
    params = greedy(12, logprobs=5)
    alone = [star_in_graphs.generate(context, query, params) for context, query in prompts]
    for one, of_all in zip(alone, star_in_graphs.generate_together(prompts, params), strict=True):
        assert distance(of_all, one) < LOGPROB_TOLERANCE
        assert len(of_all.token_ids) == 12


def test_a_lost_host_is_named_and_the_next_request_served(star_in_graphs: StarLLM, fault: Callable[..., None]) -> None:
    """Host 0 waits for host 1 in a collective; both start anew, and the graphs are captured again."""
    star = star_in_graphs
    whole = star.generate(CONTEXT, QUERY, greedy(32)).token_ids
    print(f"answered: {whole}", flush=True)
    fault(1, "phase 2", "kill")
    started = time.monotonic()
    with pytest.raises(StarError, match="phase 2: host 1 is dead"):
        star.generate(CONTEXT, QUERY, greedy(32))
    print(f"named after {time.monotonic() - started:.1f} s", flush=True)
    again = star.generate(CONTEXT, QUERY, greedy(32)).token_ids
    print(f"served again after {star.restart_s:.1f} s", flush=True)
    assert again == whole
