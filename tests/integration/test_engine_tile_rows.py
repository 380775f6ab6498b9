"""Every query tile has the blocks that its own rows look at, inside a real engine and however a prompt is cut."""

from typing import Any

import pytest
import torch
from farspan.metrics import read_selection

from tests.integration.test_engine_tokens import make_prompts
from tests.integration.tiny_models import SLASH, SLASH_HEAD

pytestmark = [pytest.mark.e2e, pytest.mark.filterwarnings("default")]

GAMMA = 0.9
CHUNK, PROMPT_LEN = 1024, 2000
"""Of the second chunk's queries, those before SLASH do not have the key that the slash head looks for yet."""


def prompt_logprobs(llm: Any, prompt: list[int], **extra_args: Any) -> torch.Tensor:
    """Of each token of the prompt but the first."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, extra_args=extra_args)
    (output,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    found = output.prompt_logprobs[1:]
    return torch.tensor([of_place[token].logprob for of_place, token in zip(found, prompt[1:], strict=True)])


@pytest.mark.parametrize("selection", ["tile_rows", "flexprefill"])
def test_the_first_queries_of_a_chunk(selection: str, make_llm: Any) -> None:
    prefill = {"method": "flex", "gamma": GAMMA, "min_budget": 0, "min_seq_len": 0, "min_chunk_len": 0}
    (prompt,) = make_prompts((PROMPT_LEN,), seed=9)
    llm = make_llm(
        "slash",
        max_num_batched_tokens=CHUNK,
        max_num_seqs=16,
        worker_extension_cls="farspan.metrics.SelectionMetrics",
        additional_config={"farspan": {"prefill": prefill | {"selection": selection, "coverage_rows": 4}}},
        enable_prefix_caching=False,
    )
    dense = prompt_logprobs(llm, prompt, **{"farspan.method": "dense"})
    sparse = prompt_logprobs(llm, prompt)
    rows = read_selection(llm)
    too_early = slice(CHUNK, SLASH - 1)
    change = float((sparse - dense)[too_early].abs().mean())
    (slash,) = [row for row in rows if row["head"] == SLASH_HEAD and row["layer"] == 0]
    if selection == "tile_rows":
        assert change < 0.05
        assert all(row["coverage_min"] >= GAMMA - 0.05 for row in rows)
        assert all(row["density"] < 0.6 for row in rows if row["head"] != SLASH_HEAD)
    else:
        # What the last queries of a chunk look at says nothing of them.
        assert change > 0.1
        assert slash["coverage_min"] < GAMMA - 0.05
