"""vLLM's executor of several processes, for a Star host: they meet other hosts' before capture, and end with theirs."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from vllm.v1.executor.multiproc_executor import MultiprocExecutor

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl."""


class HostExecutor(MultiprocExecutor):
    """Worker processes that meet those of other hosts before vLLM uses them."""

    prepare: ClassVar[Callable[["HostExecutor"], None] | None] = None
    """Called with the started executor; set by `preparing`."""

    def _init_executor(self) -> None:
        super()._init_executor()
        try:
            self.collective_rpc(end_with_parent, args=(os.getpid(),))
            prepare = type(self).prepare
            if prepare is not None:
                prepare(self)
        except BaseException:
            self.shutdown()
            raise


@contextlib.contextmanager
def preparing(prepare: Callable[[HostExecutor], None]) -> Iterator[type[HostExecutor]]:
    """The class of executors that call `prepare`, while they do."""
    HostExecutor.prepare = prepare
    try:
        yield HostExecutor
    finally:
        HostExecutor.prepare = None


def end_with_parent(worker: Any, parent: int) -> None:
    """Let the system kill this process when its parent ends, however it ends and whatever this process waits for.

    vLLM's workers notice too, but only between two calls, and one that waits in a collective for a rank that is gone
    would keep its GPU's memory.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
