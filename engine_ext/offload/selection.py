"""Selective decode of cold heads: bounds of the pages in host memory, what the layers' choices kept, and an audit."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from farspan.engine_ext.launch import decode, is_on_host
from farspan.engine_ext.passes import DecodeRecord, LayerSelection
from farspan.engine_ext.plan import SelectionReport
from farspan.engine_ext.splits import num_multiprocessors, plan_splits
from farspan.kernels.batch import KVView, PagedBatch
from farspan.kernels.kv_gather import PagePools
from farspan.kernels.page_bounds import PageBounds, bound_pages, make_page_bounds
from farspan.kernels.page_choice import Rule, list_host_pages
from farspan.kernels.page_choice_reference import bound_pages_cpu
from farspan.kernels.selected_decode import SelectionBuffers, make_selection_buffers

AUDIT_EVERY = 64
"""Steps that decode. An audit reads the pages of one layer, as exact decode does in every layer."""


@dataclass(frozen=True)
class SelectionSizes:
    """What the buffers of selective decode are made for."""

    max_num_reqs: int
    max_pages: int
    """Of one request."""
    group_size: int
    """Query heads per KV head."""


class ColdSelection:
    """Selective decode of all layers of a rank. Nothing here is decided on the host, or waits for the device."""

    def __init__(
        self, rule: Rule, pools: PagePools, num_blocks: int, rows: Mapping[int, slice], sizes: SelectionSizes
    ) -> None:
        """Allocate bounds for all blocks.

        rows: of the pools, by the index of the layer.
        """
        self.rule, self.pools, self.rows = rule, pools, dict(rows)
        slots, self.device = pools.slots, pools.slots.device
        self.page_size, self.head_dim = slots.shape[2], slots.shape[3] // 2
        self.bounds: PageBounds = make_page_bounds(
            pools.num_rows, num_blocks, self.page_size, self.head_dim, slots.dtype, self.device
        )
        most_heads = max(each.stop - each.start for each in self.rows.values())
        self.buffers: SelectionBuffers = make_selection_buffers(
            sizes.max_num_reqs, most_heads, most_heads * sizes.group_size, sizes.max_pages, self.device
        )
        num_sms = num_multiprocessors(self.device)
        self.layers: dict[int, LayerSelection] = {}
        for index, each in self.rows.items():
            num_q_heads = (each.stop - each.start) * sizes.group_size
            shape = (sizes.max_num_reqs, num_q_heads, self.head_dim)
            record = DecodeRecord(
                torch.zeros(shape, dtype=slots.dtype, device=self.device),
                *torch.zeros(2, num_q_heads, sizes.max_num_reqs, dtype=torch.float32, device=self.device),
            )
            self.layers[index] = LayerSelection(self.bounds.of_rows(each), self.rule, self.buffers, record, num_sms)
        self.kv_lens = torch.zeros(sizes.max_num_reqs, dtype=torch.int32, device=self.device)
        self.max_kv_len = self.num_decodes = 0
        """Of the last step."""
        self.num_steps = 0
        """That decoded and were followed by another."""
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)
        """Rows audited, the shares that they kept and that was certain."""
        self.leasts = torch.ones(2, dtype=torch.float64, device=self.device)
        """Shares kept and certain, of the last audit's rows."""
        self.arrived = torch.zeros(7, dtype=torch.float64, pin_memory=self.device.type == "cuda")
        self.pending: tuple[torch.Tensor, torch.cuda.Event | None] | None = None
        """Numbers of the last audit on their way to the host."""

    @property
    def num_bytes(self) -> int:
        """On the device, but for the buffers and records."""
        return self.bounds.ends.numel() * self.bounds.ends.element_size() + self.bounds.cells.numel()

    def bound(self, blocks: torch.Tensor, slots: torch.Tensor) -> None:
        """Bound the pages that go to host memory, while they are in their slots; see `bound_pages`."""
        (bound_pages_cpu if is_on_host(blocks) else bound_pages)(self.pools, self.bounds, blocks, slots)

    def begin_step(self, entries: torch.Tensor, kv_lens: torch.Tensor, num_decodes: int, max_kv_len: int) -> None:
        """List the pages in host memory of a step's decoding requests, which are the first ones.

        entries: [num_reqs, max_pages] int32, where their pages lie; kv_lens: [num_reqs] int32.
        """
        self.num_decodes, self.max_kv_len = num_decodes, max_kv_len
        if num_decodes == 0:
            return
        self.kv_lens[:num_decodes].copy_(kv_lens[:num_decodes])
        choice = self.buffers.choice
        if is_on_host(entries):
            pages = -(-kv_lens[:num_decodes] // self.page_size)
            is_page = torch.arange(entries.shape[1]) < pages[:, None]
            choice.num_host[:num_decodes] = ((entries[:num_decodes] < 0) & is_page).sum(1)
            return
        list_host_pages(
            entries[:num_decodes], self.kv_lens[:num_decodes], self.page_size, choice.host_places, choice.num_host
        )

    def end_step(self, entries: torch.Tensor, view_of: Callable[[int], KVView]) -> None:
        """Audit one layer of the last step, if it is time; before anything of that step is written over.

        entries: as in `begin_step`. view_of: by a layer's index, its cold heads in both pools.
        """
        if self.num_decodes == 0:
            return
        if self.num_steps % AUDIT_EVERY == 0 and self.pending is None:
            indices = sorted(self.layers)
            index = indices[self.num_steps // AUDIT_EVERY % len(indices)]
            self.audit(self.layers[index].record, entries[: self.num_decodes], view_of(index))
        self.num_steps += 1
        self.num_decodes = 0

    def audit(self, record: DecodeRecord, entries: torch.Tensor, view: KVView) -> None:
        """Decode a layer's last queries over all pages, and hold what was kept and what was certain against that."""
        num_reqs = len(entries)
        starts = torch.arange(num_reqs + 1, dtype=torch.int32, device=self.device)
        batch = PagedBatch(starts, self.kv_lens[:num_reqs], entries, 1, self.max_kv_len)
        query = record.query[:num_reqs]
        lse, left = record.lse[:, :num_reqs], record.left[:, :num_reqs]
        exact = torch.empty_like(lse)
        splits = plan_splits(num_reqs, view.num_kv_heads, self.max_kv_len, num_multiprocessors(self.device))
        decode(query, view, batch, record.scale, splits, None, torch.empty_like(query), exact, None)
        # Requests without a page in host memory keep everything.
        is_row = (self.buffers.choice.num_host[:num_reqs] > 0).expand_as(lse)
        kept, sure = (lse - exact).double().exp().clamp(max=1), torch.sigmoid((lse - left).double())
        shares = torch.stack([torch.where(is_row, each, 0.0).sum() for each in (is_row.double(), kept, sure)])
        self.sums += shares
        self.leasts = torch.stack([torch.where(is_row, each, 1.0).amin() for each in (kept, sure)])
        numbers = torch.cat([self.sums, self.leasts, self.buffers.totals.double()])
        if is_on_host(numbers):
            self.pending = numbers, None
            return
        event = torch.cuda.Event()
        self.arrived.copy_(numbers, non_blocking=True)
        event.record()
        self.pending = self.arrived, event

    def report(self) -> SelectionReport | None:
        """The numbers of an audit, once, as soon as they have arrived."""
        if self.pending is None:
            return None
        numbers, event = self.pending
        if event is not None and not event.query():
            return None
        self.pending = None
        rows, kept, sure, least_kept, least_sure, read, host = numbers.tolist()
        page_bytes = self.page_size * 2 * self.head_dim * self.pools.slots.element_size()
        return SelectionReport(
            rows=int(rows),
            kept=kept,
            certified=sure,
            least_kept=least_kept,
            least_certified=least_sure,
            bytes_read=int(read) * page_bytes,
            bytes_on_host=int(host) * page_bytes,
        )

    def check_integrity(self, blocks: list[int], pages: torch.Tensor) -> None:
        """Raise AssertionError where bounds are not those of pages in host memory: [num_rows, num_blocks, page_size,
        2 * head_dim]; waits for the device.
        """
        keys = pages[..., : self.head_dim].float()
        ends = self.bounds.ends.transpose(0, 1)[:, blocks].cpu().float()
        found = torch.stack([keys.amin(-2), keys.amax(-2)], -2)
        # Pages that are not full may hold anything after their tokens.
        assert torch.equal(ends.nan_to_num(), found.nan_to_num()), "bounds are not those of the page on the host"
