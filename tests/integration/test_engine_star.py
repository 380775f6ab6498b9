"""One host of Star Attention in a real engine: its passes, its pages in the prefix cache, and its refusals."""

from pathlib import Path
from typing import Any

import pytest
from farspan.engine_ext.star.shard import NAME

from tests.integration.star_oracle import StarLlama
from tests.integration.test_engine_offload import offload_state, offloading
from tests.integration.test_engine_tokens import make_prompts

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

CONTEXT_LEN, BLOCK_LEN, ANCHOR_LEN = 224, 64, 32
(PROMPT,) = make_prompts((CONTEXT_LEN + 9,), seed=5)
MAX_TOKENS = 8


def one_host(name: str, **changes: Any) -> dict[str, Any]:
    """The extra args of a request whose blocks are all on one host."""
    shard = {
        "name": name, "context_len": CONTEXT_LEN, "block_len": BLOCK_LEN, "anchor_len": ANCHOR_LEN, "first_block": 0,
        "num_blocks": 4, "num_hosts": 1, "query_host": 0, "rank": 0,
    }  # fmt: skip
    return {NAME: {**shard, **changes}}


def ask(llm: Any, prompt: list[int], extra_args: dict[str, Any] | None, max_tokens: int = MAX_TOKENS) -> Any:
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False, extra_args=extra_args
    )
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return output


def star_llm(make_llm: Any, **kwargs: Any) -> Any:
    options = {"block_size": 16, "enable_prefix_caching": True, "additional_config": {"farspan": {"star": {}}}}
    return make_llm(**{**options, **kwargs})


@pytest.mark.parametrize(
    ("chunk", "scheduling"), [(48, ""), (2048, ""), (48, "async_scheduling")], ids=["48", "2048", "48-async_scheduling"]
)
def test_blocks_on_one_host_give_the_oracles_tokens(
    make_llm: Any, model_dirs: Any, request: pytest.FixtureRequest, chunk: int, scheduling: str
) -> None:
    if scheduling:
        request.getfixturevalue(scheduling)
    folder: Path = model_dirs("llama")
    expected = StarLlama(folder, CONTEXT_LEN, BLOCK_LEN, ANCHOR_LEN).generate(PROMPT, MAX_TOKENS)
    exact = StarLlama(folder, CONTEXT_LEN, CONTEXT_LEN, ANCHOR_LEN).generate(PROMPT, MAX_TOKENS)
    assert expected != exact
    llm = star_llm(make_llm, max_num_batched_tokens=chunk)

    first = ask(llm, PROMPT[:CONTEXT_LEN], one_host("a"), max_tokens=1)
    assert first.num_cached_tokens == 0
    second = ask(llm, PROMPT, one_host("a"))
    assert list(second.outputs[0].token_ids) == expected
    assert second.num_cached_tokens == CONTEXT_LEN
    # An exact request may share what is exact, block 0, and nothing else.
    plain = ask(llm, PROMPT, None)
    assert list(plain.outputs[0].token_ids) == exact
    assert plain.num_cached_tokens == BLOCK_LEN
    # Another request of the same context shares its blocks, and never pages of the query.
    again = ask(llm, [*PROMPT, *expected, *PROMPT[:30]], one_host("b"), max_tokens=1)
    assert again.num_cached_tokens == CONTEXT_LEN
    # Other blocks of the same tokens share block 0 alone.
    other = ask(llm, PROMPT, one_host("c", anchor_len=16), max_tokens=1)
    assert other.num_cached_tokens == BLOCK_LEN


@pytest.mark.parametrize("hot", [0, 1], ids=["all-cold", "half"])
def test_cold_heads_on_one_host(make_llm: Any, model_dirs: Any, hot: int) -> None:
    """Blocks that lie on the host are staged in both phases, and read there by decode; pages are shared as ever."""
    oracle = StarLlama(model_dirs("llama"), CONTEXT_LEN, BLOCK_LEN, ANCHOR_LEN)
    expected = oracle.generate(PROMPT, MAX_TOKENS)
    arguments = offloading(8, hot=hot, tokens=48, blocks=80, farspan={"star": {}}, enable_prefix_caching=True)
    llm = make_llm(**arguments)
    ask(llm, PROMPT[:CONTEXT_LEN], one_host("a"), max_tokens=1)
    first = offload_state(llm)
    assert min(first["spilled"], first["staged"]) > 0
    second = ask(llm, PROMPT, one_host("a"))
    assert list(second.outputs[0].token_ids) == expected
    assert second.num_cached_tokens == CONTEXT_LEN
    assert offload_state(llm)["staged"] > first["staged"]
    (plain,) = make_prompts((300,), seed=9)
    exact = StarLlama(model_dirs("llama"), 1, 300, 0).generate(plain, MAX_TOKENS)
    assert list(ask(llm, plain, None).outputs[0].token_ids) == exact
    assert list(ask(llm, PROMPT, one_host("b")).outputs[0].token_ids) == expected
    offload_state(llm)
    llm.llm_engine.engine_core.engine_core.scheduler._residency.check_integrity()
    from vllm.exceptions import VLLMValidationError

    window: dict[str, Any] = {
        "visibility": "all", "window_len": 64, "page_size": 16, "context": "x", "name": "w", "context_len": 64,
        "num_hosts": 1, "query_host": 0, "rank": 0,
    }  # fmt: skip
    with pytest.raises(VLLMValidationError, match="visibility='all'; allowed: 'star' together with offload"):
        ask(llm, PROMPT, {NAME: window})


def test_bad_shards_are_refused_alone(make_llm: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    llm = star_llm(make_llm)
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"block_len": 40}, "farspan.star.block_len=40; allowed: a multiple of the page size, 16"),
        ({"anchor_len": 80}, "farspan.star.anchor_len=80; allowed: at most block_len, which is 64"),
        ({"num_blocks": 5}, "farspan.star.num_blocks=5; allowed: a whole number from 0 to 4"),
        ({"blocks": 5}, "farspan.star: Object contains unknown field `blocks`"),
        ({"rank": 1}, "farspan.star.rank=1; allowed: a rank below num_hosts"),
        ({"context_len": 256}, "a prompt of 233 tokens; allowed: the host's context of 256 tokens"),
    ]
    for changes, sentence in mistakes:
        with pytest.raises(VLLMValidationError) as caught:
            ask(llm, PROMPT, one_host("a", **changes))
        assert sentence in str(caught.value)
    assert len(ask(llm, PROMPT, None, max_tokens=1).outputs[0].token_ids) == 1


def test_an_engine_without_star_refuses_shards(make_llm: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match="only in an engine that was started with the option star"):
        ask(make_llm(), PROMPT, one_host("a"))


def test_string_and_star_are_refused_at_start_up(make_llm: Any) -> None:
    with pytest.raises(ValueError, match="without string: both move positions"):
        make_llm(additional_config={"farspan": {"star": {}, "string": {}}})
