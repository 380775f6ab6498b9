"""Sparse prefill through vLLM: exact where all blocks are read, apart from exact KV in the cache, overridable."""

from typing import Any

import pytest

from tests.integration.test_engine_tokens import (
    FEW_PAGES,
    PREEMPTING,
    generate,
    launches,
    make_prompts,
    num_preemptions,
)

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

PROMPTS = make_prompts((63, 700, 1500, 129), seed=3)
EVERYTHING = {
    "flex": {"method": "flex", "gamma": 1.0, "min_seq_len": 0, "min_chunk_len": 0, "coverage_rows": 2},
    "sink_local": {"method": "block_sparse", "local_blocks": 100, "block_size": 64},
}
"""Options under which every causal block is read."""


def with_prefill(make_llm: Any, prefill: dict[str, Any]) -> Any:
    options = {"farspan": {"prefill": prefill}}
    return make_llm(max_num_batched_tokens=512, max_num_seqs=16, block_size=32, additional_config=options)


def run(llm: Any, **extra_args: Any) -> tuple[list[list[int]], list[int]]:
    """Greedy tokens of the prompts, and how many of each prompt's tokens came from the prefix cache."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, extra_args=extra_args or None)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], [output.num_cached_tokens for output in outputs]


@pytest.mark.parametrize("method", EVERYTHING)
def test_all_blocks_give_the_stock_tokens(make_llm: Any, method: str) -> None:
    expected = generate(make_llm("llama", None, enable_prefix_caching=False), PROMPTS, 10)
    llm = with_prefill(make_llm, EVERYTHING[method])
    assert run(llm)[0] == expected
    assert launches(llm)["prefill_sparse"] > 0
    assert "prefill_dense" not in launches(llm)
    # Sparse stays sparse on a prefix hit.
    tokens, cached = run(llm)
    assert tokens == expected
    assert cached[1] >= 640


@pytest.mark.parametrize("method", EVERYTHING)
def test_preempted_requests_prefill_sparsely_again(make_llm: Any, method: str) -> None:
    expected = generate(make_llm("llama", None, enable_prefix_caching=False), PREEMPTING, 40)
    llm = make_llm(**FEW_PAGES, additional_config={"farspan": {"prefill": EVERYTHING[method]}})
    assert generate(llm, PREEMPTING, 40) == expected
    assert launches(llm)["prefill_sparse"] > 0
    assert num_preemptions(llm) > 0


@pytest.mark.parametrize(
    "prefill",
    [
        {"method": "flex", "gamma": 0.6, "min_budget": 0, "min_seq_len": 0, "min_chunk_len": 0},
        {"method": "block_sparse", "local_blocks": 2},
    ],
    ids=["flex", "sink_local"],
)
def test_sparse_and_dense_requests_share_an_engine_but_no_blocks(make_llm: Any, prefill: dict[str, Any]) -> None:
    expected = generate(make_llm("llama", None, enable_prefix_caching=False), PROMPTS, 10)
    llm = with_prefill(make_llm, prefill)
    sparse, cached = run(llm)
    assert cached == [0, 0, 0, 0]
    assert sparse != expected
    dense, cached = run(llm, **{"farspan.method": "dense"})
    assert cached == [0, 0, 0, 0]
    assert dense == expected
    assert run(llm, **{"farspan.method": "dense"})[1][1] >= 640
    again, cached = run(llm)
    assert cached[1] >= 640
    if prefill["method"] == "block_sparse":
        # Flex reads everything in tiles that a chunk or a prefix hit cuts.
        assert again == sparse


def test_a_response_tells_how_its_prompt_was_computed(make_llm: Any) -> None:
    from vllm import SamplingParams

    llm = with_prefill(make_llm, {"method": "flex", "gamma": 0.9, "min_seq_len": 1000, "min_chunk_len": 200})
    params = [SamplingParams(temperature=0, max_tokens=2, extra_args=None) for _ in PROMPTS]
    params[3].extra_args = {"farspan.method": "dense"}

    def told(places: list[int]) -> list[dict[str, int]]:
        inputs = [{"prompt_token_ids": PROMPTS[place]} for place in places]
        outputs = llm.generate(inputs, [params[place] for place in places], use_tqdm=False)
        return [output.kv_transfer_params["farspan"]["prefill_tokens"] for output in outputs]

    short, middle, long, dense = told([0, 1, 2, 3])
    assert (short, middle, dense) == ({"min_seq_len": 63}, {"min_seq_len": 700}, {"request": 129})
    assert long.keys() <= {"selected", "min_chunk_len"}
    assert long["selected"] > 1000
    assert sum(long.values()) == 1500
    # A prefix hit is not computed again.
    (again,) = told([2])
    assert sum(again.values()) < 100
    exact = make_llm()
    (output,) = exact.generate([{"prompt_token_ids": PROMPTS[0]}], params[0], use_tqdm=False)
    assert output.kv_transfer_params is None


def test_bad_override_fails_its_request_alone(make_llm: Any) -> None:
    from vllm.exceptions import VLLMValidationError

    llm = with_prefill(make_llm, EVERYTHING["flex"])
    with pytest.raises(VLLMValidationError, match=r"farspan.gamma=2; allowed: a number in \(0, 1\]"):
        run(llm, **{"farspan.gamma": 2})
    assert len(run(llm, **{"farspan.gamma": 0.9})[0]) == len(PROMPTS)
