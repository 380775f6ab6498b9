"""A head that loses what gamma promises is computed again in the same chunk, inside a real engine."""

from typing import Any

import pytest
import torch
from farspan.engine_ext import launch
from farspan.engine_ext.selection.repair import COVERAGE_SLACK
from farspan.metrics import read_selection

from tests.integration.test_engine_tokens import make_prompts
from tests.integration.tiny_models import SLASH, SLASH_HEAD

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

GAMMA = 0.9
CHUNK, PROMPT_LEN = 768, 1500
"""Of the second chunk's queries, those before SLASH do not have the key that the slash head looks for yet."""
PREFILL = {"method": "flex", "gamma": GAMMA, "min_budget": 0, "min_seq_len": 0, "min_chunk_len": 0}
"""Heads are measured and repaired by default."""


def none_below_gamma(coverage: torch.Tensor, gamma: float) -> torch.Tensor:
    """Stands in for `heads_below_gamma`: what is kept is measured, and nothing computed again."""
    return torch.zeros(coverage.shape[:2], dtype=torch.bool)


def prompt_logprobs(llm: Any, prompt: list[int], **extra_args: Any) -> torch.Tensor:
    """Of each token of the prompt but the first."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, extra_args=extra_args)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    found = output.prompt_logprobs[1:]
    return torch.tensor([of_place[token].logprob for of_place, token in zip(found, prompt[1:], strict=True)])


def test_a_head_that_keeps_too_little_is_computed_again(make_llm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (prompt,) = make_prompts((PROMPT_LEN,), seed=9)
    llm = make_llm(
        "slash",
        max_num_batched_tokens=CHUNK,
        max_num_seqs=16,
        worker_extension_cls="farspan.metrics.SelectionMetrics",
        additional_config={"farspan": {"prefill": PREFILL}},
        enable_prefix_caching=False,
    )
    dense = prompt_logprobs(llm, prompt, **{"farspan.method": "dense"})
    repaired = prompt_logprobs(llm, prompt)
    rows = read_selection(llm, reset=True)
    monkeypatch.setattr(launch, "heads_below_gamma", none_below_gamma)
    sparse = prompt_logprobs(llm, prompt)
    measured = read_selection(llm)
    for row, before in zip(rows, measured, strict=True):
        # One of the two chunks, of the one head that needs it.
        assert (before["coverage"] < GAMMA - COVERAGE_SLACK) == (row["head"] == SLASH_HEAD)
        assert row["repaired"] == (0.5 if row["head"] == SLASH_HEAD else 0.0)
        assert row["coverage"] >= GAMMA
        assert before["repaired"] == 0.0
        if row["head"] == SLASH_HEAD:
            causal = 12 * 13 / 2
            assert row["density"] == pytest.approx(before["density"] + sum(range(7, 13)) / causal)
    too_early = slice(CHUNK, SLASH - 1)
    assert float((sparse - dense)[too_early].abs().mean()) > 0.1
    assert float((repaired - dense)[too_early].abs().mean()) < 0.02
