"""Cold KV heads on two hosts in Ray actors: tokens of the float64 model, whatever lies in slots or in host memory.

The model has llama3 positions, which hosts turn as they do all others.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from farspan.engine_ext.errors import ConfigError
from farspan.star import StarLLM
from farspan.star.protocol import HostFacts
from farspan.star.room import check_room
from farspan.star.work import Work

from tests.integration.star.conftest import PAGE, start_hosts
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
from tests.integration.test_engine_experts import LLAMA3
from tests.integration.test_engine_offload import offloading

pytest.importorskip("ray")

pytestmark = [pytest.mark.ray, pytest.mark.e2e, pytest.mark.filterwarnings("default")]

NUM_SLOTS, NUM_BLOCKS = 12, 80


def cold_hosts(model: Path, fault_file: Path, hot: Any = (1, 0), **changes: Any) -> StarLLM:
    """Two hosts with few slots, hot heads by layer, and chunks of 64 tokens."""
    arguments = offloading(NUM_SLOTS, hot=list(hot), blocks=NUM_BLOCKS, enable_prefix_caching=True)
    options = arguments.pop("additional_config")["farspan"]
    # Of the machine, which both hosts are on.
    options["offload"]["host_memory"] *= 2
    del arguments["max_num_seqs"]
    return start_hosts(model, 2, fault_file, options=options, **{**arguments, **changes})


@pytest.fixture(scope="module")
def star(star_model: Path, fault_file: Path) -> Iterator[StarLLM]:
    """Half of the heads of one layer are cold, and all of the other's."""
    overrides = {"rope_parameters": LLAMA3, "max_position_embeddings": 2048}
    with cold_hosts(star_model, fault_file, hf_overrides=overrides) as llm:
        yield llm


def pools(star: StarLLM) -> list[dict[str, int]]:
    """Of each host, after it has checked its tables and pools."""
    import ray

    return [pages for actor in star.hosts.actors for pages in ray.get(actor.pools.remote())]


def test_tokens_are_those_of_the_oracle(star: StarLLM, star_model: Path) -> None:
    """Default blocks, smaller ones, a smaller anchor, none; the context's end fills no page; a second question."""
    for block_len, anchor_len in ((None, None), (48, 16), (64, 0)):
        output = star.generate(CONTEXT, QUERY, greedy(), block_len=block_len, anchor_len=anchor_len)
        assert output.token_ids == expected_tokens(star_model, output, CONTEXT, QUERY, LLAMA3)
        assert output.shards is not None
        assert all(shard.num_blocks > 0 for shard in output.shards)
    assert output.token_ids != expected_tokens(star_model, output, CONTEXT, QUERY)
    other = list(reversed(QUERY))
    second = star.generate(CONTEXT, other, greedy(), block_len=64, anchor_len=0)
    assert second.token_ids == expected_tokens(star_model, second, CONTEXT, other, LLAMA3)
    assert second.shards is not None
    assert second.output.num_cached_tokens == second.shards[second.shards[0].query_host].local_len
    # One host alone, whose cold heads are as in any engine.
    exact = StarLlama(star_model, 1, CONTEXT_LEN, 0, LLAMA3).generate(CONTEXT + QUERY, MAX_TOKENS)
    assert star.generate(CONTEXT, QUERY, greedy(), block_len=368).token_ids == exact
    assert star.restart_s == 0
    moves = pools(star)
    assert len(moves) == 2
    for moved in moves:
        assert moved["slots"] == NUM_SLOTS
        assert min(moved["spilled"], moved["staged"]) > 0


def test_an_abort_leaves_pools_and_hosts_as_they_were(star: StarLLM, star_model: Path) -> None:
    """In phase 1, and in phase 2 at the same step of all hosts."""
    context = PROMPT[17 : 17 + CONTEXT_LEN]
    for max_tokens in (1, 100):
        work = star.work(context, QUERY, greedy(max_tokens), star.sizes, [])
        phase = "phase 1" if max_tokens == 1 else "phase 2"
        assert any(progress.phase == phase for progress in work)
        work.close()
        output = star.generate(context, QUERY, greedy())
        assert output.token_ids == expected_tokens(star_model, output, context, QUERY, LLAMA3)
        pools(star)
    assert star.restart_s == 0


def test_a_host_lost_in_phase_1_is_replaced_by_one_with_as_much_host_memory(
    star: StarLLM, star_model: Path, fault: Callable[..., None]
) -> None:
    before = [facts.host_bytes for facts in star.hosts.facts]
    # Three of the two layers' four heads, each with keys and values of 64 in float32.
    assert before == [NUM_BLOCKS * 3 * PAGE * 2 * 64 * 4] * 2
    fault(1, "phase 1", "kill")
    context = PROMPT[29 : 29 + CONTEXT_LEN]
    output = star.generate(context, QUERY, greedy())
    assert output.token_ids == expected_tokens(star_model, output, context, QUERY, LLAMA3)
    assert output.times.restart_s > 0
    assert [facts.host_bytes for facts in star.hosts.facts] == before
    pools(star)


def test_what_does_not_fit_is_refused_before_phase_1(star: StarLLM) -> None:
    before = pools(star)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"context": PROMPT * 4}, "(max_model_len). Use more hosts, a larger max_model_len or offload.host_memory"),
        ({"anchor": "share"}, "anchor='share' together with offload; allowed: 'recompute' or 'auto'"),
    ]
    for changes, sentence in mistakes:
        with pytest.raises(ConfigError) as caught:
            star.generate(**{"context": CONTEXT, "query": QUERY, "sampling_params": greedy(), **changes})
        assert sentence in str(caught.value)
    with pytest.raises(ConfigError, match="2 prompts together with offload; allowed: 1"):
        star.generate_together([(CONTEXT, QUERY)] * 2, greedy())
    assert pools(star) == before


def test_a_share_that_host_memory_does_not_hold_is_refused() -> None:
    facts = [HostFacts(PAGE, 4096, 1024, 512, 1000.0, 128, 0.0)]
    work = Work("r", [1] * 1000, [1] * 20, greedy(5), None, False)
    with pytest.raises(ConfigError) as caught:
        check_room([work], facts, has_offload=True)
    assert "host 0 needs 1025 tokens" in str(caught.value)
    assert "it has 1024 (tokens that its host memory and GPU memory hold)" in str(caught.value)
    assert "offload.host_memory" in str(caught.value)
    work.params.max_tokens = 4
    check_room([work], facts, has_offload=True)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"graphs": True}, "star.graphs=True; allowed: False together with offload"),
        ({"visibility": "all"}, "visibility='all' together with offload; allowed: 'star'"),
        ({"anchor": "share"}, "anchor='share' together with offload; allowed: 'recompute'"),
        (
            {"options": {"offload": {"cold_decode": {"method": "select"}}}},
            "method 'exact' together with star: hosts would choose by the mass of their own keys",
        ),
    ],
    ids=["graphs", "all", "share", "select"],
)
def test_what_hosts_with_cold_heads_cannot_do_is_refused_at_once(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        StarLLM("nowhere", hosts=2, **{"options": {"offload": {}}, **arguments})
    assert sentence in str(caught.value)
