"""What the hosts are asked in both phases, without any host, and what one makes of several requests, without vLLM."""

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from farspan.engine_ext.errors import ConfigError, StarError
from farspan.engine_ext.star.team import HostMissing
from farspan.star.blocks import BlockSizes
from farspan.star.coordinator import HostLost
from farspan.star.host import StarHost
from farspan.star.llm import StarLLM
from farspan.star.protocol import Answer, Ask, HostFacts, HostRates, HostSetup
from farspan.star.work import Work
from vllm import SamplingParams

from tests.engine_ext.star.hosts import Layout

PAGE = 16


def answer_of(tokens: list[int], others: tuple[Answer, ...] = ()) -> Answer:
    completion = SimpleNamespace(token_ids=tokens, text="", finish_reason="length")
    return Answer(SimpleNamespace(outputs=[completion]), 0.0, [0.1] * len(tokens), 0, 0, 0.0, others)


class Asking(StarLLM):
    """A StarLLM that keeps what it asks; the tokens of an answer are the last of its prompt."""

    def __init__(self) -> None:
        self.asked: list[Ask] = []
        facts = [HostFacts(PAGE, 1024, 2048, 512, 1000.0, 128, 0.0)] * 2
        setup = SimpleNamespace(graphs=False, gathers_keys=True)
        self.hosts: Any = SimpleNamespace(setup=setup, actors=[1, 2], facts=facts)
        self.num_hosts, self.page_size, self.linear_pairs, self.sizes = 2, PAGE, 1000.0, BlockSizes()
        self.tokenizer = self.working_thread = None
        self.sharing_pays, self.has_offload = False, False
        self.lock = threading.Lock()

    def guarded(self, asks: dict[int, Ask], answers: dict[int, Answer], may_replace: bool = False) -> Iterator[Any]:
        """Answer at once."""
        assert asks
        self.asked += asks.values()
        for rank, ask in asks.items():
            answers[rank] = answer_of(ask.prompt[-2:], tuple(answer_of(each.prompt[-2:]) for each in ask.others))
        yield {}


def test_the_first_request_is_given_the_time_of_the_start() -> None:
    llm = Asking()
    llm.hosts.start, llm.hosts.all_or_none = lambda: None, nullcontext
    llm.hosts.setup.timeout_s, llm.hosts.setup.start_timeout_s = 6.0, 180.0
    given: list[float] = []
    answer = llm.guarded

    def guarded(*arguments: Any) -> Iterator[Any]:
        given.append(llm.hosts.patience_s)
        yield from answer(*arguments)

    llm.guarded = guarded  # type: ignore[method-assign]
    llm.start()
    assert given == [180.0, 180.0]
    assert llm.hosts.patience_s == 6.0


def test_phase_1_prefills_as_the_request_says() -> None:
    """The options name the pages that phase 2 looks for."""
    llm = Asking()
    params = SamplingParams(max_tokens=4, extra_args={"farspan.method": "dense"})
    work = Work("r", list(range(64)), [1, 2], params, Layout(2, 64, 32, 32, (1, 1)).shards(), shares_anchor=True)
    list(llm.read_context(work))
    list(llm.answer_together([work]))
    assert [ask.phase for ask in llm.asked] == ["phase 1", "phase 1", "phase 2", "phase 2"]
    assert [ask.sampling.extra_args for ask in llm.asked] == [{"farspan.method": "dense"}] * 4
    assert [ask.sampling.max_tokens for ask in llm.asked] == [1, 1, 4, 4]
    assert [ask.shares_anchor for ask in llm.asked] == [True, True, False, False]
    # Who asks again computes its own.
    assert work.shards is not None
    assert not work.first_ask(work.shards[1], 1).shares_anchor


def test_an_anchor_is_sent_where_that_is_measured_to_be_faster() -> None:
    """Once; where a host is lost meanwhile, again with the next request."""
    llm, params = Asking(), SamplingParams(max_tokens=2, temperature=0.0)
    llm.sharing_pays = None

    def lost() -> list[HostRates]:
        raise HostLost(1, "start: host 1 is dead")

    llm.hosts.measure = lost
    # Nothing to choose: no block sees an anchor that it does not begin with, or one host has no block.
    assert llm.generate(list(range(30)), [1, 2], params, block_len=64).shards is None
    llm.generate(list(range(200)), [1, 2], params, anchor_len=0)
    assert llm.sharing_pays is None
    with pytest.raises(StarError, match="host 1 is dead"):
        llm.generate(list(range(200)), [1, 2], params)
    assert llm.sharing_pays is None
    measured = iter([[HostRates(1e-7, 1e-6), HostRates(2e-7, 1e-6)]])
    llm.hosts.measure = lambda: next(measured)
    for _ in range(2):
        llm.asked.clear()
        llm.generate(list(range(200)), [1, 2], params)
        assert [ask.shares_anchor for ask in llm.asked] == [True, True, False, False]
    llm.generate(list(range(200)), [1, 2], params, anchor="recompute")
    assert not llm.asked[-4].shares_anchor


@pytest.mark.faults
@pytest.mark.parametrize("is_placed", [False, True], ids=["no-room", "second"])
def test_phase_1_is_tried_again_once(is_placed: bool) -> None:
    """The error names the host that was lost, and the phase. A replacement that fails stops all hosts itself."""
    llm, runs, stopped = Asking(), [], []

    def lose(asks: dict[int, Ask], answers: dict[int, Answer]) -> Iterator[Any]:
        runs.append(sorted(asks))
        raise HostLost(1, f"phase 1: host 1 is dead (loss {len(runs)}).")
        yield {}

    def replace_host(rank: int) -> None:
        if not is_placed:
            raise HostLost(rank, f"restart: host {rank} did not finish within 9 s; see its log.")

    llm.hosts.run, llm.hosts.replace, llm.hosts.stop = lose, replace_host, lambda: stopped.append(True)
    llm.guarded = lambda *arguments: StarLLM.guarded(llm, *arguments)  # type: ignore[method-assign]
    sentence = r"^phase 1: host 1 is dead \(loss 1\)\. A replacement did not start either: restart: host 1 did not"
    if is_placed:
        sentence = r"^phase 1: host 1 is dead \(loss 2\)\.$"
    with pytest.raises(StarError, match=sentence):
        llm.generate(list(range(200)), [1, 2], SamplingParams(max_tokens=2))
    assert runs == [[0, 1]] * (2 if is_placed else 1)
    assert stopped == [True] * is_placed
    assert not llm.lock.locked()


@pytest.mark.faults
def test_hosts_that_lost_each_other_in_phase_1_meet_again() -> None:
    """None of them is dead, and none has to be replaced; what any of them had read is asked again."""
    llm, runs, replaced = Asking(), [], []
    answer = llm.guarded

    def lose(asks: dict[int, Ask], answers: dict[int, Answer]) -> Iterator[Any]:
        runs.append(next(iter(asks.values())).phase)
        if len(runs) > 1:
            yield from answer(asks, answers)
            return
        answers[0] = answer_of([0, 0])
        raise HostMissing("phase 1, step 3: host 0 lost the connection to host 1; see its log.")

    llm.hosts.run, llm.hosts.replace = lose, replaced.append
    llm.guarded = lambda *arguments: StarLLM.guarded(llm, *arguments)  # type: ignore[method-assign]
    output = llm.generate(list(range(200)), [1, 2], SamplingParams(max_tokens=2))
    assert runs == ["phase 1", "phase 1", "phase 2"]
    assert sorted(ask.shard.rank for ask in llm.asked if ask.phase == "phase 1" and ask.shard) == [0, 1]
    assert replaced == [None]
    assert output.times.restart_s > 0


def test_queries_together_are_one_request_to_each_host() -> None:
    llm = Asking()
    params = SamplingParams(max_tokens=2, temperature=0.0)
    prompts: list[Any] = [(list(range(at, at + 200)), [at, at + 1]) for at in (1, 50)]
    outputs = llm.generate_together([*prompts, ([7], [8, 9])], params)
    assert [output.token_ids for output in outputs] == [[1, 2], [50, 51], [8, 9]]
    assert [output.num_prompt_tokens for output in outputs] == [202, 202, 3]
    assert [ask.phase for ask in llm.asked] == ["phase 1"] * 4 + ["exact attention"] + ["phase 2"] * 2
    for ask in llm.asked[-2:]:
        assert [each.prompt[-2:] for each in (ask, *ask.others)] == [[1, 2], [50, 51]]
        assert ask.is_lockstep
    assert llm.generate(*prompts[1], params).token_ids == [50, 51]
    with pytest.raises(ConfigError, match="2 sampling_params for 3 prompts"):
        llm.generate_together([*prompts, prompts[0]], [params] * 2)
    with pytest.raises(ConfigError, match="20 requests together need"):
        llm.generate_together(prompts * 10, params)


def test_a_query_without_context_is_one_of_all_hosts_that_decode_in_graphs() -> None:
    llm = Asking()
    llm.hosts.setup.graphs = True
    assert llm.generate([], [8, 9], SamplingParams(max_tokens=2)).token_ids == [8, 9]
    assert [ask.phase for ask in llm.asked] == ["phase 2"] * 2
    assert llm.generate([7], [8, 9], SamplingParams(max_tokens=2)).token_ids == [8, 9]


def test_all_hosts_read_windows_where_every_token_sees_all_before_it() -> None:
    llm = Asking()
    params = SamplingParams(max_tokens=2, temperature=0.0)
    output = llm.generate(list(range(300)), [1, 2], params, visibility="all")
    first = [ask for ask in llm.asked if ask.phase == "phase 1"]
    assert sorted(token for ask in first for token in ask.prompt) == list(range(256))
    assert all(ask.is_lockstep and not ask.shares_anchor for ask in first)
    # What fills no window evenly comes with the query.
    assert llm.asked[-1].prompt[-46:] == [*range(256, 300), 1, 2]
    assert output.token_ids == [1, 2]
    llm.hosts.setup.gathers_keys = False
    with pytest.raises(ConfigError, match="visibility='all' for one request; allowed: where StarLLM has it too"):
        llm.generate(list(range(300)), [1, 2], params, visibility="all")


def test_a_second_request_of_a_thread_with_an_open_stream_is_refused() -> None:
    llm = Asking()
    stream = llm.work(list(range(200)), [1, 2], SamplingParams(max_tokens=2), llm.sizes, [])
    next(stream)
    with pytest.raises(StarError, match="another request of this thread is not at its end"):
        llm.generate(list(range(200)), [1, 2])
    stream.close()  # type: ignore[attr-defined]
    assert llm.generate(list(range(200)), [1, 2]).token_ids == [1, 2]


class Engine:
    """Gives request i one token a step, i + 1 tokens in all."""

    def __init__(self) -> None:
        self.left: dict[str, int] = {}
        self.made: dict[str, list[int]] = {}

    def add_request(self, name: str, prompt: Any, sampling: Any) -> str:
        self.left[name] = len(self.made) + 1
        self.made[name] = []
        return name

    def has_unfinished_requests(self) -> bool:
        return any(self.left.values())

    def step(self) -> list[Any]:
        outputs = []
        for name in [name for name, left in self.left.items() if left]:
            self.left[name] -= 1
            self.made[name].append(len(self.made[name]))
            completion = SimpleNamespace(token_ids=list(self.made[name]))
            outputs.append(SimpleNamespace(request_id=name, outputs=[completion], num_cached_tokens=3))
        return outputs


def test_a_host_answers_requests_together() -> None:
    host = StarHost(HostSetup(0, 1, "m", "cpu", 1.0, 1.0, False, False, {}))
    host.llm = SimpleNamespace(llm_engine=Engine())
    params = SamplingParams(max_tokens=4)
    ask = Ask("a", "phase 2", [1], params, None, others=(Ask("b", "phase 2", [2], params, None),))
    answer = host.run(ask)
    assert answer.output.outputs[0].token_ids == [0]
    assert [other.output.outputs[0].token_ids for other in answer.others] == [[0, 1]]
    assert [len(each.token_s) for each in (answer, *answer.others)] == [1, 2]
    assert answer.num_cached_tokens == 3
    assert host.phase is None
