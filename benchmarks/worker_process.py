"""A `python -m` process that answers over a pipe, for engines and kernels that must not share a process.

The process gets the file descriptor of a `multiprocessing` connection as its last argument, and ends when the other
side closes the connection.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Pipe
from types import TracebackType
from typing import Any, Self

from benchmarks.record import ROOT, BenchmarkError


class WorkerProcess:
    """One process, which lives as long as the context."""

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str], deadline: float
    ) -> None:
        """`name`: for errors; `deadline`: of `time.monotonic()`; waiting past it raises BenchmarkError."""
        self.name, self.module, self.arguments, self.environment = name, module, arguments, environment
        self.deadline = deadline

    def __enter__(self) -> Self:
        self.log = tempfile.TemporaryFile("w+")
        self.connection, theirs = Pipe()
        descriptor = theirs.fileno()
        command = [sys.executable, "-m", self.module, *self.arguments, str(descriptor)]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | self.environment,
            stdout=self.log,
            stderr=self.log,
            pass_fds=[descriptor],
        )
        theirs.close()
        return self

    def send(self, message: Any) -> None:
        with suppress(BrokenPipeError):  # `receive` says why the process is gone
            self.connection.send(message)

    def receive(self) -> Any:
        """Wait for the process's next message; BenchmarkError with the end of its log where it fails or is late."""
        try:
            if self.connection.poll(max(self.deadline - time.monotonic(), 0)):
                return self.connection.recv()
            reason = "did not answer in time"
        except (EOFError, ConnectionResetError):
            reason = f"ended with exit status {self.process.wait()}"
        self.log.seek(0)
        raise BenchmarkError(f"{self.name}: {reason}\n{self.log.read()[-4000:]}")

    def ask(self, message: Any) -> Any:
        """Send a message and wait for the answer."""
        self.send(message)
        return self.receive()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()  # the process ends when it reads that
        try:
            self.process.wait(0 if error else 30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
