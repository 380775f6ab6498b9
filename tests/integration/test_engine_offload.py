"""Cold KV heads through vLLM: greedy tokens equal those of vLLM's own CPU backend, wherever the pages lie."""

import random
from collections.abc import Callable
from typing import Any

import pytest
from farspan.engine_ext.errors import UnsupportedEngineError
from farspan.engine_ext.plan import OffloadSizes
from farspan.scheduler.capacity import min_slots
from farspan.scheduler.residency import Residency

from tests.integration.test_engine_tokens import generate, make_prompts, run, stock_tokens

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

__all__ = ["stock_tokens"]


PAGE, LAYERS, HEAD_DIM, MAX_LEN = 16, 2, 64, 768
STUB = {"float32": PAGE * 4, "bfloat16": PAGE * 2, "fp8": PAGE}
"""Bytes per block of a layer without hot heads: one number per token."""
HEAD_PAGE = {dtype: 2 * HEAD_DIM * stub for dtype, stub in STUB.items()}
BLOCKS = 160
GIB = 1 << 30


def offloading(
    num_slots: int,
    *,
    heads: int = 2,
    hot: int | list[int] = 0,
    tokens: int = 64,
    blocks: int = BLOCKS,
    group_size: int = 1,
    farspan: dict[str, Any] | None = None,
    dtype: str = "float32",
    kv_cache_dtype: str = "auto",
    span: int | None = None,
    **arguments: Any,
) -> dict[str, Any]:
    """Arguments of an engine with so many slots and blocks of `PAGE` tokens, and so many hot heads.

    span: pages of a buffer for prefill, instead of those of `MAX_LEN`; as much memory goes to further slots.
    """
    stored = dtype if kv_cache_dtype == "auto" else kv_cache_dtype
    head_page = HEAD_PAGE[stored]
    counts = hot if isinstance(hot, list) else [hot] * LAYERS
    cold_page = sum(heads - count for count in counts) * head_page
    block = sum(count * head_page or STUB[stored] for count in counts)
    staging = 2 * group_size * -(-MAX_LEN // PAGE) * head_page if num_slots < blocks else 0
    if span is not None:
        staging = 2 * 2 * group_size * span * head_page
    # A little more than the blocks take, as a fraction of a GiB is rounded.
    offload = {"host_memory": (blocks + 0.5) * max(cold_page, 1) / GIB, "hot_heads": hot, "group_size": group_size}
    return {
        "dtype": dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "block_size": PAGE,
        "max_model_len": MAX_LEN,
        "max_num_batched_tokens": tokens,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": blocks,
        "kv_cache_memory_bytes": num_slots * cold_page + blocks * block + staging,
        "enable_prefix_caching": False,
        "additional_config": {"farspan": {**(farspan or {}), "offload": offload}},
        **arguments,
    }


def offload_state(llm: Any) -> dict[str, Any]:
    """What the workers tell, all the same, after they and the scheduler checked their tables."""
    state, *others = llm.collective_rpc("offload_state")
    assert others == [state] * len(others)
    llm.llm_engine.engine_core.engine_core.scheduler._residency.check_integrity()
    return state


def run_checked(llm: Any, prompts: list[list[int]], max_tokens: int | list[int] = 12) -> list[list[int]]:
    """Greedy tokens, with the integrity of pools and tables checked after every step."""
    from vllm import SamplingParams

    engine = llm.llm_engine
    budgets = max_tokens if isinstance(max_tokens, list) else [max_tokens] * len(prompts)
    for place, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
        params = SamplingParams(temperature=0, max_tokens=budget, ignore_eos=True, detokenize=False)
        engine.add_request(f"checked-{place}", {"prompt_token_ids": prompt}, params)
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                tokens[output.request_id] = list(output.outputs[0].token_ids)
        offload_state(llm)
    return [tokens[f"checked-{place}"] for place in range(len(prompts))]


PROMPTS = make_prompts((1, 15, 16, 17, 130, 300, 700))


@pytest.mark.parametrize("num_slots", [9, 40, BLOCKS], ids=["least", "some", "all"])
def test_slots(
    make_llm: Callable[..., Any], stock_tokens: Any, num_slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr("farspan.vllm_compat.offload.warn_of_ordinary_memory", told.append)
    llm = make_llm(**offloading(num_slots))
    assert told == ["cpu"]
    assert run_checked(llm, PROMPTS) == stock_tokens("llama", PROMPTS)
    state = offload_state(llm)
    assert state["num_slots"] == num_slots
    assert state["num_blocks"] == BLOCKS
    assert (state["spilled"] > 0) == (num_slots < BLOCKS)
    assert (state["staged"] > 0) == (num_slots < BLOCKS)
    (decisions,) = llm.collective_rpc("decisions")
    page_bytes = LAYERS * 2 * HEAD_PAGE["float32"]
    assert decisions["offload"] == {
        "blocks": BLOCKS,
        "slots": num_slots,
        "group_size": 1,
        "staging_pages": -(-MAX_LEN // PAGE) if num_slots < BLOCKS else 0,
        "host_bytes": BLOCKS * page_bytes,
        "slot_bytes": num_slots * page_bytes,
        "hot_heads": [0, 0],
    }


def test_vllms_own_offloading_holds_a_request_in_gpu_memory(make_llm: Callable[..., Any]) -> None:
    """With as much memory as the fewest slots above it refuses the engine, however much the host has."""
    arguments = offloading(9, num_gpu_blocks_override=None, additional_config={}, kv_offloading_size=1.0)
    with pytest.raises(ValueError, match="To serve at least one request with the model's max seq len"):
        make_llm(backend=None, **arguments)


@pytest.mark.parametrize(
    ("architecture", "heads", "hot", "group_size"),
    [
        ("llama", 2, 1, 1), ("llama", 2, 0, 2), ("qwen3", 4, 2, 2), ("qwen3", 4, 1, 2), ("qwen3", 4, 3, 1),
        ("qwen3", 4, [4, 1], 1), ("qwen2", 1, 0, 1),
    ],
    ids=["half", "together", "half-of-four", "one-of-four", "all-but-one", "by-layer", "only-head"],
)  # fmt: skip
def test_hot_heads(
    make_llm: Callable[..., Any], stock_tokens: Any, architecture: str, heads: int, hot: Any, group_size: int
) -> None:
    llm = make_llm(architecture, **offloading(12, heads=heads, hot=hot, group_size=group_size))
    assert run_checked(llm, PROMPTS) == stock_tokens(architecture, PROMPTS)
    state = offload_state(llm)
    assert min(state["spilled"], state["staged"]) > 0


def test_no_cold_head_is_no_offload(make_llm: Callable[..., Any], stock_tokens: Any) -> None:
    llm = make_llm(additional_config={"farspan": {"offload": {"hot_heads": 2}}}, enable_prefix_caching=False)
    assert generate(llm, PROMPTS) == stock_tokens("llama", PROMPTS)
    assert llm.llm_engine.vllm_config.scheduler_config.scheduler_cls is None


@pytest.mark.parametrize("chunk", [16, 33, 200, 2048])
def test_chunked_prefill(
    make_llm: Callable[..., Any], stock_tokens: Any, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Staged one head at a time, or both heads of requests that are short enough."""
    groups: set[int] = set()
    group_for = OffloadSizes.group_for

    def noted(self: OffloadSizes, num_pages: int) -> int:
        groups.add(group_for(self, num_pages))
        return group_for(self, num_pages)

    monkeypatch.setattr(OffloadSizes, "group_for", noted)
    blocks = 200 if chunk == 2048 else BLOCKS
    num_slots = max(3 + chunk // PAGE, 20)
    arguments = offloading(num_slots, tokens=chunk, blocks=blocks)
    del arguments["additional_config"]["farspan"]["offload"]["group_size"]
    llm = make_llm(**arguments)
    assert run_checked(llm, PROMPTS) == stock_tokens("llama", PROMPTS)
    assert (offload_state(llm)["spilled"] > 0 and groups == {1, 2}) or chunk == 2048


def test_the_short_chunk_of_a_prompt_alone_comes_second(
    make_llm: Callable[..., Any], stock_tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it has least to fetch; not of prompts that have slots, nor where another prompt fills up its step."""
    chunks: list[tuple[int, ...]] = []
    plan = Residency.plan

    def noted(self: Residency, scheduled: Any, *rest: Any) -> Any:
        chunks.append(tuple(each.count for each in scheduled))
        return plan(self, scheduled, *rest)

    monkeypatch.setattr(Residency, "plan", noted)
    llm = make_llm(**offloading(12))
    long, short, other = make_prompts((300, 150, 200), seed=11)
    for prompts, expected in (
        ([long], [(64,), (44,), (64,), (64,), (64,)]),
        ([short], [(64,), (64,), (22,)]),
        ([other, long], [(64,), (64,), (64,), (56, 8), (1, 55), (1, 63), (1, 63), (1, 63)]),
    ):
        chunks.clear()
        assert run_checked(llm, prompts) == stock_tokens("llama", prompts)
        assert [each for each in chunks if max(each, default=0) > 1] == expected


def test_prefix_hits(make_llm: Callable[..., Any], stock_tokens: Any) -> None:
    """Prefixes that lie in slots, on the host, and half each; of requests that ended and of one that runs."""
    (long, other) = make_prompts((500, 600), seed=5)
    prompts = [long, other, long, [*long[:160], *other[:50]], other[:320], [*other[:100], 7, 8, 9], long]
    expected = stock_tokens("llama", prompts)
    llm = make_llm(**offloading(30, enable_prefix_caching=True))
    found = []
    for prompt in prompts:
        (output,) = run(llm, [prompt])
        found.append(list(output.outputs[0].token_ids))
        offload_state(llm)
    assert found == expected
    assert output.num_cached_tokens == 496
    assert run_checked(llm, prompts) == expected
    state = offload_state(llm)
    assert min(state["spilled"], state["loaded"], state["staged"]) > 0


@pytest.mark.faults
def test_preemption(make_llm: Callable[..., Any], stock_tokens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks run out while requests decode; those that are preempted lose nothing."""
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted = []
    preempt = Scheduler._preempt_request

    def counting(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", counting)
    prompts = make_prompts((200, 210, 220, 190, 90), seed=9)
    budgets = [60, 50, 55, 60, 80]
    expected = stock_tokens("llama", prompts, budgets)
    preempted.clear()
    llm = make_llm(**offloading(14, blocks=50))
    assert run_checked(llm, prompts, budgets) == expected
    assert preempted
    assert offload_state(llm)["spilled"] > 0


def test_batches(make_llm: Callable[..., Any], stock_tokens: Any) -> None:
    llm = make_llm(**offloading(45))
    generator = random.Random(1)
    for size in (1, 3, 16):
        prompts = make_prompts(tuple(generator.randrange(1, 140) for _ in range(size)), seed=size)
        budgets = [generator.randrange(1, 20) for _ in range(size)]
        assert run_checked(llm, prompts, budgets) == stock_tokens("llama", prompts, budgets)
    assert offload_state(llm)["spilled"] > 0


@pytest.mark.faults
def test_few_slots_make_requests_wait(make_llm: Callable[..., Any], stock_tokens: Any) -> None:
    """Room for what three requests write: sixteen take turns and all end."""
    llm = make_llm(**offloading(1 + 4 + 6))
    prompts = make_prompts(tuple(range(10, 26)), seed=4)
    assert run_checked(llm, prompts, 5) == stock_tokens("llama", prompts, 5)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert scheduler.max_num_running_reqs == 3


@pytest.mark.faults
def test_aborts_and_resets(make_llm: Callable[..., Any], stock_tokens: Any) -> None:
    """Requests that are aborted while they prefill or decode leave no trace in the others; nor does the prefix cache
    when it is emptied under them, which preempts all and starts them again in the same step.
    """
    from vllm import SamplingParams

    prompts = make_prompts((300, 310, 250, 330), seed=6)
    expected = stock_tokens("llama", prompts, 20)
    llm = make_llm(**offloading(16, enable_prefix_caching=True))
    engine = llm.llm_engine
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
    for repeat in range(3):
        for place, prompt in enumerate(prompts):
            engine.add_request(f"{repeat}-{place}", {"prompt_token_ids": prompt}, params)
        finished, steps = {}, 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    finished[output.request_id] = list(output.outputs[0].token_ids)
            steps += 1
            # In its prefill, and while others decode.
            if steps == 3 + repeat:
                engine.abort_request([f"{repeat}-1"])
            if steps == 22:
                engine.abort_request([f"{repeat}-2"])
            if steps == 12 + 9 * repeat:
                engine.engine_core.engine_core.scheduler.reset_prefix_cache(reset_running_requests=True)
            offload_state(llm)
        for place in (0, 3):
            assert finished[f"{repeat}-{place}"] == expected[place]
    assert generate(llm, prompts, 20) == expected


@pytest.mark.faults
def test_first_decode_after_a_spill(make_llm: Callable[..., Any], stock_tokens: Any) -> None:
    """A request decodes in slots alone; another one's prefill takes them away; it goes on, and gets them back."""
    from vllm import SamplingParams

    prompts = make_prompts((300, 290), seed=8)
    expected = stock_tokens("llama", prompts, [40, 4])
    llm = make_llm(**offloading(25))
    engine = llm.llm_engine

    def add(name: str, prompt: list[int], max_tokens: int) -> None:
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        engine.add_request(name, {"prompt_token_ids": prompt}, params)

    def step() -> dict[str, list[int]]:
        ended = {each.request_id: list(each.outputs[0].token_ids) for each in engine.step() if each.finished}
        offload_state(llm)
        return ended

    add("first", prompts[0], 40)
    for _ in range(10):
        step()
    assert offload_state(llm)["spilled"] == 0
    add("second", prompts[1], 4)
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        tokens |= step()
    assert tokens == {"first": expected[0], "second": expected[1]}
    state = offload_state(llm)
    assert min(state["spilled"], state["loaded"]) > 0


def test_metrics(make_llm: Callable[..., Any]) -> None:
    llm = make_llm(**offloading(20, disable_log_stats=False))
    generate(llm, PROMPTS)
    found = {each.name: each.value for each in llm.get_metrics() if each.name.startswith("vllm:farspan_offload_")}
    told = {name.removeprefix("vllm:farspan_offload_"): value for name, value in found.items()}
    page_bytes = LAYERS * 2 * HEAD_PAGE["float32"]
    assert told["slots"] == 20
    assert told["host_pages"] == BLOCKS
    assert told["bytes_to_host"] == offload_state(llm)["spilled"] * page_bytes > 0
    assert told["bytes_from_host"] > 0
    assert told["steps"] > told["steps_that_read"] > 0


def test_two_ranks(make_llm: Callable[..., Any], stock_tokens: Any) -> None:
    """Each has one of the two heads, and both follow the same plan, here of spans."""
    arguments = spanning(64, 9, heads=1)
    arguments["additional_config"]["farspan"]["offload"]["host_memory"] *= 2
    llm = make_llm(**arguments, tensor_parallel_size=2)
    assert run_checked(llm, PROMPTS) == stock_tokens("llama", PROMPTS)
    assert [each["offload"]["staging_pages"] for each in llm.collective_rpc("decisions")] == [9, 9]
    one, other = llm.collective_rpc("offload_state")
    assert one == other
    assert min(one["spilled"], one["staged"]) > 0


def test_a_streaming_session(make_llm: Callable[..., Any], stock_tokens: Any) -> None:
    """Each chunk is answered as one prompt of all that was before it; what lay on the host is read by later ones."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    llm = make_llm(**offloading(20, enable_prefix_caching=True))
    core = llm.llm_engine.engine_core

    def send(chunk: list[int], *, resumable: bool = True) -> None:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        # The session appends to its own list.
        core.add_request(
            EngineCoreRequest("session", [*chunk], None, params, None, 0.0, None, None, None, resumable=resumable)
        )

    def answer() -> list[int]:
        tokens: list[int] = []
        while len(tokens) < 12:
            tokens += [token for each in core.get_output().outputs for token in each.new_token_ids]
            offload_state(llm)
        return tokens

    first, *chunks = make_prompts((300, 150, 40), seed=8)
    (other,) = make_prompts((200,), seed=9)
    send(first)
    text, answers, expected, states = first, [answer()], [], [offload_state(llm)]
    for chunk in chunks:
        # What was sampled last is in no cache, and vLLM drops it.
        text = text + answers[-1][:-1] + chunk
        # Between two chunks others use the slots.
        assert run_checked(llm, [other]) == stock_tokens("llama", [other])
        send(chunk)
        answers.append(answer())
        states.append(offload_state(llm))
        expected.append(text)
    send([0], resumable=False)
    assert not core.engine_core.scheduler.has_unfinished_requests()
    assert answers == stock_tokens("llama", [first, *expected])
    assert states[0]["spilled"] < states[1]["spilled"] < states[2]["spilled"]
    assert states[0]["staged"] < states[1]["staged"] < states[2]["staged"]
    # Its pages are in the prefix cache as any.
    (again,) = run(llm, [text])
    assert again.num_cached_tokens >= 300 // PAGE * PAGE
    assert list(again.outputs[0].token_ids) == answers[-1]


FLEX = {"prefill": {"method": "flex", "gamma": 0.9, "min_seq_len": 0, "min_chunk_len": 0, "min_budget": 0}}
MASK = {"prefill": {"method": "block_sparse", "block_size": 64, "sink_blocks": 1, "local_blocks": 2}}
STRING = {"string": {"shift": 100, "window": 16}}


def one_by_one(llm: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Each prompt alone: what flex selects depends on the chunks, and those on how many requests run."""
    return [tokens for prompt in prompts for tokens in generate(llm, [prompt])]


@pytest.mark.parametrize(
    "options", [FLEX, MASK, STRING, {**STRING, **FLEX}], ids=["flex", "block_sparse", "string", "string-flex"]
)
def test_methods_give_what_they_give_without_offload(make_llm: Callable[..., Any], options: dict[str, Any]) -> None:
    """Prompts alone, the last ones with prefixes that lie on the host; then together."""
    (long, other) = make_prompts((500, 420), seed=5)
    prompts = [*PROMPTS, long, [*long[:160], *other[:50]], [*long[:450], *other[:200]], long]
    arguments = {
        "block_size": PAGE,
        "max_model_len": MAX_LEN,
        "max_num_batched_tokens": 200,
        "max_num_seqs": 16,
        "num_gpu_blocks_override": BLOCKS,
        "enable_prefix_caching": True,
    }
    plain = make_llm("qwen3", additional_config={"farspan": options}, **arguments)
    expected = one_by_one(plain, prompts)
    plain.llm_engine.engine_core.shutdown()
    offloaded = offloading(20, heads=4, hot=1, tokens=200, group_size=2, farspan=options, enable_prefix_caching=True)
    llm = make_llm("qwen3", **offloaded)
    assert one_by_one(llm, prompts) == expected
    (output,) = run(llm, [long])
    assert output.num_cached_tokens == 496
    together = run_checked(llm, prompts)
    assert options != STRING or together == expected
    assert min(offload_state(llm)["spilled"], offload_state(llm)["staged"]) > 0


def spanning(tokens: int, span: int, **changes: Any) -> dict[str, Any]:
    """`offloading` with memory for the fewest slots, and for buffers of a few pages."""
    return offloading(min_slots(tokens, PAGE, 1), tokens=tokens, span=span, **changes)


def staging_pages(llm: Any) -> int:
    return llm.collective_rpc("decisions")[0]["offload"]["staging_pages"]


def test_spans(make_llm: Callable[..., Any], stock_tokens: Any) -> None:
    """Buffers of the fewest pages: prompts alone and together, longer than the buffers and not, and prefixes."""
    llm = make_llm(**spanning(64, 6, enable_prefix_caching=True))
    assert staging_pages(llm) == 6
    assert run_checked(llm, PROMPTS) == stock_tokens("llama", PROMPTS)
    (long, other) = make_prompts((500, 600), seed=5)
    prompts = [long, other, long, [*long[:160], *other[:50]], [*other[:100], 7, 8, 9], [*long[:450], *other[:200]]]
    assert run_checked(llm, prompts, [3, 9, 4, 12, 5, 6]) == stock_tokens("llama", prompts, [3, 9, 4, 12, 5, 6])
    state = offload_state(llm)
    assert min(state["spilled"], state["staged"]) > 0


@pytest.mark.parametrize(
    ("tokens", "span", "heads", "hot", "group_size"),
    [(33, 5, 4, 1, 2), (200, 15, 4, [4, 1], 1), (16, 3, 2, 0, 2)],
    ids=["groups", "by-layer", "together"],
)
def test_spans_of_groups(
    make_llm: Callable[..., Any], stock_tokens: Any, tokens: int, span: int, heads: int, hot: Any, group_size: int
) -> None:
    architecture = "qwen3" if heads == 4 else "llama"
    llm = make_llm(architecture, **spanning(tokens, span, heads=heads, hot=hot, group_size=group_size))
    assert staging_pages(llm) == span
    assert run_checked(llm, PROMPTS) == stock_tokens(architecture, PROMPTS)
    assert offload_state(llm)["staged"] > 0


@pytest.mark.parametrize(("tokens", "span"), [(48, 5), (200, 14)])
def test_spans_with_shifted_positions(make_llm: Callable[..., Any], tokens: int, span: int) -> None:
    """Which keys a turn reaches goes by distances, which are the same within a span; its end is in one of them."""
    arguments = {"block_size": PAGE, "max_model_len": MAX_LEN, "max_num_batched_tokens": tokens, "max_num_seqs": 16}
    plain = make_llm("qwen3", additional_config={"farspan": STRING}, **arguments)
    expected = generate(plain, PROMPTS)
    plain.llm_engine.engine_core.shutdown()
    llm = make_llm("qwen3", **spanning(tokens, span, heads=4, hot=1, group_size=1, farspan=STRING))
    assert staging_pages(llm) == span
    assert run_checked(llm, PROMPTS) == expected


def test_flex_is_given_room_for_the_whole_context(make_llm: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedEngineError, match=r"only prefill\.method 'dense' goes over a context in spans"):
        make_llm(**spanning(64, 6, farspan=FLEX))
