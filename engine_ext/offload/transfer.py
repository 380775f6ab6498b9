"""Every copy of pages: moves between slots and host memory, and staging for prefill, one group of heads after another.

While attention of one group of heads runs, the next group's pages are fetched from host memory into the other of two
buffers, over the ends of layers too. Pages in slots are copied last, after the layer's own keys are written: a page
that a step writes is always in a slot, so what is fetched early never changes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from farspan.engine_ext.launch import is_on_host
from farspan.engine_ext.passes import StagedPages
from farspan.kernels.batch import KVView
from farspan.kernels.kv_gather import PagePools, move_pages, stage_pages
from farspan.kernels.kv_gather_cpu import move_pages_cpu, stage_pages_cpu


def move(pools: PagePools, blocks: torch.Tensor, slots: torch.Tensor, *, to_host: bool) -> None:
    """`move_pages` on the device of the pools."""
    if is_on_host(pools.slots):
        move_pages_cpu(pools, blocks, slots, to_host=to_host)
    else:
        move_pages(pools, blocks, slots, to_host=to_host)


class Copier:
    """Copies pages to the host on a stream of its own, beside the forward of a step that does not write them."""

    def __init__(self, pools: PagePools) -> None:
        self.pools = pools
        self.stream = None if is_on_host(pools.slots) else torch.cuda.Stream(pools.slots.device)
        self.held: tuple[torch.Tensor, ...] = ()
        """What the stream still reads."""

    def copy(self, blocks: torch.Tensor, slots: torch.Tensor) -> None:
        """Begin after all that the current stream has been given; see `move_pages`."""
        if self.stream is None:
            move_pages_cpu(self.pools, blocks, slots, to_host=True)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.pools.slots.device))
        self.held = (blocks, slots)
        with torch.cuda.stream(self.stream):
            move_pages(self.pools, blocks, slots, to_host=True, is_alone=False)

    def wait(self) -> None:
        """Let the current stream wait until the copies have ended."""
        if self.stream is not None and self.held:
            torch.cuda.current_stream(self.pools.slots.device).wait_stream(self.stream)
            self.held = ()


@dataclass(frozen=True)
class Job:
    """One group of heads of one layer, and the pages of one pass."""

    layer: str
    staged: StagedPages
    rows: slice
    """Of the pools."""
    kv_heads: slice
    """Of the layer."""


class Staging:
    """Two buffers for the pages of a group of heads, and the stream that fills them."""

    def __init__(self, pools: PagePools, group_size: int, num_pages: int) -> None:
        """group_size, num_pages: KV heads and pages of each; a larger group has room for fewer pages."""
        self.pools = pools
        self.group_size = group_size
        self.num_pages = num_pages
        shape = (2, group_size * num_pages, *pools.slots.shape[2:])
        self.buffers = torch.zeros(shape, dtype=pools.slots.dtype, device=pools.slots.device)
        self.on_host = is_on_host(pools.slots)
        self.stream = None if self.on_host else torch.cuda.Stream(pools.slots.device)
        self.filled = [] if self.on_host else [torch.cuda.Event() for _ in range(2)]
        self.turn: StagedTurn | None = None
        """Whose pages are in the buffers."""

    def room(self, staged: StagedPages, buffer: int) -> torch.Tensor:
        """[group_size, at least num_pages, page_size, 2 * head_dim]: one of the buffers for a group of heads."""
        group_size = staged.group_size or self.group_size
        num_pages = self.buffers.shape[1] // group_size
        return self.buffers[buffer, : group_size * num_pages].unflatten(0, (group_size, num_pages))

    def fetch(self, job: Job, buffer: int) -> None:
        """Begin to copy a job's pages in host memory, after all that the current stream has been given."""
        target = self.room(job.staged, buffer)
        if self.stream is None:
            stage_pages_cpu(self.pools, job.staged.entries, job.rows, target, from_host=True)
            return
        self.stream.wait_stream(torch.cuda.current_stream(target.device))
        with torch.cuda.stream(self.stream):
            stage_pages(self.pools, job.staged.entries, job.rows, target, from_host=True)
            self.filled[buffer].record(self.stream)

    def finish(self, job: Job, buffer: int) -> KVView:
        """Copy the job's pages in slots and wait, on the current stream, for those that were fetched."""
        target = self.room(job.staged, buffer)
        if self.stream is None:
            stage_pages_cpu(self.pools, job.staged.entries, job.rows, target, from_host=False)
        else:
            stage_pages(self.pools, job.staged.entries, job.rows, target, from_host=False)
            self.filled[buffer].wait(torch.cuda.current_stream(target.device))
        num_heads = job.rows.stop - job.rows.start
        return KVView(target[:num_heads].transpose(0, 1), job.kv_heads.start, are_adjacent=job.staged.are_of_one)


class StagedTurn:
    """The staging of one step: jobs in the order in which the layers ask for them."""

    def __init__(self, staging: Staging, jobs: Sequence[Job], *, is_alone: bool) -> None:
        """Take the jobs of a step.

        is_alone: whether no other group of layers stages in the same step, so that the job after a layer's last one is
        known. The first one is then fetched now, beside the layers before its attention.
        """
        self.staging = staging
        self.jobs = {(job.layer, id(job.staged), job.kv_heads.start): place for place, job in enumerate(jobs)}
        self.order = list(jobs)
        self.is_alone = is_alone
        self.fetched = 0
        """Jobs [0, fetched) have been fetched, or are not to be."""
        if is_alone:
            self.begin(0)
            self.fetch_next()

    def begin(self, place: int) -> None:
        """Take over the buffers, for the jobs from `place` on."""
        self.staging.turn = self
        self.fetched = place

    def fetch_next(self) -> None:
        self.staging.fetch(self.order[self.fetched], self.fetched % 2)
        self.fetched += 1

    def take(self, layer: str, staged: StagedPages, kv_heads: slice) -> KVView:
        """The keys and values of a group of heads for attention on the current stream, until the next call."""
        staging, place = self.staging, self.jobs[layer, id(staged), kv_heads.start]
        if staging.turn is not self or not place < self.fetched <= place + 2:
            self.begin(place)
        # The buffer of the job before this one is free again: its attention has been given to the current stream.
        while self.fetched <= min(place + 1, len(self.order) - 1):
            if self.order[self.fetched].layer != layer and not self.is_alone:
                break
            self.fetch_next()
        return staging.finish(self.order[place], place % 2)
