"""How fast a GPU reads host memory, by the way in which the memory was got, and how long getting it takes.

For each kind of memory the pages of eight layers, 4 GiB: decode of all layers in one CUDA graph as the engine calls it,
with all pages there and with the newest in slots; the pages as prefill stages them; one large copy. `driver` is memory
that CUDA's driver makes, `registered` the process's own, populated in large pages and made known to CUDA, `-small` in
small pages; `pinned` is torch's, `-far` and `-near` are on one memory node each, where the machine has several.
"""

import ctypes
import mmap
import os
import resource
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import torch
from farspan.engine_ext.offload import pool
from farspan.engine_ext.splits import SplitPlan, num_multiprocessors, plan_splits
from farspan.kernels.batch import KVView
from farspan.kernels.decode import make_decode_workspace, paged_decode
from farspan.kernels.kv_gather import PagePools, host_offsets, stage_pages
from farspan.kernels.kv_gather_cpu import stage_pages_cpu

from benchmarks import calls
from benchmarks.inputs import LLAMA_8B, TINY, PagedBatch, make_paged_batch
from benchmarks.record import BenchmarkError, Recorder
from benchmarks.timing import Work, graph_of, synchronize, time_interleaved

LAYERS = 8
LENGTH = 131072
MAX_MODEL_LEN = 270336
SLOTS = 125
"""Pages in slots, as an engine of `benchmarks.offload` has."""
MADV_NOHUGEPAGE = 15
MPOL_DEFAULT, MPOL_BIND = 0, 2
SYS_SET_MEMPOLICY, SYS_MOVE_PAGES = 238, 279
NODES = Path("/sys/devices/system/node")


def cases(dry_run: bool) -> list[str]:
    """List the kinds of memory, the most important first."""
    if dry_run:
        return ["ordinary"]
    kinds = ["registered", "driver", "pinned", "registered-small", "registered-unpopulated", "hugetlb"]
    nodes = memory_nodes()
    if len(nodes) > 1:
        kinds += [f"{kind}-node{node}" for node in nodes for kind in ("driver", "registered")]
    return [*kinds, "driver-threads"]


def memory_nodes() -> list[int]:
    """Memory nodes of this machine that the process may use."""
    names = [each.name for each in NODES.glob("node*")] if NODES.is_dir() else []
    return sorted(int(name.removeprefix("node")) for name in names)


@contextmanager
def on_node(node: int | None) -> Iterator[None]:
    """Memory that this thread's calls get lies on one node."""
    if node is None:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    mask = ctypes.c_ulong(1 << node)
    if libc.syscall(SYS_SET_MEMPOLICY, MPOL_BIND, ctypes.byref(mask), 65):
        raise BenchmarkError(f"set_mempolicy: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        libc.syscall(SYS_SET_MEMPOLICY, MPOL_DEFAULT, None, 0)


def nodes_of(slab: torch.Tensor) -> dict[int, int]:
    """On which memory nodes some of a slab's pages lie: counts by node; negative numbers are errors of the system."""
    count = 256
    step = max(slab.numel() // count // 4096 * 4096, 4096)
    addresses = (ctypes.c_void_p * count)(*[slab.data_ptr() // 4096 * 4096 + place * step for place in range(count)])
    found = (ctypes.c_int * count)()
    if ctypes.CDLL(None).syscall(SYS_MOVE_PAGES, 0, count, addresses, None, found, 0):
        return {}
    return {node: list(found).count(node) for node in sorted(set(found))}


def large_pages_mib() -> int:
    """Of this process's memory, what lies in transparent large pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("AnonHugePages")), 0)


def registered(slab: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU, from now on known to CUDA."""
    failed = int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.numel(), 1))
    if failed:
        raise BenchmarkError(f"cudaHostRegister: error {failed}")
    return slab


def unmapped(num_bytes: int, flags: int = 0) -> torch.Tensor:
    """[num_bytes] uint8 that no page of memory has been found for."""
    return torch.frombuffer(mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | flags), dtype=torch.uint8)


def make(kind: str, num_bytes: int) -> tuple[torch.Tensor, Callable[[], object]]:
    """Memory of a kind, and what gives it back."""
    kind, _, node = kind.partition("-node")
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    with on_node(int(node) if node else None):
        if kind == "ordinary":
            return torch.empty(num_bytes, dtype=torch.uint8), lambda: None
        if kind == "driver":
            slab = pool.driver_slab(num_bytes)
            return slab, lambda: None
        if kind == "pinned":
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True), lambda: None
        slab = unmapped(num_bytes, 0x40000 if kind == "hugetlb" else 0)
        if kind == "registered" and not node:
            pool.populate(slab)
        elif kind == "registered":
            # The threads of `populate` would not have this thread's memory node.
            libc.madvise(slab.data_ptr(), num_bytes, pool.MADV_HUGEPAGE)
            libc.madvise(slab.data_ptr(), num_bytes, pool.MADV_POPULATE_WRITE)
        elif kind == "registered-small":
            libc.madvise(slab.data_ptr(), num_bytes, MADV_NOHUGEPAGE)
            libc.madvise(slab.data_ptr(), num_bytes, pool.MADV_POPULATE_WRITE)
        registered(slab)
        return slab, partial(torch.cuda.cudart().cudaHostUnregister, slab.data_ptr())


def decode(
    batch: PagedBatch, host: torch.Tensor, splits: SplitPlan, table: torch.Tensor
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """One layer's decode. table: [1, num_pages] int32, a page on the device or -1 - page; host: as `HostPages`."""
    shape = batch.shape
    workspace = make_decode_workspace(shape.num_q_heads * splits.num_splits, shape.head_dim, batch.query.device)
    out, lse = calls.empty_results(batch)
    kv, paged = KVView(batch.kv_cache, 0, host), replace(calls.paged_of(batch), block_table=table)
    return lambda: paged_decode(
        batch.query, kv, paged, shape.scale, num_splits=splits.num_splits, min_split_keys=splits.min_split_keys,
        out=out, lse=lse, workspace=workspace,
    )  # fmt: skip


def works_of(batch: PagedBatch, layers: list[torch.Tensor]) -> dict[str, tuple[list[Work], float]]:
    """What is timed, and the bytes that it reads of host memory. layers: [num_heads, num_pages, page_size, width]."""
    shape, device = batch.shape, batch.query.device
    num_pages = batch.block_table.shape[1]
    num_sms = num_multiprocessors(device)
    planned = plan_splits(1, shape.num_kv_heads, MAX_MODEL_LEN, num_sms)
    cold = -1 - batch.block_table
    newest = cold.clone()
    newest[:, -min(SLOTS, num_pages // 2) :] = batch.block_table[:, -min(SLOTS, num_pages // 2) :]
    in_order = -1 - torch.arange(num_pages, dtype=torch.int32, device=device)[None]
    layer_bytes = batch.kv_bytes
    some = layer_bytes * float((newest < 0).float().mean())
    views = [layer.transpose(0, 1) for layer in layers]

    def all_layers(table: torch.Tensor, splits: SplitPlan) -> list[Work]:
        return [decode(batch, host, splits, table) for host in views]

    works: dict[str, tuple[list[Work], float]] = {
        "decode": (all_layers(cold, planned), layer_bytes * len(layers)),
        "decode-newest-in-slots": (all_layers(newest, planned), some * len(layers)),
        "decode-in-order": (all_layers(in_order, planned), layer_bytes * len(layers)),
        "decode-one-layer": (all_layers(cold, planned)[:1], layer_bytes),
    }
    for num_splits in (4, 8, 33, 66):
        works[f"decode-{num_splits}splits"] = (
            all_layers(cold, replace(planned, num_splits=num_splits)),
            layer_bytes * len(layers),
        )
    slots = torch.empty(shape.num_kv_heads, 1, *layers[0].shape[2:], dtype=shape.dtype, device=device)
    staging = torch.empty(1, num_pages, *layers[0].shape[2:], dtype=shape.dtype, device=device)
    pools = PagePools(slots, (layers[0],), host_offsets(slots, (layers[0],)))
    stage = stage_pages_cpu if device.type == "cpu" else stage_pages
    staged: Work = partial(stage, pools, cold[0], slice(0, 1), staging, from_host=True)
    works["stage-one-head"] = [staged], layer_bytes / shape.num_kv_heads
    return works


def taken() -> tuple[int, int, int]:
    """Bytes that the system has free, that the process has taken at most, and that lie in large pages of it."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return psutil.virtual_memory().available, most, large_pages_mib() << 20


def tell_memory(
    recorder: Recorder, kind: str, slab: torch.Tensor, seconds: float, before: tuple[int, int, int]
) -> None:
    free, most, large = ((now - then) / 2**30 for now, then in zip(taken(), before, strict=True))
    recorder.note(
        f"{kind}: {slab.numel() / 2**30:.2f} GiB in {seconds:.2f} s; system {-free:.2f} GiB less, process {most:.2f} "
        f"GiB more, {large:.2f} in large pages, pages on nodes {nodes_of(slab)}"
    )


def make_in_threads(recorder: Recorder, num_bytes: int) -> None:
    """Whether several threads get memory of the driver's sooner than one."""
    device = torch.cuda.current_device()

    def make_one() -> torch.Tensor:
        torch.cuda.set_device(device)
        torch.zeros(1, device="cuda")
        return pool.driver_slab(num_bytes)

    started = time.perf_counter()
    with ThreadPoolExecutor(4) as threads:
        slabs = [each.result() for each in [threads.submit(make_one) for _ in range(4)]]
    seconds = time.perf_counter() - started
    recorder.note(f"driver, 4 threads: {sum(slab.numel() for slab in slabs) / 2**30:.0f} GiB in {seconds:.2f} s")


def run_kind(recorder: Recorder, kind: str, batch: PagedBatch) -> None:
    """Make memory of a kind, check a decode that reads it, and time all that does."""
    shape, device = batch.shape, batch.query.device
    layer_shape = (shape.num_kv_heads, len(batch.kv_cache), *batch.kv_cache.shape[2:])
    layer_bytes = batch.kv_cache.numel() * batch.kv_cache.element_size()
    num_layers = 2 if recorder.dry_run else LAYERS
    if kind == "driver-threads":
        make_in_threads(recorder, num_layers * layer_bytes)
        return
    before, started = taken(), time.perf_counter()
    slab, give_back = make(kind, num_layers * layer_bytes)
    tell_memory(recorder, kind, slab, time.perf_counter() - started, before)
    try:
        layers = list(slab.view(shape.dtype).view(num_layers, *layer_shape).unbind())
        for layer in layers:
            layer.copy_(batch.kv_cache.transpose(0, 1))
        synchronize()
        works = works_of(batch, layers)
        expected, _ = calls.decode(batch)()
        planned = plan_splits(1, shape.num_kv_heads, MAX_MODEL_LEN, num_multiprocessors(device))
        found, _ = decode(batch, layers[-1].transpose(0, 1), planned, -1 - batch.block_table)()
        error = float((found.float() - expected.float()).abs().max())
        if not error < 1e-2:
            raise BenchmarkError(f"{kind}: decode differs by {error}")
        target, source = torch.empty(layer_shape, dtype=shape.dtype, device=device), layers[0]
        graphs: dict[str, Work] = {name: graph_of(each)[0] for name, (each, _) in works.items()}
        graphs["copy"] = lambda: target.copy_(source, non_blocking=True)
        read = {name: num_bytes for name, (_, num_bytes) in works.items()} | {"copy": float(layer_bytes)}
        for name, samples in time_interleaved(graphs, repeats=3, warmup=1).items():
            rates = [read[name] / (ms * 1e-3) / 1e9 for ms in samples]
            middle = len(samples) // 2
            recorder.note(
                f"{kind} {name}: {sorted(samples)[middle]:.2f} ms, {sorted(rates)[middle]:.2f} GB/s "
                f"[{min(rates):.2f}, {max(rates):.2f}]"
            )
            if name in ("decode", "copy"):
                case = f"n{max(batch.seq_lens_cpu)}-b1-{shape.label}-{num_layers}layers"
                recorder.add("offload_decode", case, f"{name}-{kind}", "bandwidth", "GB/s", rates)
    finally:
        synchronize()
        give_back()


def run(recorder: Recorder) -> None:
    for path in (
        "/sys/kernel/mm/transparent_hugepage/enabled",
        "/sys/kernel/mm/transparent_hugepage/defrag",
        "/proc/version",
    ):
        recorder.note(f"{path}: {Path(path).read_text().strip() if Path(path).exists() else 'none'}")
    recorder.note(
        f"memory nodes {memory_nodes()}, {len(os.sched_getaffinity(0))} processors, "
        f"{psutil.virtual_memory().available / 2**30:.0f} GiB free"
    )
    for card in Path("/sys/bus/pci/devices").glob("*"):
        if (card / "class").exists() and (card / "class").read_text().startswith("0x0302"):
            recorder.note(f"GPU {card.name}: node {(card / 'numa_node').read_text().strip()}")
    dry_run = recorder.dry_run
    batch = make_paged_batch([1], [100 if dry_run else LENGTH], TINY if dry_run else LLAMA_8B)
    started = time.monotonic()
    for kind in cases(dry_run):
        try:
            run_kind(recorder, kind, batch)
        except Exception:  # the next kinds can still report
            recorder.note(f"{kind}: {traceback.format_exc()}")
        recorder.note(f"{time.monotonic() - started:.0f} s so far")
