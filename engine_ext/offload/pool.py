"""Host memory for the pages of cold heads: slabs that the device can address."""

import contextlib
import ctypes
import os
import resource
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from farspan.engine_ext.errors import UnsupportedEngineError

GIB = 1 << 30
MAX_SLAB_BYTES = 64 * GIB
"""CUDA refuses to register much larger ones, and leaves an error pending."""
SLAB_BYTES = 8 * GIB
"""Slabs are filled with whole layers up to this size: one is registered while others are populated."""
LARGE_PAGE_BYTES = 2 << 20
"""Slabs begin on one. Pages that begin between the 128 bytes that a GPU reads at a time cost a sixth of the rate of the
bus: 42 GB/s instead of 51 (H200, PCIe 5, 64 bytes off; docs/decisions/offload.md)."""
MADV_HUGEPAGE, MADV_POPULATE_WRITE = 14, 23
"""Linux's numbers, the second from 5.14 on."""
POPULATED_BYTES = GIB // 4
"""Per call: whole large pages."""
MAX_THREADS = 16


@dataclass(frozen=True)
class HostPool:
    """Pages of all cold heads, one for every block."""

    layers: tuple[torch.Tensor, ...]
    """Per layer with cold heads: [num_cold_heads, num_blocks, page_size, 2 * head_dim], contiguous, on the CPU."""
    slabs: tuple[torch.Tensor, ...]
    """What the layers are views of; kept registered as long as they live."""

    @property
    def num_bytes(self) -> int:
        return sum(slab.numel() for slab in self.slabs)


def make_host_pool(
    heads_per_layer: Sequence[int],
    page_shape: tuple[int, int, int],
    dtype: torch.dtype,
    *,
    register: bool,
    progress: Callable[[float], None] = lambda share: None,
) -> HostPool:
    """Allocate the pages of layers with so many cold heads each.

    page_shape: (num_blocks, page_size, 2 * head_dim). register: make it known to CUDA, so that the device addresses it.
    progress: called after each slab that is registered with the share that is done.
    Raises UnsupportedEngineError where host memory cannot be allocated or registered.
    """
    page_bytes = page_shape[0] * page_shape[1] * page_shape[2] * dtype.itemsize
    layer_bytes = [heads * page_bytes for heads in heads_per_layer]
    layers: list[torch.Tensor] = []
    slabs: list[torch.Tensor] = []
    for members in slab_members(layer_bytes):
        slabs.append(make_slab(sum(layer_bytes[member] for member in members)))
        start = 0
        for member in members:
            part = slabs[-1][start : start + layer_bytes[member]]
            layers.append(part.view(dtype).view(heads_per_layer[member], *page_shape))
            start += layer_bytes[member]
    if register:
        register_slabs(slabs, progress)
    return HostPool(tuple(layers), tuple(slabs))


def slab_members(layer_bytes: Sequence[int]) -> list[list[int]]:
    """Which layers share a slab: neighbours, as many as SLAB_BYTES hold, at least one."""
    members: list[list[int]] = []
    filled = SLAB_BYTES
    for layer, num_bytes in enumerate(layer_bytes):
        if num_bytes > MAX_SLAB_BYTES:
            raise UnsupportedEngineError(
                f"offload: the cold heads of one layer take {num_bytes / GIB:.0f} GiB of host memory; farspan supports "
                f"{MAX_SLAB_BYTES // GIB}. Lower offload.host_memory, or raise --tensor-parallel-size."
            )
        if filled + num_bytes > SLAB_BYTES:
            members.append([])
            filled = 0
        members[-1].append(layer)
        filled += num_bytes
    return members


def make_slab(num_bytes: int) -> torch.Tensor:
    """[num_bytes] uint8 in host memory, from the start of a large page on. What is never touched takes no memory."""
    try:
        # Torch begins a little behind the start of a page.
        room = torch.empty(num_bytes + LARGE_PAGE_BYTES, dtype=torch.uint8)
    except RuntimeError as error:
        raise UnsupportedEngineError(
            f"offload: {num_bytes / GIB:.1f} GiB of host memory could not be allocated ({error}). Lower "
            "offload.host_memory."
        ) from error
    first = -room.data_ptr() % LARGE_PAGE_BYTES
    return room[first : first + num_bytes]


def register_slabs(slabs: Sequence[torch.Tensor], progress: Callable[[float], None]) -> None:
    """Populate all slabs, and register each, in their order, as soon as it is populated.

    Several slabs at once are registered no faster (docs/decisions/offload.md). Raises UnsupportedEngineError with the
    first that fails; what is not populated by then never is.
    """
    threads = ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), MAX_THREADS))
    try:
        parts = [populate(slab, threads) for slab in slabs]
        done = 0
        for slab, populated in zip(slabs, parts, strict=True):
            wait(populated)
            register_slab(slab)
            done += slab.numel()
            progress(done / sum(other.numel() for other in slabs))
    finally:
        threads.shutdown(cancel_futures=True)


def populate(slab: torch.Tensor, threads: ThreadPoolExecutor) -> list[Future[int]]:
    """Have threads ask the system for a slab's memory, in large pages where it has them.

    Otherwise registering finds it, one small page after another on one thread. What fails here is left to that.
    """
    page = resource.getpagesize()
    first = -(-slab.data_ptr() // page) * page
    end = (slab.data_ptr() + slab.numel()) // page * page
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    madvise(first, max(end - first, 0), MADV_HUGEPAGE)
    return [
        threads.submit(madvise, start, min(POPULATED_BYTES, end - start), MADV_POPULATE_WRITE)
        for start in range(first, end, POPULATED_BYTES)
    ]


def register_slab(slab: torch.Tensor) -> None:
    """Have CUDA address a slab until it dies."""
    cudart = torch.cuda.cudart()
    # 1: known to all contexts.
    failed = int(cudart.cudaHostRegister(slab.data_ptr(), slab.numel(), 1))
    if failed:
        # The error stays pending until some launch reports it: have one that nobody minds.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        limit = "unlimited" if soft == resource.RLIM_INFINITY else f"{soft / GIB:.2f} GiB"
        raise UnsupportedEngineError(
            f"offload: CUDA could not register {slab.numel() / GIB:.1f} GiB of host memory (error {failed}; the limit "
            f"on locked memory, ulimit -l, is {limit}). Lower offload.host_memory or raise the limit."
        )
    weakref.finalize(slab, cudart.cudaHostUnregister, slab.data_ptr())
    if device_address(slab.data_ptr()) != slab.data_ptr():
        raise UnsupportedEngineError(
            "offload: this GPU reaches registered host memory by other addresses than the host; farspan supports "
            "systems with one address space. Leave out offload."
        )


def device_address(host_address: int) -> int:
    """By which a GPU reaches registered host memory; 0 if by none."""
    address = ctypes.c_void_p()
    driver = ctypes.CDLL("libcuda.so.1")
    failed = driver.cuMemHostGetDevicePointer_v2(ctypes.byref(address), ctypes.c_void_p(host_address), 0)
    return 0 if failed else address.value or 0
