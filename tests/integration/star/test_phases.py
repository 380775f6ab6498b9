"""What the hosts are asked in both phases, without any host."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from farspan.star.llm import StarLLM
from farspan.star.protocol import Answer, Ask
from vllm import SamplingParams

from tests.engine_ext.star.hosts import Layout


class Asking(StarLLM):
    """A StarLLM that keeps what it asks, and whose hosts answer nothing."""

    def __init__(self) -> None:
        self.asked: list[Ask] = []
        self.hosts: Any = SimpleNamespace(setup=SimpleNamespace(graphs=False))

    def guarded(self, asks: dict[int, Ask], answers: dict[int, Answer], may_replace: bool = False) -> Iterator[Any]:
        """Answer at once."""
        self.asked += asks.values()
        output = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[1])])
        answers.update({rank: Answer(output, 0.0, [0.0], 0, 0, 0.0) for rank in asks})
        yield from ()


def test_phase_1_prefills_as_the_request_says() -> None:
    """The options name the pages that phase 2 looks for."""
    llm = Asking()
    params = SamplingParams(max_tokens=4, extra_args={"farspan.method": "dense"})
    shards = Layout(2, 64, 32, 32, (1, 1)).shards()
    list(llm.ask_all(list(range(64)), [1, 2], params, shards, {}))
    assert [ask.phase for ask in llm.asked] == ["phase 1", "phase 1", "phase 2", "phase 2"]
    assert [ask.sampling.extra_args for ask in llm.asked] == [{"farspan.method": "dense"}] * 4
    assert [ask.sampling.max_tokens for ask in llm.asked] == [1, 1, 4, 4]
