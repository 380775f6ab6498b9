"""vLLM's features with every method, on one engine each: a model with YaRN positions and an adapter.

Methods that read every key give the results of vLLM's own backend; all methods agree with themselves.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.test_engine_offload import offloading
from tests.integration.test_engine_tokens import make_prompts, num_preemptions
from tests.integration.tiny_models import write_lora

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

(PROMPT,) = make_prompts((300,), seed=31)
MANY = make_prompts(tuple(range(60, 76)), seed=32)
BLOCKS = 64
"""Of 16 tokens: for about half of `MANY`, each with 40 more tokens."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "rope_theta": 10000.0}
METHODS: dict[str, dict[str, Any]] = {
    "dense": {},
    "flex": {"prefill": {"method": "flex", "gamma": 1.0, "min_seq_len": 0, "min_chunk_len": 0}},
    "block_sparse": {"prefill": {"method": "block_sparse", "local_blocks": 100, "block_size": 64}},
    "offload": {"offload": {}},
    "string": {"string": {"shift": 64, "window": 16}},
}
"""Options with which every key is read; string moves some of them."""


def engine_arguments(method: str | None) -> dict[str, Any]:
    """Of `make_llm`; method None is vLLM's own backend."""
    if method == "offload":
        return offloading(40, blocks=BLOCKS, tokens=256, enable_prefix_caching=True)
    sizes: dict[str, Any] = {"max_model_len": 768, "max_num_batched_tokens": 256}
    if method is None:  # vLLM's pages on a CPU are multiples of 32
        return {"block_size": 32, "num_gpu_blocks_override": BLOCKS // 2, **sizes}
    options = {"additional_config": {"farspan": METHODS[method]}}
    return {"block_size": 16, "num_gpu_blocks_override": BLOCKS, **sizes, **options}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("lora") / "adapter", "llama")


@pytest.fixture(scope="module")
def start(make_module_llm: Callable[..., Any]) -> Callable[[str | None], Any]:
    def start_engine(method: str | None) -> Any:
        return make_module_llm(
            "llama",
            None if method is None else "CUSTOM",
            **{
                **engine_arguments(method),
                "max_num_seqs": 16,
                "enable_lora": True,
                "max_lora_rank": 8,
                "hf_overrides": {"rope_parameters": YARN, "max_position_embeddings": 1024},
                "disable_log_stats": False,
            },
        )

    return start_engine


def ask(llm: Any, prompts: list[list[int]], lora: Any = None, **params: Any) -> list[Any]:
    """The outputs of greedy requests, or as `params` say."""
    from vllm import SamplingParams

    sampling = SamplingParams(**{"temperature": 0, "max_tokens": 8, "ignore_eos": True, **params})
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(inputs, sampling, use_tqdm=False, lora_request=lora)


def tokens_of(outputs: list[Any]) -> list[list[int]]:
    return [list(each.token_ids) for output in outputs for each in output.outputs]


def plain(llm: Any, adapter: Path) -> Any:
    """Greedy tokens with YaRN positions."""
    return tokens_of(ask(llm, [PROMPT, MANY[0]]))


def lora(llm: Any, adapter: Path) -> Any:
    from vllm.lora.request import LoRARequest

    request = LoRARequest("adapter", 1, str(adapter))
    without, with_it, again, still = (tokens_of(ask(llm, [PROMPT], each)) for each in (None, request, None, request))
    assert without == again != with_it == still
    return with_it


def structured_output(llm: Any, adapter: Path) -> Any:
    from vllm.sampling_params import StructuredOutputsParams

    # No token is the beginning of another that is allowed.
    choices = ["t5", "t7", "t9"]
    limits = {"structured_outputs": StructuredOutputsParams(choice=choices)}
    (output,) = ask(llm, [PROMPT], max_tokens=4, ignore_eos=False, **limits)
    text = output.outputs[0].text.strip()
    assert text in choices
    return text


def several_samples(llm: Any, adapter: Path) -> Any:
    outputs = ask(llm, [PROMPT], n=3, temperature=1.5, seed=5)
    found = tokens_of(outputs)
    assert len(found) == 3
    assert found[0] != found[1]
    assert found == tokens_of(ask(llm, [PROMPT], n=3, temperature=1.5, seed=5))
    return found


def prompt_logprobs(llm: Any, adapter: Path) -> Any:
    """Of a prompt and its own greedy continuation: what the continuation said of itself when it was made."""
    (output,) = ask(llm, [PROMPT], logprobs=0)
    made = output.outputs[0]
    said = [step[token].logprob for step, token in zip(made.logprobs, made.token_ids, strict=True)]
    whole = PROMPT + list(made.token_ids)
    (output,) = ask(llm, [whole], prompt_logprobs=0, max_tokens=1)
    found = [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], whole[1:], strict=True)]
    assert found[-len(said) :] == pytest.approx(said, abs=1e-3)
    return found


def beam_search(llm: Any, adapter: Path) -> Any:
    from vllm.sampling_params import BeamSearchParams

    (output,) = llm.beam_search(
        [{"prompt_token_ids": PROMPT}], BeamSearchParams(beam_width=2, max_tokens=4, ignore_eos=True)
    )
    found = [list(each.tokens[-4:]) for each in output.sequences]
    whole = PROMPT + found[0]
    (scored,) = ask(llm, [whole], prompt_logprobs=0, max_tokens=1)
    steps = zip(scored.prompt_logprobs[-4:], whole[-4:], strict=True)
    assert output.sequences[0].cum_logprob == pytest.approx(sum(step[token].logprob for step, token in steps), abs=1e-3)
    return found


def preemption(llm: Any, adapter: Path) -> Any:
    """Requests that push each other out give the tokens that each gives alone."""
    before = num_preemptions(llm)
    together = tokens_of(ask(llm, MANY, max_tokens=40))
    assert num_preemptions(llm) > before
    assert together[::5] == [tokens_of(ask(llm, [prompt], max_tokens=40))[0] for prompt in MANY[::5]]
    return together


FEATURES = {
    each.__name__: each
    for each in (plain, lora, structured_output, several_samples, prompt_logprobs, beam_search, preemption)
}


@pytest.fixture(scope="module")
def stock(start: Callable[[str | None], Any], adapter: Path) -> dict[str, Any]:
    """What vLLM's own backend gives."""
    llm = start(None)
    found = {name: feature(llm, adapter) for name, feature in FEATURES.items()}
    llm.llm_engine.engine_core.shutdown()
    return found


@pytest.fixture(scope="module", params=METHODS)
def engine(request: pytest.FixtureRequest, start: Callable[[str | None], Any], stock: Any) -> Iterator[tuple[str, Any]]:
    llm = start(request.param)
    yield request.param, llm
    llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize("feature", FEATURES)
def test_features(engine: tuple[str, Any], stock: dict[str, Any], adapter: Path, feature: str) -> None:
    method, llm = engine
    found = FEATURES[feature](llm, adapter)
    if method == "string":
        assert feature != "plain" or found != stock[feature]
    elif feature == "prompt_logprobs":
        assert found == pytest.approx(stock[feature], abs=1e-3)
    else:
        assert found == stock[feature]


def test_async_scheduling(
    engine: tuple[str, Any],
    start: Callable[[str | None], Any],
    stock: dict[str, Any],
    adapter: Path,
    async_scheduling: None,
) -> None:
    """Preempted requests too; what string gives is what it gives without."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    method, without = engine
    features = (plain, preemption)
    expected = [each(without, adapter) if method == "string" else stock[each.__name__] for each in features]
    llm = start(method)
    core = llm.llm_engine.engine_core.engine_core
    assert isinstance(core.scheduler, AsyncScheduler)
    assert core.batch_queue is not None
    assert [each(llm, adapter) for each in features] == expected
    llm.llm_engine.engine_core.shutdown()
