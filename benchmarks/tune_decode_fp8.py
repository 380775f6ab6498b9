"""Times of decode on fp8 pages by keys a step, stages and warps: `python -m benchmarks.tune_decode_fp8`."""

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

from farspan.kernels import decode
from farspan.kernels.batch import FP8

from benchmarks import calls
from benchmarks.decode_fp8 import Case, make_batch
from benchmarks.timing import time_graphs


class Changed:
    """The kernel with other options."""

    def __init__(self, kernel: Any, **options: Any) -> None:
        self.kernel, self.options = kernel, options

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.kernel[grid](*args, **(kwargs | self.options))


def changed(call: Callable[[], object], keys: int, stages: int, warps: int) -> Callable[[], object]:
    """The call with so many keys a step, stages and warps."""
    kernel, keys_per_step = decode._decode_kernel, decode.keys_per_step
    other: Any = Changed(kernel, NUM_STAGES=stages, num_warps=warps)

    def work() -> object:
        decode._decode_kernel, decode.keys_per_step = other, lambda kv: keys
        try:
            return call()
        finally:
            decode._decode_kernel, decode.keys_per_step = kernel, keys_per_step

    return work


def main() -> None:
    for num_reqs, seq_len in ((8, 32768), (1, 131072), (32, 8192)):
        batch = make_batch(Case(num_reqs, seq_len), 1, 0)
        in_fp8 = calls.decode(replace(batch, kv_cache=batch.kv_cache.to(FP8)))
        works: dict[str, list[Any]] = {"bf16": [calls.decode(batch)]}
        for keys, stages, warps in product((64, 128), (2, 3, 4), (4, 8)):
            work = changed(in_fp8, keys, stages, warps)
            try:
                work()
            except Exception as problem:  # too much shared memory
                print(keys, stages, warps, problem)
                continue
            works[f"fp8 keys {keys} stages {stages} warps {warps}"] = [work]
        for name, samples in time_graphs(works, repeats=15).items():
            ms = sorted(samples)[len(samples) // 2]
            bandwidth = batch.kv_bytes / (2 if name.startswith("fp8") else 1) / (ms * 1e-3) / 1e12
            print(f"{num_reqs} x {seq_len} {name}: {1000 * ms:.1f} us, {bandwidth:.2f} TB/s", flush=True)


if __name__ == "__main__":
    main()
