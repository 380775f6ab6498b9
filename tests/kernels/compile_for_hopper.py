"""Compile kernels for Hopper without a GPU; prints their registers and stack bytes as JSON. Run by `test_compiled`.

It needs a separate process: the other tests run kernels in Triton's interpreter, which compiles nothing.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from farspan.kernels import prefill as paged_prefill
from farspan.kernels import static_block_lists
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.contiguous import attention as contiguous
from farspan.kernels.contiguous import short_lists
from farspan.kernels.tiles import BlockLists, make_prefill_tiles
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
HOPPER = 90


class AbsentHopper(DriverBase):
    """A driver with what Triton asks for before it launches anything."""

    def __init__(self) -> None:
        pass

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", HOPPER, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, name: str) -> str:
        return name

    def get_benchmarker(self) -> None:
        return None


def compiled(kernel: Any, call: Callable[[], object]) -> dict[str, int]:
    """Registers and bytes of stack, per thread, of the kernel that `call` would launch."""
    run, results = kernel.run, []
    kernel.run = lambda *args, **kwargs: results.append(run(*args, **(kwargs | {"warmup": True})))
    try:
        call()
    finally:
        kernel.run = run
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(results[0].asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return {"registers": int(found[1]), "stack": int(found[2])}


def prefill_over_lists() -> None:
    """Launch prefill of 1,024 tokens with heads of 128 on pages of 128 tokens, with one list per query head."""
    query = torch.empty(1024, 32, 128, dtype=torch.bfloat16)
    tiles = make_prefill_tiles([0, 1024], [1024], 128, query.device)
    paged_prefill.paged_prefill(
        query,
        KVView(torch.empty(16, 8, 128, 256, dtype=torch.bfloat16)),
        PagedBatch(
            torch.tensor([0, 1024], dtype=torch.int32),
            torch.tensor([1024], dtype=torch.int32),
            torch.zeros(1, 16, dtype=torch.int32),
            max_query_len=1024,
            max_kv_len=1024,
        ),
        tiles=tiles,
        scale=0.1,
        block_lists=BlockLists(
            torch.zeros(32, tiles.num_tiles, 16, dtype=torch.int32), torch.ones(32, tiles.num_tiles, dtype=torch.int32)
        ),
    )


def main() -> None:
    triton.runtime.driver.set_active(AbsentHopper())
    for module in (paged_prefill, short_lists):
        module.device_capability = lambda device: (HOPPER // 10, HOPPER % 10)
    kernel = paged_prefill.prefill_kernel
    q = torch.empty(2, 1024, 8, 64, dtype=torch.float16)
    lists = static_block_lists(
        contiguous.attention_tiles(2, 1024, 1024, device=q.device), "sink_local", sink_blocks=0, local_blocks=3
    )
    print(
        json.dumps(
            {
                "dense-d64": compiled(kernel, lambda: contiguous.attention(q, q, q)),
                "lists-d128": compiled(kernel, prefill_over_lists),
                "short-lists-d64": compiled(
                    short_lists._short_list_kernel, lambda: contiguous.attention(q, q, q, block_mask=lists)
                ),
            }
        )
    )


if __name__ == "__main__":
    main()
