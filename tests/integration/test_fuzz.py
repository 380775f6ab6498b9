"""Random requests through every method, in random company: their tokens are those of vLLM's own backend.

A case is one request: prompts that share prefixes, budgets, times at which it comes and is aborted, options of its own.
FARSPAN_FUZZ_CASES is how many (1,000 unless it says otherwise), FARSPAN_FUZZ_SEED where they begin: `make fuzz`. Six
engines start, however many there are.
"""

import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.integration.test_engine_offload import offloading

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

NUM_CASES = int(os.environ.get("FARSPAN_FUZZ_CASES", "1000"))
SEED = int(os.environ.get("FARSPAN_FUZZ_SEED", "0"))
WAVE = 20
"""Requests that an engine has at once, at most."""
ALONE_EVERY = 4
"""Of so many waves, the requests of one are also asked one by one, which takes ten times as long."""
MAX_LEN, PAGE, BLOCKS = 512, 16, 100
EXACT: dict[str, dict[str, Any]] = {
    "dense": {},
    "flex": {"prefill": {"method": "flex", "gamma": 1.0, "min_seq_len": 0, "min_chunk_len": 0}},
    "block_sparse": {"prefill": {"method": "block_sparse", "local_blocks": 100, "block_size": 64}},
    "offload": {"offload": {}},
}
"""Methods that read every key."""
SPARSE = {"prefill": {"method": "block_sparse", "local_blocks": 2, "block_size": 64}}
"""Its lists depend on positions alone: a prompt gives the same tokens in every company, and others than exact ones.
Unless a chunk of it is one token, which is computed as a decode is: exactly.
"""


@dataclass(frozen=True)
class Case:
    """One request."""

    prompt: tuple[int, ...]
    max_tokens: int
    arrives: int
    """Engine step before which it comes."""
    aborted_after: int | None
    """Steps from then on after which its client leaves; None where it stays."""
    is_dense: bool
    """Whether it asks for `farspan.method: dense`."""


def make_cases() -> list[Case]:
    generator = random.Random(SEED)
    prefixes = [[generator.randrange(3, 512) for _ in range(400)] for _ in range(4)]
    cases = []
    for _ in range(NUM_CASES):
        shared = generator.choice(prefixes)[: generator.choice((0, 15, 16, 17, 64, 130, generator.randrange(400)))]
        tail = [generator.randrange(3, 512) for _ in range(generator.choice((1, 2, 16, generator.randrange(1, 90))))]
        cases.append(
            Case(
                tuple(shared + tail),
                generator.randrange(1, 12),
                generator.randrange(12),
                generator.randrange(15) if generator.random() < 0.15 else None,
                generator.random() < 0.2,
            )
        )
    return cases


CASES = make_cases()


def waves() -> Iterator[dict[str, Case]]:
    names = {f"case-{number}": case for number, case in enumerate(CASES)}
    for first in range(0, len(names), WAVE):
        yield dict(list(names.items())[first : first + WAVE])


def serve(llm: Any, cases: dict[str, Case], *, alone: bool = False) -> dict[str, list[int]]:
    """Greedy tokens by name; of an aborted request those that it had. alone: one after another, sharing nothing."""
    from vllm import SamplingParams

    engine, tokens, step = llm.llm_engine, {}, 0
    waiting = dict(sorted(cases.items(), key=lambda item: item[1].arrives))
    started: dict[str, int] = {}
    while waiting or engine.has_unfinished_requests():
        for name, case in list(waiting.items()):
            if (alone and engine.has_unfinished_requests()) or (not alone and case.arrives > step):
                break
            params = SamplingParams(temperature=0, max_tokens=case.max_tokens, ignore_eos=True, detokenize=False)
            if case.is_dense:
                params.extra_args = {"farspan.method": "dense"}
            prompt: dict[str, Any] = {"prompt_token_ids": list(case.prompt)}
            if alone:
                prompt["cache_salt"] = name
            engine.add_request(name, prompt, params)
            tokens[name], started[name] = [], step
            del waiting[name]
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        step += 1
        if not alone:
            engine.abort_request([name for name, first in started.items() if has_left(cases[name], step - first)])
    return tokens


def note_single_tokens(llm: Any) -> set[str]:
    """Names of requests, filled as the engine runs, of whose prompts a step computes one token alone."""
    from farspan.scheduler.scheduler import scheduled_of

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    stock, names = scheduler.schedule, set[str]()

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        for each in scheduled_of(output):
            if each.count == 1 and each.start < scheduler.requests[each.req_id].num_prompt_tokens:
                names.add(each.req_id.rpartition("-")[0])
        return output

    scheduler.schedule = schedule
    return names


def has_left(case: Case, num_steps: int) -> bool:
    return case.aborted_after is not None and num_steps > case.aborted_after


def check(found: dict[str, list[int]], expected: dict[str, list[int]]) -> None:
    for name, tokens in found.items():
        number = int(name.partition("-")[2])
        case = CASES[number]
        wanted = expected[name] if case.aborted_after is None else expected[name][: len(tokens)]
        assert tokens == wanted, f"FARSPAN_FUZZ_SEED={SEED}, case {number} of {NUM_CASES}: {case}"


@pytest.fixture(scope="module")
def start(make_module_llm: Callable[..., Any]) -> Callable[..., Any]:
    def start_engine(method: str | None, options: dict[str, Any], tokens: int) -> Any:
        arguments: dict[str, Any] = {"block_size": PAGE, "num_gpu_blocks_override": BLOCKS}
        if method is None:  # vLLM's pages on a CPU are multiples of 32
            arguments = {"num_gpu_blocks_override": BLOCKS}
        elif options == EXACT["offload"]:
            # Few slots: pages come and go.
            arguments = offloading(max(20, tokens // PAGE + 3), blocks=BLOCKS, tokens=tokens)
        else:
            arguments["additional_config"] = {"farspan": options}
        arguments |= {"max_num_batched_tokens": tokens, "max_model_len": MAX_LEN, "max_num_seqs": 16}
        arguments["enable_prefix_caching"] = True
        return make_module_llm("llama", None if method is None else "CUSTOM", **arguments)

    return start_engine


@pytest.fixture(scope="module")
def stock(start: Callable[..., Any]) -> dict[str, list[int]]:
    """Tokens of vLLM's own backend; of aborted requests too, all that they would have got."""
    llm = start(None, {}, 256)
    found: dict[str, list[int]] = {}
    for wave in waves():
        whole = {name: Case(case.prompt, case.max_tokens, 0, None, False) for name, case in wave.items()}
        found |= serve(llm, whole)
    llm.llm_engine.engine_core.shutdown()
    return found


@pytest.mark.parametrize("method", EXACT)
def test_exact_methods(start: Callable[..., Any], stock: dict[str, list[int]], method: str) -> None:
    tokens = random.Random(f"{SEED}-{method}").choice((33, 64, 100, 250))
    llm = start(method, EXACT[method], tokens)
    found: dict[str, list[int]] = {}
    for wave in waves():
        found |= serve(llm, wave)
        if method == "offload":
            llm.collective_rpc("offload_state")
    llm.llm_engine.engine_core.shutdown()
    assert found.keys() == stock.keys()
    check(found, stock)


def test_sparse_requests_give_what_they_give_alone(start: Callable[..., Any], stock: dict[str, list[int]]) -> None:
    llm = start("sparse", SPARSE, 100)
    exempt = note_single_tokens(llm)
    together: dict[str, list[int]] = {}
    alone: dict[str, list[int]] = {}
    for number, wave in enumerate(waves()):
        together |= serve(llm, wave)
        if number % ALONE_EVERY == 0:
            alone |= serve(llm, wave, alone=True)
    llm.llm_engine.engine_core.shutdown()
    assert together.keys() == stock.keys()
    compared = alone.keys() - exempt
    assert len(compared) > 0.8 * len(alone)
    check({name: together[name] for name in compared}, alone)

    dense = {name for name in together if CASES[int(name.partition("-")[2])].is_dense}
    check({name: together[name] for name in dense}, stock)
    assert any(tokens != stock[name] for name, tokens in alone.items())
