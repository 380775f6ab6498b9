"""Selective decode of one layer, all pages in host memory, in CUDA graphs, beside exact decode of the same pages.

A tenth of the pages of each KV head hold nearly all of its attention mass. `density` is the share of the pages that is
read, `coverage` the mass that they keep: as it is (`…-select`) and as the device certifies it (`…-select-certified`).
`farspan-offload-select-fits` has all pages on the device.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from farspan.engine_ext.splits import num_multiprocessors, plan_splits
from farspan.kernels.batch import KVView
from farspan.kernels.decode_workspace import make_decode_workspace
from farspan.kernels.kv_gather import PagePools, host_offsets
from farspan.kernels.page_bounds import bound_pages, make_page_bounds, weigh_pages
from farspan.kernels.page_choice import Rule, choose_pages, list_host_pages
from farspan.kernels.selected_decode import (
    SelectionBuffers,
    buffers_of,
    decode_chosen,
    make_selection_buffers,
    selected_decode,
)

from benchmarks import calls
from benchmarks.inputs import LLAMA_8B, TINY, AttentionShape, PagedBatch, make_paged_batch
from benchmarks.offload_decode import COLD, FITS, host_copy
from benchmarks.record import Recorder
from benchmarks.timing import time_graphs

SELECT = "farspan-offload-select"
HEAVY_SHARE = 0.1
HEAVY_LOGIT = 12.0
RULES = {SELECT: Rule(0.95), f"{SELECT}-bounds": Rule(0.9, by_bounds=True)}


def cases(dry_run: bool) -> list[tuple[int, ...]]:
    """List the lengths of the requests of one decode call."""
    return [(100,), (33, 64)] if dry_run else [(131072,) * count for count in (1, 4, 8)]


def plant(batch: PagedBatch) -> None:
    """Let a few keys of a tenth of the pages meet the queries of their KV head."""
    shape, group = batch.shape, batch.shape.num_q_heads // batch.shape.num_kv_heads
    for request, length in enumerate(batch.seq_lens_cpu):
        pages = batch.block_table[request, : length // shape.page_size].long()
        queries = batch.query[request].float().unflatten(0, (shape.num_kv_heads, group))
        direction = (queries / queries.norm(dim=-1, keepdim=True)).sum(1) * (HEAVY_LOGIT * shape.head_dim**0.5)
        direction /= queries.norm(dim=-1).mean(1, keepdim=True)
        for head in range(shape.num_kv_heads):
            heavy = pages[torch.randperm(len(pages), device=pages.device)[: max(int(len(pages) * HEAVY_SHARE), 1)]]
            batch.kv_cache[heavy, head, :4, : shape.head_dim] += direction[head].to(batch.kv_cache.dtype)


class Layer:
    """One layer's pages in host memory, or in slots, with their bounds."""

    def __init__(self, batch: PagedBatch, host: torch.Tensor, *, is_cold: bool) -> None:
        shape, device = batch.shape, batch.query.device
        self.batch, self.shape = batch, shape
        table = batch.block_table
        self.paged = replace(calls.paged_of(batch), block_table=-1 - table if is_cold else table)
        self.kv = KVView(batch.kv_cache, 0, host)
        num_pages = len(batch.kv_cache)
        self.bounds = make_page_bounds(
            shape.num_kv_heads, num_pages, shape.page_size, shape.head_dim, batch.kv_cache.dtype, device
        )
        slots, rows = batch.kv_cache.transpose(0, 1).contiguous(), host.transpose(0, 1)
        ids = torch.arange(num_pages, dtype=torch.int32, device=device)
        self.pools = PagePools(slots, (rows,), host_offsets(slots, (rows,)))
        self.ids = ids
        self.bound()
        num_reqs = len(batch.seq_lens_cpu)
        self.num_sms = num_multiprocessors(device)
        self.splits = plan_splits(num_reqs, shape.num_kv_heads, max(batch.seq_lens_cpu), self.num_sms)
        parts = num_reqs * shape.num_q_heads * 2 * self.splits.num_splits
        self.workspace = make_decode_workspace(parts, shape.head_dim, device)
        self.buffers = make_selection_buffers(num_reqs, shape.num_kv_heads, shape.num_q_heads, table.shape[1], device)
        self.left = torch.empty(shape.num_q_heads, num_reqs, device=device)
        self.list()

    def bound(self) -> None:
        bound_pages(self.pools, self.bounds, self.ids, self.ids)

    def list(self) -> None:
        choice = self.buffers.choice
        page_size = self.shape.page_size
        list_host_pages(self.paged.block_table, self.paged.kv_lens, page_size, choice.host_places, choice.num_host)

    def decode(self, rule: Rule, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        selected_decode(
            self.batch.query,
            self.kv,
            self.bounds,
            self.paged,
            self.shape.head_dim**-0.5,
            rule,
            self.buffers,
            num_splits=self.splits.num_splits,
            min_split_keys=self.splits.min_split_keys,
            out=out,
            lse=lse,
            left=self.left,
            workspace=self.workspace,
            num_sms=self.num_sms,
        )
        return out, lse

    def stages(self) -> dict[str, Callable[[], object]]:
        """The launches that are not decode's, alone."""
        num_reqs, shape = len(self.batch.seq_lens_cpu), self.shape
        used: SelectionBuffers = buffers_of(self.buffers, num_reqs, shape.num_kv_heads, shape.num_q_heads)
        splits = self.splits.num_splits
        outs, lses = self.workspace.parts(num_reqs, shape.num_q_heads, 2 * splits, shape.head_dim)
        choice, paged = used.choice, self.paged
        weigh = partial(
            weigh_pages, self.batch.query, self.bounds, paged.block_table, paged.kv_lens, choice.host_places,
            choice.num_host, shape.head_dim**-0.5, used.estimates, used.upper,
            num_programs=max(8 * self.num_sms // (shape.num_kv_heads * num_reqs), 1),
        )  # fmt: skip
        choose = partial(
            choose_pages, used.estimates, used.upper, lses[:splits], paged.block_table, paged.kv_lens, shape.page_size,
            Rule(0.95), choice, self.left, used.totals,
        )  # fmt: skip
        read = partial(
            decode_chosen, self.batch.query, self.kv, paged, shape.head_dim**-0.5, choice, outs[splits:], lses[splits:]
        )
        return {"list": self.list, "bound": self.bound, "weigh": weigh, "choose": choose, "read": read}


def run_case(recorder: Recorder, lens: tuple[int, ...], shape: AttentionShape) -> None:
    """Check what each rule keeps, then time it beside exact decode."""
    case = f"n{lens[0]}-b{len(lens)}-{shape.label}"
    batch = make_paged_batch([1] * len(lens), lens, shape)
    plant(batch)
    pool = host_copy(batch)
    host = pool.layers[0].transpose(0, 1)
    cold, fits = Layer(batch, host, is_cold=True), Layer(batch, host, is_cold=False)
    places = torch.arange(len(batch.kv_cache), device=batch.query.device)
    exact = calls.decode(batch, host_pages=calls.HostPages(host, places >= 0))
    exact_out, exact_lse = (each.clone() for each in exact())
    works: dict[str, Any] = {
        COLD: exact,
        FITS: calls.decode(batch, host_pages=calls.HostPages(host, places < 0)),
    }
    shares = {COLD: 1.0, FITS: 1.0}
    for name, rule in RULES.items():
        works[name] = partial(cold.decode, rule, *calls.empty_results(batch))
        cold.buffers.totals.zero_()
        out, lse = works[name]()
        kept, certified = (lse - exact_lse).exp(), torch.sigmoid(lse - cold.left)
        error = ((out - exact_out).float().norm() / exact_out.float().norm()).item()
        read, total = cold.buffers.totals.tolist()
        shares[name] = read / total
        recorder.note(
            f"{case} {name}: reads {read} of {total} pages; kept {kept.mean():.4f}, least {kept.min():.4f}; certified "
            f"{certified.mean():.4f}, least {certified.min():.4f}; relative change of the output {error:.3f}"
        )
        if not ((certified <= kept + 2e-3).all() and kept.min() >= rule.coverage - 0.03):
            raise AssertionError(f"{case} {name} does not keep what it promises")
        recorder.add("offload_decode", case, name, "density", "fraction", [shares[name]])
        recorder.add("offload_decode", case, name, "coverage", "fraction", kept.clamp(0, 1).flatten().tolist())
        sure = certified.clamp(0, 1).flatten().tolist()
        recorder.add("offload_decode", case, f"{name}-certified", "coverage", "fraction", sure)
    works[f"{SELECT}-fits"] = partial(fits.decode, RULES[SELECT], *calls.empty_results(batch))
    out, lse = works[f"{SELECT}-fits"]()
    recorder.note(f"{case} fits: largest difference of the LSE {(lse - exact_lse).abs().max():.1e}")
    times = time_graphs({name: [work] for name, work in works.items()}, repeats=10)
    for name, samples in times.items():
        recorder.add("offload_decode", case, name, "time", "ms", samples)
        if name in shares:
            rate = [shares[name] * batch.kv_bytes / (ms * 1e-3) / 1e9 for ms in samples]
            recorder.add("offload_decode", case, name, "bandwidth", "GB/s", rate)
    works[SELECT]()
    stages = time_graphs({name: [work] for name, work in cold.stages().items()}, repeats=10)
    for name, samples in stages.items():
        recorder.note(f"{case} {name}: {sorted(samples)[len(samples) // 2] * 1e3:.1f} us")


def run(recorder: Recorder) -> None:
    for lens in cases(recorder.dry_run):
        run_case(recorder, lens, TINY if recorder.dry_run else LLAMA_8B)
