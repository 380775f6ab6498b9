"""Decode of one layer from host memory, in CUDA graphs: pages in HBM, in host memory, and half in each.

`farspan` is the kernel that knows one pool, `farspan-offload` the one that reads both, all pages on the device. Host
memory is the engine's; `farspan-offload-cold-pinned` reads memory that torch has pinned, `-unaligned` the engine's from
64 bytes behind the start of a page on. `copy` is one large copy of the same bytes to the device. `benchmarks.offload`
has whole engines.
"""

from typing import Any

import torch
from farspan.engine_ext.offload.pool import HostPool, make_host_pool

from benchmarks import calls
from benchmarks.gate import check_attention
from benchmarks.inputs import LLAMA_8B, TINY, AttentionShape, PagedBatch, make_paged_batch
from benchmarks.record import Recorder
from benchmarks.timing import time_graphs, time_interleaved

UNALIGNED_BYTES = 64
"""Where torch's own memory begins behind the start of a page."""
OFF, FITS, COLD = "farspan", "farspan-offload", "farspan-offload-cold"


def cases(dry_run: bool) -> list[tuple[int, ...]]:
    """List the lengths of the requests of one decode call."""
    return [(100,), (17, 64)] if dry_run else [(8192,), (131072,), (32768,) * 8]


def host_copy(batch: PagedBatch) -> HostPool:
    """The batch's pages in host memory as the engine has it, each head's in a row."""
    num_pages, num_heads, page_size, width = batch.kv_cache.shape
    shape = (num_pages, page_size, width)
    made = make_host_pool([num_heads], shape, batch.kv_cache.dtype, register=torch.cuda.is_available())
    made.layers[0].copy_(batch.kv_cache.transpose(0, 1))
    return made


def pinned_copy(host: torch.Tensor) -> torch.Tensor:
    """The same in memory that torch has pinned."""
    flat = host.transpose(0, 1).clone()
    return (flat.pin_memory() if torch.cuda.is_available() else flat).transpose(0, 1)


def unaligned_copy(host: torch.Tensor) -> tuple[HostPool, torch.Tensor]:
    """The same in registered memory, its pages between the lines that the device reads, and what must outlive it."""
    num_pages, num_heads, page_size, width = host.shape
    shape = (num_pages + 1, page_size, width)
    made = make_host_pool([num_heads], shape, host.dtype, register=torch.cuda.is_available())
    first = UNALIGNED_BYTES // host.element_size()
    flat = made.layers[0].flatten()[first : first + host.numel()].view(num_heads, num_pages, page_size, width)
    return made, flat.copy_(host.transpose(0, 1)).transpose(0, 1)


def run_case(recorder: Recorder, lens: tuple[int, ...], shape: AttentionShape) -> None:
    """Time one layer's decode calls after checking each."""
    case = f"n{lens[0]}-b{len(lens)}-{shape.label}"
    batch = make_paged_batch([1] * len(lens), lens, shape)
    pool = host_copy(batch)
    host = pool.layers[0].transpose(0, 1)
    wider_pool, unaligned = unaligned_copy(host)
    device = batch.query.device
    places = torch.arange(len(batch.kv_cache), device=device)
    works: dict[str, Any] = {
        OFF: calls.decode(batch),
        FITS: calls.decode(batch, host_pages=calls.HostPages(host, places < 0)),
        f"{COLD}-half": calls.decode(batch, host_pages=calls.HostPages(host, places % 2 == 0)),
        COLD: calls.decode(batch, host_pages=calls.HostPages(host, places >= 0)),
        f"{COLD}-pinned": calls.decode(batch, host_pages=calls.HostPages(pinned_copy(host), places >= 0)),
        f"{COLD}-unaligned": calls.decode(batch, host_pages=calls.HostPages(unaligned, places >= 0)),
    }
    for name, work in works.items():
        recorder.note(f"{case} {name}: relative error {check_attention(batch, *work(), name=name):.1e}")
    times = time_graphs({name: [work] for name, work in works.items()}, repeats=10)
    flat, target = host.transpose(0, 1), torch.empty_like(host.transpose(0, 1), device=device)
    times |= time_interleaved({"copy": lambda: target.copy_(flat, non_blocking=True)}, repeats=5)
    for name, samples in times.items():
        recorder.add("offload_decode", case, name, "time", "ms", samples)
        recorder.add(
            "offload_decode", case, name, "bandwidth", "GB/s", [batch.kv_bytes / (ms * 1e-3) / 1e9 for ms in samples]
        )
    del pool, wider_pool


def run(recorder: Recorder) -> None:
    for lens in cases(recorder.dry_run):
        run_case(recorder, lens, TINY if recorder.dry_run else LLAMA_8B)
