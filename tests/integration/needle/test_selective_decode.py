"""Selective decode on the bundled needle model, all pages but the last on the host: beside exact decode."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from farspan.engine_ext import launch
from farspan.engine_ext.config import DensePrefill
from farspan.engine_ext.passes import Decode, DecodeRecord, LayerContext, LayerSelection, Pass
from farspan.engine_ext.splits import SplitPlan
from farspan.evaluation.needle_answers import Question, to_question
from farspan.kernels.batch import KVView
from farspan.kernels.page_bounds import PageBounds
from farspan.kernels.page_choice import Rule
from farspan.kernels.page_choice_reference import key_bounds
from farspan.kernels.selected_decode import make_selection_buffers
from farspan.needle import model_dir, paged
from farspan.needle.evaluate import encode_sample
from farspan.needle.network import load_network
from farspan.needle.paged import PAGE_SIZE, PagedNeedle


class SelectiveNeedle(PagedNeedle):
    """Decodes token by token, from the last one of the prompt on."""

    def __init__(self, net: Any, max_len: int) -> None:
        super().__init__(net, max_len)
        shape = self.shape
        self.rule = Rule(1.0)
        self.buffers = make_selection_buffers(
            1, shape.num_key_value_heads, shape.num_attention_heads, self.block_table.shape[1], self.device
        )
        self.kept: list[torch.Tensor] = []
        self.certified: list[torch.Tensor] = []

    def attend(
        self, each: Pass, query: torch.Tensor, kv: KVView, layer: LayerContext, scale: float, out: torch.Tensor
    ) -> torch.Tensor:
        """As `launch.attend`; decodes from host memory."""
        if len(query) > 1:
            return launch.attend(each, query, kv, layer, scale, out)
        last = (each.batch.max_kv_len - 1) // PAGE_SIZE
        table = -1 - self.block_table
        table[0, last] = last
        batch = replace(each.batch, block_table=table)
        ends, cells = key_bounds(kv.pages[..., : self.shape.head_dim])
        lse, left = torch.zeros(2, query.shape[1], 1)
        record = DecodeRecord(torch.empty_like(query), lse, left)
        selection = LayerSelection(PageBounds(ends, cells), self.rule, self.buffers, record, 1)
        work = Decode(SplitPlan(1, PAGE_SIZE), None)
        exact = launch.attend(replace(each, work=work), query, kv, layer, scale, torch.empty_like(query))
        chosen = replace(each, batch=batch, work=replace(work, selections={layer.index: selection}))
        found = launch.attend(chosen, query, KVView(kv.pages, 0, kv.pages), layer, scale, out)
        self.kept.append((found - exact).exp())
        self.certified.append(torch.sigmoid(found - left))
        return found

    @torch.no_grad()
    def is_right(self, question: Question, rule: Rule) -> bool:
        """Whether greedy decoding writes the completion."""
        self.rule = rule
        self._step(question.prompt[:-1], 0, DensePrefill(), None, None)
        tokens = torch.cat([question.prompt[-1:], question.completion])
        first = len(question.prompt) - 1
        for place, token in enumerate(tokens[:-1]):
            hidden = self._step(token[None], first + place, DensePrefill(), None, None)
            if self.net.logits(self.net.model.norm(hidden)).argmax() != tokens[place + 1]:
                return False
        return True


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> SelectiveNeedle:
    made = SelectiveNeedle(load_network(model_dir()), 2200)
    monkeypatch.setattr(paged, "attend", made.attend)
    monkeypatch.setattr("farspan.kernels.page_choice_reference.SELECT_RECENT_TOKENS", 256)
    return made


def questions(length: int, count: int) -> list[Question]:
    """Needles in the first half, out of the reach of what is always read."""
    tasks = ("niah_single", "niah_multikey_2")
    return [
        to_question(task, *encode_sample(task, length, seed, 0.3), "cpu") for task in tasks for seed in range(count)
    ]


def test_answers_are_those_of_exact_decode(model: SelectiveNeedle) -> None:
    asked = questions(2048, 1)
    exact = [model.is_right(question, Rule(1.0)) for question in asked]
    assert all(exact)
    model.buffers.totals.zero_()
    model.kept.clear()
    model.certified.clear()
    assert [model.is_right(question, Rule(0.95)) for question in asked] == exact
    read, on_host = model.buffers.totals.tolist()
    assert read < 0.6 * on_host
    kept, certified = torch.cat(model.kept), torch.cat(model.certified)
    assert kept.min() > 0.9
    assert (certified <= kept + 1e-4).all()
