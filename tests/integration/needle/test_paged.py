"""The needle model over pages computes what the plain network computes, and flex over all blocks what dense does."""

import pytest
import torch
from farspan.engine_ext.config import DensePrefill, FlexPrefill
from farspan.evaluation.needle_answers import BlockGrids, Question, Variant, ask, overlap, sweep_row, to_question
from farspan.needle import model_dir
from farspan.needle.evaluate import encode_sample
from farspan.needle.network import load_network
from farspan.needle.paged import PagedNeedle

from benchmarks.needle_training.sweep import paper_variants


@pytest.fixture(scope="module")
def model() -> PagedNeedle:
    return PagedNeedle(load_network(model_dir()), 1024)


@pytest.fixture(scope="module")
def question() -> Question:
    return to_question("niah_multiquery", *encode_sample("niah_multiquery", 700, 5, 0.3), "cpu")


@pytest.mark.parametrize("chunk", [None, 256, 129], ids=["whole", "chunk256", "chunk129"])
@pytest.mark.parametrize(
    "prefill", [DensePrefill(), FlexPrefill(gamma=1.0, min_seq_len=0, min_chunk_len=0)], ids=["dense", "flex"]
)
def test_all_blocks_give_the_network_s_answer(model: PagedNeedle, question: Question, prefill, chunk) -> None:
    tokens = torch.cat([question.prompt, question.completion])
    with torch.no_grad():
        hidden = model.net.hidden(tokens[None], torch.arange(len(tokens))[None])
        logits = model.net.logits(hidden[0, len(question.prompt) - 1 : -1])
    expected = logits.log_softmax(-1).gather(1, question.completion[:, None])[:, 0]
    logprobs, right = model.answer_logprobs(
        question.prompt, question.completion, chunk, prefill, model.selectors(prefill)
    )
    torch.testing.assert_close(logprobs, expected, atol=1e-3, rtol=1e-3)
    assert right.all()


def test_variants_are_measured_against_dense_and_against_the_whole_prompt(model, question) -> None:
    dense = ask(model, Variant(DensePrefill(), 0), [question], 0)
    prefill = FlexPrefill(selection="flexprefill", gamma=0.9, min_budget=256, min_seq_len=0, min_chunk_len=0)
    whole = ask(model, Variant(prefill, 0), [question], 8, keep_lists=True)
    chunked = ask(model, Variant(prefill, 256), [question], 8, keep_lists=True)
    row = sweep_row(Variant(prefill, 256), 700, 5, chunked, dense, whole)
    assert row["method"] == "flex-g0.9-t0.1-m256-c256"
    assert row["dense_accuracy"] == 1.0
    assert 0 < row["density"] < 1
    assert 0.5 < row["coverage_worst_head"] <= row["coverage"] <= 1
    assert 0.5 < row["overlap"] <= 1
    assert overlap(whole.listed, whole.listed) == 1
    # The lists kept are those counted.
    causal = 6 * 7 / 2
    listed = torch.stack([grid.sum((1, 2)) for grid in whole.listed]) / causal
    assert listed.flatten().tolist() == pytest.approx([head["density"] for head in whole.heads])


def test_grids_mark_absolute_blocks(model: PagedNeedle, question: Question) -> None:
    grids = BlockGrids(model, len(question.prompt))
    prefill = FlexPrefill(gamma=1.0, min_seq_len=0, min_chunk_len=0)
    model.answer_logprobs(question.prompt, question.completion, 300, prefill, model.selectors(prefill), grids)
    assert all(torch.equal(grid, torch.ones_like(grid).tril()) for grid in grids.grids)


def test_the_paper_s_variants_differ() -> None:
    names = [variant.name for variant in paper_variants()]
    assert len(set(names)) == len(names)
