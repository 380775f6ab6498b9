"""What is changed in a running engine."""

import inspect
from types import SimpleNamespace
from typing import Any

import torch
from farspan.vllm_compat.engine import draw_by_place_in_answer
from vllm.v1.worker.gpu.sample.sampler import Sampler


class Draws(Sampler):
    """Runner V2's sampler, which tells the positions that it would draw by."""

    def __init__(self) -> None:
        """Needs no device."""

    def _sample_random(self, *arguments: Any) -> Any:
        return self.signature.bind(*arguments).arguments["pos"]

    signature = inspect.signature(Sampler.__new__(Sampler)._sample_random)
    # The names by which vLLM's own are bound.
    _sample_random.__signature__ = inspect.signature(Sampler._sample_random)  # type: ignore[attr-defined]


def positions_of(prompt_lens: list[int], rows: list[int], positions: list[int], *, is_v2: bool = True) -> list[int]:
    """By which two rows are drawn on a host that has such prompts."""
    sampler = Draws()
    runner = SimpleNamespace(sampler=sampler)
    if is_v2:
        runner.req_states = SimpleNamespace(prompt_len=SimpleNamespace(gpu=torch.tensor(prompt_lens).int()))
    worker = SimpleNamespace(model_runner=runner)
    llm = SimpleNamespace(collective_rpc=lambda work: [work(worker)])
    for _ in range(2):
        draw_by_place_in_answer(llm)
    named = {"expanded_idx_mapping": torch.tensor(rows), "pos": torch.tensor(positions)}
    # Their number differs between versions.
    arguments = [named.get(name) for name in Draws.signature.parameters]
    found = sampler._sample_random(*arguments)
    assert found.dtype == torch.int64
    return found.tolist()


def test_hosts_with_prompts_of_other_lengths_draw_alike() -> None:
    """The first token of a request, and the fifth of another one."""
    assert positions_of([90, 40, 70], [2, 0], [69, 93]) == [0, 4]
    assert positions_of([900, 40, 30], [2, 0], [29, 903]) == [0, 4]


def test_a_generator_for_each_request_needs_nothing() -> None:
    assert positions_of([90, 40], [1, 0], [39, 93], is_v2=False) == [39, 93]
