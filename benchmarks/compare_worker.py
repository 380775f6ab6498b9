"""The process that `benchmarks.compare_revisions` starts per revision: it prepares kernel cases and times them.

Arguments: the path of the revision's adapter, a module like `benchmarks.calls`, and the connection's file descriptor.
It answers a KernelCase with some rows of the case's result, or None where this machine cannot compute it, and TIME_ONCE
with the milliseconds of one call of the last case.
"""

import importlib.util
import sys
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import torch

from benchmarks.compare_cases import TIME_ONCE, KernelCase
from benchmarks.inputs import PagedBatch, make_calibrated_batch, make_paged_batch
from benchmarks.timing import FLUSH_BYTES, Work, graph_of, wall_ms

# The copies of the inputs in a graph are together larger than this, so that none is found in the L2 cache.
COLD_BYTES = 256 * 2**20
MAX_COPIES = 16
WARMUP = 3
SAMPLED_ROWS = 64


def load_adapter(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("revision_adapter", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_batch(case: KernelCase, seed: int) -> PagedBatch:
    if case.gamma is not None:
        return make_calibrated_batch(case.query_lens[0], case.seq_lens[0], case.shape, seed=seed)
    return make_paged_batch(case.query_lens, case.seq_lens, case.shape, seed=seed)


class PreparedCase:
    """A case with its inputs and compiled kernels."""

    def __init__(self, adapter: ModuleType, case: KernelCase) -> None:
        self.num_calls = 1
        self.flush: torch.Tensor | None = None
        build = getattr(adapter, case.kernel)
        arguments = () if case.gamma is None else (case.gamma,)
        first = make_batch(case, 0)
        call = build(first, *arguments)
        self.result: Any = None
        self.work: Work | None = call
        if call is None:
            return
        out = call()
        self.result = sampled(out[0] if isinstance(out, tuple) else out)
        if case.in_graph:
            copies = min(-(-COLD_BYTES // first.kv_bytes), MAX_COPIES) if torch.cuda.is_available() else 1
            others = [build(make_batch(case, seed), *arguments) for seed in range(1, copies)]
            self.work, self.num_calls = graph_of([call, *others])
        elif torch.cuda.is_available():
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
        for _ in range(WARMUP if torch.cuda.is_available() else 0):
            self.work()

    def time_once(self) -> float:
        """Milliseconds of one call on the device, with a cold L2 cache."""
        assert self.work is not None
        if not torch.cuda.is_available():
            return wall_ms(self.work) / self.num_calls
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if self.flush is not None:
            self.flush.zero_()
        start.record()
        self.work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / self.num_calls


def sampled(out: torch.Tensor) -> Any:
    """Some rows of a result, the same for every revision: a float32 array."""
    rows = torch.linspace(0, len(out) - 1, min(SAMPLED_ROWS, len(out)), dtype=torch.float64).round().long()
    return out[rows.to(out.device)].float().cpu().numpy()


def main() -> None:
    adapter = load_adapter(sys.argv[1])
    connection: Connection[Any, Any] = Connection(int(sys.argv[2]))
    prepared: PreparedCase | None = None
    while True:
        try:
            message = connection.recv()
        except EOFError:
            break
        if message == TIME_ONCE:
            assert prepared is not None
            connection.send(prepared.time_once())
        else:
            prepared = None  # frees its memory before the next case allocates more
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            prepared = PreparedCase(adapter, message)
            connection.send(prepared.result)


if __name__ == "__main__":
    main()
