"""Hosts that do what a test tells them by a file: die, sleep, fail, lose the network or lie, once."""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import torch
from farspan.star import StarLLM
from farspan.star.host import StarHost
from farspan.star.protocol import Answer, Ask, HostFacts

from tests.integration.conftest import make_engines_cheap

FAULT_FILE = "FARSPAN_TEST_FAULT"


class FaultyHost(StarHost):
    """A StarHost with at most one fault, at the second step of a phase."""

    connections: frozenset[int] = frozenset()
    """File descriptors of the connections to other hosts."""

    def start(self, address: str, port: int) -> HostFacts:
        """As StarHost's, without what only long-lived engines need."""
        make_engines_cheap()
        return super().start(address, port)

    def rejoin(self, address: str, port: int) -> None:
        """As StarHost's; remembers which connections it made."""
        before = connected()
        super().rejoin(address, port)
        self.connections = connected() - before

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

    def worker_pids(self) -> list[int]:
        """Of the processes of the host's ranks; none where the host is its only rank."""
        executor = self.ranks.executor
        return [] if executor is None else [worker.proc.pid for worker in executor.workers]

    def forget(self) -> None:
        """Empty the prefix cache."""
        assert self.llm.llm_engine.reset_prefix_cache()

    def pools(self) -> list[dict[str, int]]:
        """Check the tables and pools of cold heads, and tell of each rank what was moved so far."""
        self.llm.llm_engine.engine_core.engine_core.scheduler._residency.check_integrity()
        return [pages for pages in self.llm.collective_rpc(pages_moved) if pages]

    def act(self) -> None:
        """Do what the file says."""
        assert self.fault is not None
        action = self.fault["action"]
        if action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if action == "kill-rank":
            # The second GPU's process alone.
            os.kill(self.ranks.executor.workers[1].proc.pid, signal.SIGKILL)
        if action == "sleep":
            time.sleep(self.fault["seconds"])
        if action == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if action == "memory":
            raise MemoryError("a test's memory is full")
        if action == "fill":
            # More than any machine has: the allocator refuses, as it does when memory is full.
            torch.empty(1 << 50, dtype=torch.uint8)
        if action == "cut":
            for descriptor in self.connections:
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                    connection.shutdown(socket.SHUT_RDWR)


def pages_moved(worker: Any) -> dict[str, int]:
    """Of a worker's cold heads, which it checks."""
    from farspan.vllm_compat.runner import state_of

    cold = state_of(worker.model_runner).cold
    cold.check_integrity()
    return {"spilled": cold.num_spilled, "staged": cold.num_staged, "slots": cold.sizes.num_slots}


def connected() -> frozenset[int]:
    """File descriptors of this process's TCP connections."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
                    found.add(int(name))
    return frozenset(found)


def take_fault(rank: int, phase: str) -> dict[str, Any] | None:
    """The fault of this host and phase, which is then used up."""
    path = Path(os.environ[FAULT_FILE])
    try:
        fault: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:  # none, or just used up by its host
        return None
    if fault["rank"] != rank or fault["phase"] != phase:
        return None
    path.unlink()
    return fault


class FaultyStarLLM(StarLLM):
    """StarLLM on such hosts."""

    host_class = FaultyHost
