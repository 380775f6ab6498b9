"""StarLLM over two real engines in Ray actors: tokens against a float64 model, faults against the clock."""

import http.client
import json
import os
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from farspan.engine_ext.errors import ConfigError, StarError
from farspan.star import StarLLM, StarOutput
from farspan.star.arguments import MARKER
from farspan.star.output import Progress
from farspan.star.rendezvous import bind_port
from farspan.star.serve import make_app

from tests.integration.star.conftest import PAGE, PATIENCE_S, TIMEOUT_S, impatience, start_hosts
from tests.integration.star.faulty import FaultyStarLLM
from tests.integration.star_oracle import StarLlama
from tests.integration.test_engine_tokens import make_prompts

pytest.importorskip("ray")

pytestmark = [pytest.mark.ray, pytest.mark.alone, pytest.mark.e2e, pytest.mark.filterwarnings("default")]

(PROMPT,) = make_prompts((420,), seed=5)
CONTEXT_LEN, QUERY_LEN, MAX_TOKENS = 359, 70, 8
CONTEXT, QUERY = PROMPT[:CONTEXT_LEN], PROMPT[CONTEXT_LEN - 9 : CONTEXT_LEN - 9 + QUERY_LEN]


def greedy(max_tokens: int = MAX_TOKENS, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **more)


def expected_tokens(
    model: Path, output: StarOutput, context: list[int], query: list[int], rope: dict[str, Any] | None = None
) -> list[int]:
    """The oracle's tokens for the blocks that an answer came from."""
    assert output.shards is not None
    shard = output.shards[0]
    oracle = StarLlama(model, shard.context_len, shard.block_len, shard.anchor_len, rope)
    return oracle.generate(context + query, len(output.token_ids))


def test_tokens_are_those_of_the_oracle(star: StarLLM, star_model: Path) -> None:
    """Default blocks on two hosts, smaller ones, a smaller anchor, none; the context's end fills no page."""
    seen = set()
    for block_len, anchor_len in ((None, None), (48, None), (48, 16), (64, 0)):
        progress: list[Progress] = []
        output = star.generate(
            CONTEXT, QUERY, greedy(), block_len=block_len, anchor_len=anchor_len, on_progress=progress.append
        )
        assert output.token_ids == expected_tokens(star_model, output, CONTEXT, QUERY)
        assert output.shards is not None
        assert all(shard.num_blocks > 0 for shard in output.shards)
        assert output.shards[0].context_len == CONTEXT_LEN // PAGE * PAGE
        assert output.times.exchanged_bytes > 0
        assert progress[-1].num_blocks_done == progress[-1].num_blocks > 1
        seen.add(tuple(output.token_ids))
    assert len(seen) > 1


def test_exact_attention_where_a_block_holds_the_context(star: StarLLM, star_model: Path) -> None:
    exact = StarLlama(star_model, 1, CONTEXT_LEN, 0).generate(CONTEXT + QUERY, MAX_TOKENS)
    one = star.generate(CONTEXT, QUERY, greedy(), block_len=368)
    assert one.shards is None
    assert one.token_ids == exact
    # Two blocks see all of the context too, over two hosts.
    two = star.generate(CONTEXT, QUERY, greedy(), block_len=192)
    assert two.shards is not None
    assert two.token_ids == exact
    short = star.generate(CONTEXT[: PAGE - 1], QUERY, greedy())
    assert short.shards is None
    assert short.token_ids == StarLlama(star_model, 1, 500, 0).generate(CONTEXT[: PAGE - 1] + QUERY, MAX_TOKENS)


def first_logprobs(output: StarOutput) -> list[dict[int, float]]:
    places = output.output.outputs[0].logprobs or []
    return [{token: entry.logprob for token, entry in place.items()} for place in places]


def forget_pages(star: StarLLM, *ranks: int) -> None:
    """Empty the prefix caches of these hosts, of all by default."""
    import ray

    for rank in ranks or range(star.num_hosts):
        ray.get(star.hosts.actors[rank].forget.remote())


def test_an_anchor_that_host_0_sends_gives_the_same_bits(star: StarLLM, star_model: Path) -> None:
    """Blocks and chunks are the same on both ways; then again, with the anchor in all caches, and a new one."""
    context = PROMPT[31 : 31 + CONTEXT_LEN]
    outputs = [
        star.generate(context, QUERY, greedy(logprobs=20), block_len=192, anchor=anchor)
        for anchor in ("share", "share", "recompute")
    ]
    assert outputs[0].token_ids == expected_tokens(star_model, outputs[0], context, QUERY)
    assert outputs[0].shards is not None
    assert [shard.num_blocks for shard in outputs[0].shards] == [1, 1]
    assert all(seconds > 0 for seconds in outputs[0].times.key_exchange_s)
    assert outputs[1].times.key_exchange_s == [0.0, 0.0]
    context = PROMPT[33 : 33 + CONTEXT_LEN]
    sent = star.generate(context, QUERY, greedy(logprobs=20), block_len=192, anchor="share")
    forget_pages(star)
    computed = star.generate(context, QUERY, greedy(logprobs=20), block_len=192, anchor="recompute")
    assert sent.shards is not None
    assert computed.shards is not None
    assert [shard.num_blocks for shard in sent.shards] == [shard.num_blocks for shard in computed.shards]
    assert first_logprobs(sent) == first_logprobs(computed)
    assert max(computed.times.key_exchange_s) == 0
    assert star.generate(context, QUERY, greedy(), anchor="auto").token_ids
    assert star.sharing_pays is not None


def test_every_token_sees_all_before_it_over_two_hosts(star: StarLLM, star_model: Path) -> None:
    """Exact attention, whatever the lengths; a second question finds what it can in the hosts' caches."""
    for length in (CONTEXT_LEN, 200, 300):
        context = PROMPT[7 : 7 + length]
        exact = StarLlama(star_model, 1, length, 0).generate(context + QUERY, MAX_TOKENS)
        output = star.generate(context, QUERY, greedy(), visibility="all")
        assert output.token_ids == exact
        assert output.shards is not None
        assert sum(shard.own_len for shard in output.shards) == output.shards[0].context_len <= length
        assert min(output.times.key_exchange_s) > 0
        again = star.generate(context, QUERY, greedy(), visibility="all")
        assert again.token_ids == exact
    # One host has lost its pages: all begin anew.
    forget_pages(star, 1)
    assert star.generate(context, QUERY, greedy(), visibility="all").token_ids == exact
    assert star.restart_s == 0
    # Too short for a page in each part: one host.
    assert star.generate(context[:40], QUERY, greedy(), visibility="all").shards is None
    for changes in ({"block_len": 48}, {"anchor_len": 16}, {"anchor": "share"}):
        with pytest.raises(ConfigError, match="allowed: only with visibility='star'"):
            star.generate(context, QUERY, greedy(), visibility="all", **changes)
    with pytest.raises(ConfigError, match="visibility='some'; allowed: 'star', 'all'"):
        star.generate(context, QUERY, greedy(), visibility="some")  # type: ignore[arg-type]


def test_a_second_question_reads_no_block_again(star: StarLLM, star_model: Path) -> None:
    context = PROMPT[11 : 11 + CONTEXT_LEN]
    first = star.generate(context, QUERY, greedy())
    other = list(reversed(QUERY))
    second = star.generate(context, other, greedy())
    assert first.token_ids == expected_tokens(star_model, first, context, QUERY)
    assert second.token_ids == expected_tokens(star_model, second, context, other)
    assert second.shards is not None
    query_shard = second.shards[second.shards[0].query_host]
    assert second.output.num_cached_tokens == query_shard.local_len


def test_text_markers_and_sampling(star: StarLLM) -> None:
    text = " ".join(f"t{token}" for token in CONTEXT)
    question = " ".join(f"t{token}" for token in QUERY)
    apart = star.generate(text, question, greedy())
    together = star.generate(f"{text}{MARKER}{question}", None, greedy())
    assert apart.token_ids == together.token_ids
    assert apart.text
    from vllm import SamplingParams

    # A seed of its own is the same on both hosts, or their tokens would differ.
    hot = SamplingParams(temperature=1.5, max_tokens=12, ignore_eos=True)
    draws = [star.generate(CONTEXT, QUERY, hot).token_ids for _ in range(2)]
    assert draws[0] != draws[1]
    hot.seed = 7
    draws = [star.generate(CONTEXT, QUERY, hot).token_ids for _ in range(2)]
    assert draws[0] == draws[1]


def test_structured_output(star: StarLLM) -> None:
    """Every host holds the answer to the same grammar."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    # No token is the beginning of another that is allowed.
    choices = ["t5", "t7", "t9"]
    params = SamplingParams(temperature=0.0, max_tokens=4, structured_outputs=StructuredOutputsParams(choice=choices))
    output = star.generate(CONTEXT, QUERY, params)
    assert output.shards is not None
    assert output.text.strip() in choices


def test_streaming_and_abort(star: StarLLM) -> None:
    whole = star.generate(CONTEXT, QUERY, greedy(24)).token_ids
    pieces = list(star.stream(CONTEXT, QUERY, greedy(24)))
    assert [token for piece in pieces for token in piece] == whole
    started = time.monotonic()
    stream = star.stream(CONTEXT, QUERY, greedy(400))
    assert next(stream)
    stream.close()
    assert time.monotonic() - started < PATIENCE_S
    # The hosts are still there and in step.
    assert star.generate(CONTEXT, QUERY, greedy(24)).token_ids == whole
    assert star.restart_s == 0


def test_the_server_streams_over_http(star: StarLLM) -> None:
    """What `farspan star serve` runs, on a port of its own, with the hosts behind it."""
    import uvicorn

    text = MARKER.join(" ".join(f"t{token}" for token in tokens) for tokens in (CONTEXT, QUERY))
    expected = star.generate(text, None, greedy(24)).text
    server = uvicorn.Server(uvicorn.Config(make_app(star, "tiny"), log_level="error"))
    listening = bind_port("127.0.0.1")
    port = listening.getsockname()[1]
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    body = {"model": "tiny", "prompt": text, "max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
    try:
        for stream in (True, False):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps({**body, "stream": stream}), headers)
            response = connection.getresponse()
            answer = response.read().decode()
            connection.close()
            assert response.status == 200, answer
            if stream:
                events = [line.removeprefix("data: ") for line in answer.splitlines() if line]
                assert events.pop() == "[DONE]"
                pieces = [json.loads(event)["choices"][0]["text"] for event in events]
                assert len(pieces) > 2
                assert "".join(pieces) == expected
            else:
                assert json.loads(answer)["choices"][0]["text"] == expected
                assert json.loads(answer)["usage"]["completion_tokens"] == 24
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def test_requests_of_several_threads_wait_for_each_other(star: StarLLM) -> None:
    from concurrent.futures import ThreadPoolExecutor

    contexts = [PROMPT[at : at + 200] for at in range(3)]
    alone = [star.generate(context, QUERY, greedy()).token_ids for context in contexts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda context: star.generate(context, QUERY, greedy()).token_ids, contexts))
    assert together == alone
    stream = star.stream(CONTEXT, QUERY, greedy(100))
    assert next(stream)
    with pytest.raises(StarError, match="another request of this thread is not at its end"):
        star.generate(CONTEXT, QUERY, greedy())
    stream.close()
    assert star.generate(contexts[0], QUERY, greedy()).token_ids == alone[0]


def test_queries_answered_together_have_the_tokens_that_each_has_alone(star: StarLLM) -> None:
    """Contexts of several lengths, one that is on one host alone, and an answer that ends earlier."""
    prompts = [(PROMPT[:200], QUERY), (PROMPT[5 : 5 + CONTEXT_LEN], QUERY[:30]), (PROMPT[:10], QUERY[:5])]
    params = [greedy(12), greedy(5), greedy(7)]
    alone = [star.generate(*prompt, each).token_ids for prompt, each in zip(prompts, params, strict=True)]
    together = star.generate_together(prompts, params)
    assert [output.token_ids for output in together] == alone
    assert [output.shards is None for output in together] == [False, False, True]
    with pytest.raises(ConfigError, match="2 sampling_params for 3 prompts"):
        star.generate_together(prompts, params[:2])
    with pytest.raises(ConfigError, match="requests together need"):
        star.generate_together([(PROMPT * 2, QUERY)] * 9, greedy())
    assert star.restart_s == 0


async def session() -> AsyncIterator[list[int]]:
    yield CONTEXT


def test_bad_requests_are_refused_and_change_nothing(star: StarLLM) -> None:
    from vllm import SamplingParams

    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"context": [*CONTEXT, 512]}, "token 512; allowed: whole numbers from 0 to 511"),
        ({"context": [*CONTEXT, "t1"]}, "token 't1'; allowed: whole numbers"),
        ({"context": [], "query": []}, "an empty context and an empty query"),
        ({"context": "no marker", "query": None}, "a prompt without"),
        ({"context": session()}, "a prompt of type async_generator; allowed: text or token ids, whole"),
        ({"context": CONTEXT * 6}, "host 0 needs"),
        ({"block_len": 40}, "block_len=40; allowed: a multiple of the page size, 16 tokens"),
        ({"sampling_params": greedy(repetition_penalty=1.2)}, "repetition_penalty=1.2; allowed: 1"),
        ({"sampling_params": greedy(prompt_logprobs=1)}, "prompt_logprobs=1; allowed: None"),
        ({"sampling_params": SamplingParams(n=2, temperature=1.0)}, "n=2; allowed: 1"),
        ({"anchor_len": 24}, "anchor_len=24; allowed: a multiple of the page size"),
    ]
    for changes, sentence in mistakes:
        arguments = {"context": CONTEXT, "query": QUERY, "sampling_params": greedy(), **changes}
        with pytest.raises(ConfigError) as caught:
            star.generate(**arguments)
        assert sentence in str(caught.value)
    from vllm.exceptions import VLLMValidationError

    # What only an engine refuses.
    with pytest.raises(VLLMValidationError, match="logprobs"):
        star.generate(CONTEXT, QUERY, greedy(logprobs=500))
    assert len(star.generate(CONTEXT, QUERY, greedy()).token_ids) == MAX_TOKENS
    assert star.restart_s == 0


@pytest.mark.parametrize(
    ("first", "rank", "action", "choice"),
    [
        (29, 0, "stop", {}),
        (41, 0, "kill", {"anchor": "share"}),
        (43, 1, "kill", {"visibility": "all"}),
        (47, 1, "cut", {"visibility": "all"}),
    ],
    ids=["stop", "share", "all", "cut"],
)
def test_a_host_lost_in_phase_1_is_replaced(
    star: FaultyStarLLM, star_model: Path, fault: Callable[..., None], first: int, rank: int, action: str, choice: Any
) -> None:
    """A stopped one after its time, a dead one at once."""
    # Each its own, or the second would find its blocks computed, and phase 1 would be over in one step.
    context = PROMPT[first : first + CONTEXT_LEN]
    fault(rank, "phase 1", action)
    with impatience(star) if action == "stop" else nullcontext():
        output = star.generate(context, QUERY, greedy(), **choice)
    if choice.get("visibility") == "all":
        assert output.token_ids == StarLlama(star_model, 1, CONTEXT_LEN, 0).generate(context + QUERY, MAX_TOKENS)
    else:
        assert output.token_ids == expected_tokens(star_model, output, context, QUERY)
    assert output.times.restart_s > 0


@pytest.mark.parametrize(
    ("rank", "action", "sentence"),
    [
        (1, "kill", "phase 2: host 1 is dead"),
        (0, "sleep", f"phase 2: host 0 made no progress for {TIMEOUT_S:g} s"),
    ],
    ids=["kill", "late"],
)
def test_a_host_lost_in_phase_2_is_named(
    star: FaultyStarLLM, fault: Callable[..., None], rank: int, action: str, sentence: str
) -> None:
    fault(rank, "phase 2", action, seconds=PATIENCE_S)
    started = time.monotonic()
    with impatience(star) if action == "sleep" else nullcontext(), pytest.raises(StarError) as caught:
        star.generate(CONTEXT, QUERY, greedy(32))
    assert time.monotonic() - started < PATIENCE_S
    assert sentence in str(caught.value)
    assert f"host {rank}" in str(caught.value)
    assert len(star.generate(CONTEXT, QUERY, greedy()).token_ids) == MAX_TOKENS
    assert star.restart_s > 0


@pytest.mark.parametrize(
    ("phase", "action", "sentence"),
    [
        ("phase 1", "fill", "RuntimeError: .*allocate"),
        ("phase 2", "memory", "MemoryError: a test's memory is full"),
    ],
    ids=["phase-1", "phase-2"],
)
def test_a_host_whose_memory_is_full_says_so(
    star: FaultyStarLLM, fault: Callable[..., None], phase: str, action: str, sentence: str
) -> None:
    fault(1, phase, action)
    context = PROMPT[37 : 37 + CONTEXT_LEN]
    # In phase 2 the other host waits for it.
    with impatience(star), pytest.raises(StarError, match=f"{phase}: host 1 failed: {sentence}"):
        star.generate(context, QUERY, greedy())
    assert len(star.generate(context, QUERY, greedy()).token_ids) == MAX_TOKENS


def test_a_host_without_network_is_named(star: FaultyStarLLM, fault: Callable[..., None]) -> None:
    """Its connections to the other hosts are cut in phase 2; the coordinator still reaches it."""
    fault(1, "phase 2", "cut")
    context = PROMPT[39 : 39 + CONTEXT_LEN]
    started = time.monotonic()
    with impatience(star), pytest.raises(StarError, match=r"phase 2, step \d+: host") as caught:
        star.generate(context, QUERY, greedy(32))
    assert time.monotonic() - started < PATIENCE_S
    assert "host 1" in str(caught.value)
    assert len(star.generate(context, QUERY, greedy()).token_ids) == MAX_TOKENS
    assert star.restart_s > 0


def test_other_tokens_name_their_host(star: StarLLM, fault: Callable[..., None]) -> None:
    fault(0, "phase 2", "lie")
    with pytest.raises(StarError, match="host 0 and the query's host 1 chose different tokens"):
        star.generate(CONTEXT, QUERY, greedy())


@pytest.mark.skipif("FARSPAN_TEST_HOSTS" not in os.environ, reason="on demand: FARSPAN_TEST_HOSTS=4")
def test_four_hosts(star_model: Path, fault_file: Path) -> None:
    with start_hosts(star_model, 4, fault_file) as llm:
        output = llm.generate(CONTEXT, QUERY, greedy())
        assert output.token_ids == expected_tokens(star_model, output, CONTEXT, QUERY)
        assert output.shards is not None
        assert [shard.num_blocks for shard in output.shards] == [1, 1, 1, 1]


@pytest.mark.skipif("FARSPAN_TEST_NODES" not in os.environ, reason="on demand: FARSPAN_TEST_NODES=2")
def test_two_nodes_of_a_cluster(star_model: Path, fault_file: Path) -> None:
    """Each host on a Ray node of its own, met by address."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        with start_hosts(star_model, 2, fault_file, address=cluster.address, strategy="STRICT_SPREAD") as llm:
            output = llm.generate(CONTEXT, QUERY, greedy())
            assert output.token_ids == expected_tokens(star_model, output, CONTEXT, QUERY)
            assert len({node["NodeID"] for node in ray.nodes() if node["Alive"]}) == 2
            assert not ray.available_resources().get("CPU")
            llm.hosts.stop()
            # Its places are free again, and the cluster is not ours to stop.
            deadline = time.monotonic() + 20
            while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
                time.sleep(0.2)
            assert ray.available_resources().get("CPU") == 2
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"hosts": 0}, "hosts=0; allowed: a whole number from 1"),
        ({"options": {"string": {}}}, "without string: both move positions"),
        ({"enable_prefix_caching": False}, "whose second phase reads the pages of the first"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size=0; allowed: a whole number from 1"),
        ({"tensor_parallel_size": 2, "async_scheduling": True}, "async_scheduling=True with tensor_parallel_size"),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2; allowed: 1. Use more hosts"),
        ({"data_parallel_size": 2}, "data_parallel_size=2; allowed: 1. Use more hosts"),
        ({"enable_lora": True}, "enable_lora=True; allowed: not with StarLLM"),
        ({"enable_sleep_mode": True}, "enable_sleep_mode=True; allowed: not with StarLLM"),
        ({"additional_config": {}}, "give farspan's options as options="),
    ],
    ids=["hosts", "string", "caching", "tp", "async", "pp", "dp", "lora", "sleep", "config"],
)
def test_what_cannot_work_is_refused_before_anything_starts(arguments: dict[str, Any], sentence: str) -> None:
    import ray

    with pytest.raises(ConfigError) as caught:
        StarLLM("nowhere", **arguments)
    assert sentence in str(caught.value)
    assert not ray.is_initialized() or arguments
