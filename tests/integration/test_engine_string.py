"""Shifted rotary positions through vLLM, against a model that computes the whole matrix of shifted positions."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.integration.string_oracle import Shift, ShiftedLlama
from tests.integration.test_engine_tokens import generate, launches, make_prompts, run

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

SHIFT = Shift(64, 16)
BEYOND = Shift(400, 16)
PROMPTS = make_prompts((1, 60, 64, 65, 66, 190), seed=11)
"""The second and third reach distance S while they decode; 65 and 66 tokens are distances of S and S + 1."""
MAX_TOKENS = 10

_expected: dict[Shift, list[list[int]]] = {}


@pytest.fixture
def expected(model_dirs: Callable[[str], Path]) -> Callable[[Shift], list[list[int]]]:
    """The oracle's tokens behind `PROMPTS`, each shift computed once."""

    def tokens(shift: Shift) -> list[list[int]]:
        if shift not in _expected:
            model = ShiftedLlama(model_dirs("llama"), shift)
            _expected[shift] = [model.generate(prompt, MAX_TOKENS) for prompt in PROMPTS]
        return _expected[shift]

    return tokens


def options(shift: Shift, **others: Any) -> dict[str, Any]:
    string = {"shift": shift.shift, "window": shift.window, "logit_scale": shift.logit_scale}
    return {"farspan": {"string": string, **others}}


@pytest.mark.parametrize(("chunk", "page"), [(32, 16), (63, 64), (64, 32), (2048, 128)], ids=lambda value: str(value))
def test_chunks_and_mixed_batches_give_the_oracles_tokens(make_llm: Any, expected: Any, chunk: int, page: int) -> None:
    llm = make_llm(
        max_num_batched_tokens=chunk, max_num_seqs=16, block_size=page, enable_prefix_caching=False,
        additional_config=options(SHIFT),
    )  # fmt: skip
    assert generate(llm, PROMPTS, MAX_TOKENS) == expected(SHIFT)
    counts = launches(llm)
    assert counts["decode"] > 0
    assert counts["prefill_dense"] > 0
    assert expected(SHIFT) != expected(BEYOND)
    (decisions,) = llm.collective_rpc("decisions")
    assert decisions["string"] == {"shift": 64, "window": 16, "logit_scale": SHIFT.logit_scale, "kernel": "cpu"}


def test_prefix_hits_give_the_oracles_tokens(make_llm: Any, expected: Any) -> None:
    llm = make_llm(
        max_num_batched_tokens=48, max_num_seqs=16, block_size=16, enable_prefix_caching=True,
        additional_config=options(SHIFT),
    )  # fmt: skip
    for repeat in range(2):
        for prompt, tokens in zip(PROMPTS, expected(SHIFT), strict=True):
            (output,) = run(llm, [prompt], MAX_TOKENS)
            assert list(output.outputs[0].token_ids) == tokens
            assert (output.num_cached_tokens >= (len(prompt) - 1) // 16 * 16) == (repeat == 1 or len(prompt) == 1)


def test_a_shift_beyond_the_prompt_changes_nothing(make_llm: Any, expected: Any) -> None:
    stock = generate(make_llm("llama", None, enable_prefix_caching=False), PROMPTS, MAX_TOKENS)
    llm = make_llm(
        max_num_batched_tokens=64, max_num_seqs=16, block_size=32, enable_prefix_caching=False,
        additional_config=options(BEYOND),
    )  # fmt: skip
    assert generate(llm, PROMPTS, MAX_TOKENS) == stock == expected(BEYOND)


def test_fraction_of_the_trained_length(make_llm: Any, expected: Any) -> None:
    """The tiny model's max_position_embeddings are 4096."""
    llm = make_llm(additional_config={"farspan": {"string": {"shift": 64 / 4096, "window": 16}}})
    assert generate(llm, PROMPTS, MAX_TOKENS) == expected(SHIFT)


@pytest.mark.parametrize(
    ("prefill", "shift"),
    [
        (
            {"method": "flex", "gamma": 1.0, "min_seq_len": 0, "min_chunk_len": 0, "coverage_rows": 2},
            Shift(64, 16, 1.2),
        ),
        (
            {"method": "block_sparse", "block_size": 64, "sink_blocks": 1, "local_blocks": 1},
            Shift(64, 16, 1.2, sparse_block=64),
        ),
    ],
    ids=["flex", "block_sparse"],
)
def test_composes_with_sparse_prefill(make_llm: Any, expected: Any, prefill: dict[str, Any], shift: Shift) -> None:
    llm = make_llm(
        max_num_batched_tokens=100, max_num_seqs=16, block_size=32, additional_config=options(shift, prefill=prefill)
    )
    assert generate(llm, PROMPTS, MAX_TOKENS) == expected(shift)
    assert launches(llm)["prefill_sparse"] > 0


def test_measured_coverage_is_that_of_the_shifted_attention(make_llm: Any) -> None:
    """With gamma 1 all blocks are read, so nothing may seem lost."""
    prefill = {
        "method": "flex",
        "gamma": 1.0,
        "min_seq_len": 0,
        "min_chunk_len": 0,
        "min_budget": 0,
        "coverage_rows": 4,
    }
    llm = make_llm(max_num_batched_tokens=1024, max_num_seqs=16, additional_config=options(SHIFT, prefill=prefill))
    # Rows count whose list might leave a block out: not those of short prompts.
    generate(llm, [*PROMPTS, *make_prompts((900,), seed=12)], 1)

    (rows,) = llm.collective_rpc("selection_rows")
    assert rows
    assert min(row["coverage"] for row in rows) > 0.9999


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {
                "architectures": ["OPTForCausalLM"], "model_type": "opt", "ffn_dim": 256, "word_embed_proj_dim": 128,
                "num_attention_heads": 2, "do_layer_norm_before": True, "activation_function": "relu",
            },
            "no rotary embedding",
        ),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]}}, "multimodal rotary positions"),
        ({"max_position_embeddings": 256}, "is 84 tokens, less than window=128"),
    ],
    ids=["no-rope", "mrope", "window"],
)  # fmt: skip
def test_refusals(
    tmp_path: Path,
    model_dirs: Callable[[str], Path],
    changes: dict[str, Any],
    sentence: str,
) -> None:
    from vllm import LLM

    config = json.loads((model_dirs("llama") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match="string") as caught:
        LLM(
            str(tmp_path), load_format="dummy", skip_tokenizer_init=True, attention_backend="CUSTOM", dtype="float32",
            max_model_len=200, enforce_eager=True, additional_config={"farspan": {"string": {}}},
        )  # fmt: skip
    assert sentence in str(caught.value)
