"""How long offload's host memory takes when an engine starts: prints, writes no rows.

`python -m benchmarks.tune_host_pool [GiB]`: slabs one after the other, and as the engine makes them.
"""

import os
import sys
import time

import psutil
import torch
from farspan.engine_ext.offload import pool

NUM_SLABS = 12


def timed(name: str, gib: int, *, one_by_one: bool) -> None:
    """Make, register and free a pool of as many GiB."""
    slabs = [pool.make_slab(gib * pool.GIB // NUM_SLABS) for _ in range(NUM_SLABS)]
    start = time.perf_counter()
    at_once = 1 if one_by_one else NUM_SLABS
    for first in range(0, NUM_SLABS, at_once):
        pool.register_slabs(slabs[first : first + at_once], lambda share: None)
    registered = time.perf_counter()
    slabs.clear()
    freed = time.perf_counter() - registered
    taken = registered - start
    print(f"{name}: {gib} GiB in {taken:.2f} s, {taken / gib * 1000:.0f} ms a GiB; freed in {freed:.2f} s", flush=True)


def main() -> None:
    """Print the times."""
    gib = int(sys.argv[1]) if len(sys.argv) > 1 else 48
    free = psutil.virtual_memory().available / pool.GIB
    print(f"{os.cpu_count()} processors, {free:.0f} GiB free, torch {torch.__version__}", flush=True)
    torch.zeros(1, device="cuda")
    timed("slab after slab", gib, one_by_one=True)
    timed("populated at once", gib, one_by_one=False)


if __name__ == "__main__":
    main()
