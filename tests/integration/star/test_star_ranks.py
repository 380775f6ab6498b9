"""Two hosts of two tensor-parallel ranks each: the tokens of one rank a host, and a rank's death. One start for all.

The model is a mixture of experts with YaRN positions, which hosts turn as they do all others.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from farspan.engine_ext.errors import StarError
from farspan.star.blocks import BlockSizes

from tests.integration.star.conftest import PATIENCE_S, start_hosts
from tests.integration.star.faulty import FaultyStarLLM
from tests.integration.star.test_star_llm import (
    CONTEXT,
    CONTEXT_LEN,
    MAX_TOKENS,
    PROMPT,
    QUERY,
    expected_tokens,
    greedy,
)
from tests.integration.star_oracle import StarLlama
from tests.integration.test_engine_features import YARN
from tests.integration.tiny_models import write_model

pytest.importorskip("ray")

pytestmark = [pytest.mark.ray, pytest.mark.e2e, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("star") / "mixtral", "mixtral")


@pytest.fixture(scope="module")
def pairs(mixture: Path, fault_file: Path) -> Iterator[FaultyStarLLM]:
    """Two hosts of two ranks: six processes, which share the machine's cores."""
    overrides = {"rope_parameters": YARN, "max_position_embeddings": 1024}
    arguments = {"tensor_parallel_size": 2, "visibility": "all", "hf_overrides": overrides}
    with start_hosts(mixture, 2, fault_file, **arguments) as llm:
        llm.sizes = BlockSizes(anchor="recompute")
        yield llm


def worker_pids(llm: FaultyStarLLM) -> list[int]:
    import ray

    return [pid for actor in llm.hosts.actors for pid in ray.get(actor.worker_pids.remote())]


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_two_gpus_a_host_give_the_tokens_of_one(pairs: FaultyStarLLM, mixture: Path) -> None:
    """The anchor computed by both hosts, and sent by one; then another question, all blocks visible, one host alone."""
    assert len(set(worker_pids(pairs))) == 4
    first = pairs.generate(CONTEXT, QUERY, greedy())
    assert first.token_ids == expected_tokens(mixture, first, CONTEXT, QUERY, YARN)
    assert first.token_ids != expected_tokens(mixture, first, CONTEXT, QUERY)
    context = PROMPT[31 : 31 + CONTEXT_LEN]
    sent = pairs.generate(context, QUERY, greedy(), block_len=192, anchor="share")
    assert sent.token_ids == expected_tokens(mixture, sent, context, QUERY, YARN)
    assert min(sent.times.key_exchange_s) > 0
    other = list(reversed(QUERY))
    again = pairs.generate(context, other, greedy(), block_len=192, anchor="share")
    assert again.token_ids == expected_tokens(mixture, again, context, other, YARN)
    assert again.shards is not None
    assert again.output.num_cached_tokens == again.shards[again.shards[0].query_host].local_len
    exact = StarLlama(mixture, 1, CONTEXT_LEN, 0, YARN).generate(context + QUERY, MAX_TOKENS)
    everything = pairs.generate(context, QUERY, greedy(), visibility="all")
    assert everything.token_ids == exact
    assert everything.shards is not None
    assert pairs.generate(context, QUERY, greedy(), block_len=368).token_ids == exact
    assert pairs.restart_s == 0


def test_sampled_tokens_measured_rates_and_an_abort(pairs: FaultyStarLLM) -> None:
    """All ranks of both hosts draw the same, and end a request at the same step."""
    from vllm import SamplingParams

    hot = SamplingParams(temperature=1.5, max_tokens=6, ignore_eos=True, seed=7)
    draws = [pairs.generate(CONTEXT, QUERY, hot).token_ids for _ in range(2)]
    assert draws[0] == draws[1]
    assert pairs.generate(CONTEXT, QUERY, greedy(), anchor="auto").token_ids
    assert pairs.sharing_pays is not None
    stream = pairs.stream(CONTEXT, QUERY, greedy(400))
    assert next(stream)
    stream.close()
    assert len(pairs.generate(CONTEXT, QUERY, greedy()).token_ids) == MAX_TOKENS
    assert pairs.restart_s == 0


def test_a_host_whose_rank_dies_is_named_and_nothing_is_left(pairs: FaultyStarLLM, fault: Callable[..., None]) -> None:
    pids = worker_pids(pairs)
    fault(1, "phase 2", "kill-rank")
    started = time.monotonic()
    with pytest.raises(StarError, match=r"phase 2.*: host 1 is dead"):
        pairs.generate(CONTEXT, QUERY, greedy(32))
    assert time.monotonic() - started < PATIENCE_S
    deadline = time.monotonic() + 10
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_alive, pids))
