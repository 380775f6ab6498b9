"""How long offload's host memory takes when an engine starts: prints, writes no rows.

`python -m benchmarks.tune_host_pool [GiB]`: with slabs one after the other, then with all populated at once and so many
threads that register them.
"""

import os
import sys
import time

import psutil
import torch
from farspan.engine_ext.offload import pool

NUM_SLABS = 12


def timed(name: str, gib: int, threads: int, *, one_by_one: bool = False) -> None:
    """Make, register and free a pool of as many GiB."""
    pool.REGISTERING_THREADS = threads
    slabs = [pool.make_slab(gib * pool.GIB // NUM_SLABS) for _ in range(NUM_SLABS)]
    start = time.perf_counter()
    for each in [[slab] for slab in slabs] if one_by_one else [slabs]:
        pool.register_slabs(each, lambda share: None)
    registered = time.perf_counter()
    slabs.clear()
    freed = time.perf_counter() - registered
    taken = registered - start
    print(f"{name}: {gib} GiB in {taken:.2f} s, {taken / gib * 1000:.0f} ms a GiB; freed in {freed:.2f} s", flush=True)


def main() -> None:
    """Print the times, most important first."""
    gib = int(sys.argv[1]) if len(sys.argv) > 1 else 48
    free = psutil.virtual_memory().available / pool.GIB
    print(f"{os.cpu_count()} processors, {free:.0f} GiB free, torch {torch.__version__}", flush=True)
    torch.zeros(1, device="cuda")
    timed("slab after slab", gib, 1, one_by_one=True)
    for threads in (4, 1):
        timed(f"populated at once, {threads} threads register", gib, threads)
    for threads in (2, 8):
        timed(f"populated at once, {threads} threads register", gib // 2, threads)


if __name__ == "__main__":
    main()
