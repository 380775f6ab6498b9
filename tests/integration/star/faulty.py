"""Hosts that do what a test tells them by a file: die, sleep, fail or answer with other tokens, once."""

import dataclasses
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from farspan.star import StarLLM
from farspan.star.host import StarHost
from farspan.star.protocol import Answer, Ask

FAULT_FILE = "FARSPAN_TEST_FAULT"


class FaultyHost(StarHost):
    """A StarHost with at most one fault, at the second step of a phase."""

    def run(self, ask: Ask) -> Answer:
        """As StarHost's, with the fault that the file names for this host and phase."""
        self.fault = take_fault(self.setup.rank, ask.phase)
        if self.fault is not None:
            stock = self.llm.llm_engine.step
            steps = 0

            def step() -> Any:
                nonlocal steps
                steps += 1
                if steps == 2:
                    self.act()
                return stock()

            self.llm.llm_engine.step = step
        try:
            answer = super().run(ask)
        finally:
            if self.fault is not None:
                del self.llm.llm_engine.step
        if self.fault is not None and self.fault["action"] == "lie":
            answer.output.outputs[0].token_ids = [0]
            answer = dataclasses.replace(answer)
        return answer

    def forget(self) -> None:
        """Empty the prefix cache."""
        assert self.llm.llm_engine.reset_prefix_cache()

    def act(self) -> None:
        """Do what the file says."""
        assert self.fault is not None
        action = self.fault["action"]
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "sleep":
            time.sleep(self.fault["seconds"])
        if action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if action == "memory":
            raise MemoryError("a test's memory is full")


def take_fault(rank: int, phase: str) -> dict[str, Any] | None:
    """The fault of this host and phase, which is then used up."""
    path = Path(os.environ[FAULT_FILE])
    if not path.exists():
        return None
    fault: dict[str, Any] = json.loads(path.read_text())
    if fault["rank"] != rank or fault["phase"] != phase:
        return None
    path.unlink()
    return fault


class FaultyStarLLM(StarLLM):
    """StarLLM on such hosts."""

    host_class = FaultyHost
