"""Timing on the device: CUDA events, a cold L2 cache, interleaved variants, CUDA graphs for fast kernels.

Without a GPU every function runs its workload once and returns wall-clock times, which only serve dry runs.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Work = Callable[[], object]

# More than the L2 cache of any GPU (H100 50 MB, H200 60 MB, B200 126 MB).
FLUSH_BYTES = 256 * 2**20


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall_ms(work: Work) -> float:
    """Milliseconds of one call on the host's clock, the device's work included."""
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return (time.perf_counter() - start) * 1e3


def time_interleaved(
    variants: Mapping[str, Work], *, repeats: int = 20, warmup: int = 3, repeats_of: Mapping[str, int] | None = None
) -> dict[str, list[float]]:
    """Time each variant `repeats` times in turn, so that clocks and heat are the same for all.

    The order is drawn anew in every turn: at the power limit a call runs about 5 % faster after one that drew less.
    repeats_of: fewer repeats for slow variants, by name; they also get only one warm-up call.
    Before every call the L2 cache is overwritten, which also hides the time of the launch.
    Returns milliseconds per variant.
    """
    counts = {name: (repeats_of or {}).get(name, repeats) for name in variants}
    if not torch.cuda.is_available():
        return {name: [wall_ms(work)] for name, work in variants.items()}
    for name, work in variants.items():
        for _ in range(1 if counts[name] < repeats else warmup):
            work()
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in variants}
    shuffled = random.Random(0)
    for turn in range(max(counts.values(), default=0)):
        names = [name for name in variants if turn < counts[name]]
        for name in shuffled.sample(names, len(names)):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            variants[name]()
            end.record()
            events[name].append((start, end))
        torch.cuda.synchronize()
    return {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}


def graph_of(works: Sequence[Work]) -> tuple[Work, int]:
    """Capture a CUDA graph that runs all of `works` in order.

    With one work per copy of the inputs, and copies that together are larger than the L2 cache, a replay reads cold
    memory and needs no flush. Returns the replay and the number of works in it; without a GPU, a plain loop.
    """
    if not torch.cuda.is_available():
        return (lambda: [work() for work in works]), len(works)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for work in works:
            work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for work in works:
            work()
    return graph.replay, len(works)


def time_graphs(
    variants: Mapping[str, Sequence[Work]], *, repeats: int = 30, warmup: int = 3
) -> dict[str, list[float]]:
    """Time CUDA graphs of each variant's works, interleaved; milliseconds for one work, per variant."""
    graphs = {name: graph_of(works) for name, works in variants.items()}
    times = time_interleaved({name: replay for name, (replay, _) in graphs.items()}, repeats=repeats, warmup=warmup)
    return {name: [sample / graphs[name][1] for sample in samples] for name, samples in times.items()}
