"""The cold heads of one rank: pools, table and staging, carried from step to step by the scheduler's plans."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import torch
from farspan.engine_ext.launch import is_on_host, write_kv
from farspan.engine_ext.offload.pool import HostPool
from farspan.engine_ext.offload.selection import ColdSelection, SelectionSizes
from farspan.engine_ext.offload.slots import SlotTable
from farspan.engine_ext.offload.transfer import Copier, Job, StagedTurn, Staging, move
from farspan.engine_ext.passes import Pass, StagedPages
from farspan.engine_ext.plan import OffloadSizes, ResidencyPlan
from farspan.kernels.batch import KVView
from farspan.kernels.kv_gather import PagePools, host_offsets, map_step
from farspan.kernels.kv_gather_cpu import map_step_cpu
from farspan.kernels.page_choice import Rule
from farspan.kernels.tiles import to_device


@dataclass(frozen=True)
class ColdLayer:
    """The cold heads of one layer."""

    first_row: int
    """Of the pools."""
    place: int
    """Of the layer in the host pool."""
    hot_heads: int
    """KV heads before the cold ones; vLLM's own cache holds them."""
    num_kv_heads: int

    @property
    def num_cold_heads(self) -> int:
        return self.num_kv_heads - self.hot_heads

    @property
    def rows(self) -> slice:
        return slice(self.first_row, self.first_row + self.num_cold_heads)


@dataclass(frozen=True)
class CacheStep:
    """One step of a cache's layers (`passes.ColdStep`)."""

    cache: "ColdCache"
    num_tokens: int
    """Of the batch, padding included."""
    turn: StagedTurn | None
    """None where no pass is staged."""

    def kv_heads(self, layer_name: str) -> slice:
        """See `passes.ColdStep`."""
        layer = self.cache.layers[layer_name]
        return slice(layer.hot_heads, layer.num_kv_heads)

    def write(self, layer_name: str, key: torch.Tensor, value: torch.Tensor, **scales: float) -> None:
        """See `passes.ColdStep`."""
        slots = self.cache.slots_of(self.cache.layers[layer_name])
        write_kv(key, value, slots, self.cache.slot_mapping[: self.num_tokens], **scales)

    def view(self, layer_name: str, each: Pass) -> KVView:
        """See `passes.ColdStep`."""
        if isinstance(each.keys, StagedPages):
            assert self.turn is not None
            return self.turn.take(layer_name, each.keys, each.kv_heads)
        return self.cache.view_of(self.cache.layers[layer_name], both=each.keys == "both")


class ColdCache:
    """Pages of cold heads on the device and in host memory."""

    def __init__(
        self,
        layers: Mapping[str, int],
        num_kv_heads: int,
        sizes: OffloadSizes,
        host: HostPool,
        slots: torch.Tensor,
        max_num_reqs: int,
        max_num_tokens: int,
        max_model_len: int,
    ) -> None:
        """Take over the memory.

        layers: hot heads by the name of the layer, in the order in which they run.
        host: of the layers that have cold heads, in that order. slots: [num_rows, num_slots, page_size, 2 * head_dim].
        max_num_reqs, max_num_tokens: rows and tokens of a step's batch, padding included.
        """
        self.sizes = sizes
        self.host = host
        self.layers: dict[str, ColdLayer] = {}
        first_row = 0
        for name, hot in layers.items():
            if hot < num_kv_heads:
                self.layers[name] = ColdLayer(first_row, len(self.layers), hot, num_kv_heads)
                first_row += num_kv_heads - hot
        assert slots.shape[:2] == (first_row, sizes.num_slots)
        device = slots.device
        self.pools = PagePools(slots, host.layers, host_offsets(slots, host.layers))
        self.table = SlotTable(sizes.num_blocks, device)
        self.copier = Copier(self.pools)
        self.staging = None
        if sizes.staging_pages:
            self.staging = Staging(self.pools, sizes.group_size, sizes.staging_pages)
        # Where captured graphs read a step's tables.
        max_pages = -(-max_model_len // sizes.page_size) + 1
        self.has_spans = 0 < sizes.staging_pages < max_pages - 1
        """Whether a buffer holds less than the longest context."""
        self.entries = torch.zeros(max_num_reqs, max_pages, dtype=torch.int32, device=device)
        """[max_num_reqs, max_pages] int32: where the pages of each request of the step lie; see `KVView.host_pages`."""
        self.slot_mapping = torch.full((max_num_tokens,), -1, dtype=torch.int64, device=device)
        """[max_num_tokens] int64: where each token of the step goes among the slots."""
        self.checksums: dict[int, int] | None = None
        """By block on the host, of what was copied there; None until integrity is first asked for."""
        self.num_spilled = self.num_loaded = self.num_staged = 0
        """Pages copied so far: to the host, back from it, and to staging for a pass over one group of heads."""
        self.selection: ColdSelection | None = None
        """None where decode reads all pages."""
        self.indices: dict[int, str] = {}
        """Names of layers by their index, where decode is selective."""

    def select(self, rule: Rule, indices: Mapping[str, int], group_size: int) -> None:
        """Let decode choose among the pages in host memory.

        indices: of the layers, by name; group_size: query heads per KV head.
        """
        rows = {indices[name]: layer.rows for name, layer in self.layers.items()}
        max_num_reqs, max_pages = self.entries.shape
        sizes = SelectionSizes(max_num_reqs, max_pages, group_size)
        self.selection = ColdSelection(rule, self.pools, self.sizes.num_blocks, rows, sizes)
        self.indices = {indices[name]: name for name in self.layers}

    def warm_up(self) -> None:
        """Compile what copies pages, before any request waits for it; slot 0 and block 0 hold nothing."""
        if is_on_host(self.entries):
            return
        zero = torch.zeros(1, dtype=torch.int32, device=self.entries.device)
        self.pools.slots[:, 0].zero_()
        for to_host in (True, False):
            move(self.pools, zero, zero, to_host=to_host)
        if self.selection is not None:
            self.selection.bound(zero, zero)
            self.selection.begin_step(self.entries, self.selection.kv_lens, 1, 0)
        self.copier.copy(zero, zero)
        self.copier.wait()
        if self.staging is not None:
            name = next(iter(self.layers))
            for entries in (zero, -1 - zero):
                pages, heads = StagedPages(entries), self.groups_of(self.layers[name])[0]
                self.staged_turn([name], [(pages,)], is_alone=True).take(name, pages, heads)
        torch.cuda.synchronize(self.entries.device)
        self.num_staged = 0

    def follow(self, plan: ResidencyPlan) -> None:
        """Carry out a step's moves, in the order of the current stream."""
        self.copier.wait()
        if self.selection is not None and self.table.known:
            self.selection.end_step(
                self.entries, lambda index: self.view_of(self.layers[self.indices[index]], both=True)
            )
        blocks, slots = self.table.follow(plan)
        num_spills, num_moved = len(plan.spills), len(plan.spills) + len(plan.loads)
        if self.selection is not None and (plan.spills or plan.copies):
            leaving = torch.cat([blocks[:num_spills], blocks[num_moved : num_moved + len(plan.copies)]])
            their_slots = torch.cat([slots[:num_spills], slots[num_moved : num_moved + len(plan.copies)]])
            self.selection.bound(leaving, their_slots)
        if plan.spills:
            move(self.pools, blocks[:num_spills], slots[:num_spills], to_host=True)
        if plan.loads:
            move(self.pools, blocks[num_spills:num_moved], slots[num_spills:num_moved], to_host=False)
        if plan.copies:
            copies = slice(num_moved, num_moved + len(plan.copies))
            self.copier.copy(blocks[copies], slots[copies])
        self.num_spilled += len(plan.spills) + len(plan.copies)
        self.num_loaded += len(plan.loads)
        if self.checksums is not None:
            self.copier.wait()
            self.note_checksums([each.block for each in (*plan.spills, *plan.copies)])

    def map_step(
        self, block_table: torch.Tensor, kv_lens: torch.Tensor, slot_mapping: torch.Tensor, max_kv_len: int
    ) -> None:
        """Write a step's tables: `entries` for [num_reqs, max_pages] blocks, `slot_mapping` for [num_tokens] places."""
        width = min(block_table.shape[1], self.entries.shape[1])
        (map_step_cpu if is_on_host(self.entries) else map_step)(
            block_table[: len(kv_lens), :width],
            kv_lens,
            slot_mapping,
            self.table.slot_of,
            self.sizes.page_size,
            max_kv_len,
            self.entries,
            self.slot_mapping,
        )

    def slots_of(self, layer: ColdLayer) -> torch.Tensor:
        """[num_slots, num_cold_heads, page_size, 2 * head_dim]: the layer's pages on the device."""
        return self.pools.slots[layer.rows].transpose(0, 1)

    def view_of(self, layer: ColdLayer, *, both: bool) -> KVView:
        """The layer's cold heads in slots, or in slots and in host memory."""
        host_pages = self.host.layers[layer.place].transpose(0, 1) if both else None
        return KVView(self.slots_of(layer), layer.hot_heads, host_pages)

    def stage(self, first_req: int, num_pages: list[int]) -> tuple[StagedPages, torch.Tensor]:
        """What to stage for some requests of the step, and the block table of the staged pages.

        num_pages: of the requests from `first_req` on. Returns the pages and [num_reqs, max_pages] int32, as wide as
        the engine's own tables: kernels differ by their width.
        """
        pages = [self.entries[first_req + place, :count] for place, count in enumerate(num_pages)]
        firsts = [sum(num_pages[:place]) for place in range(len(num_pages))]
        device = self.entries.device
        numbers = torch.arange(self.entries.shape[1], dtype=torch.int32, device=device)
        group_size = self.sizes.group_for(sum(num_pages))
        staged = StagedPages(torch.cat(pages), are_of_one=len(pages) == 1, group_size=group_size)
        return staged, to_device([firsts], device)[0][:, None] + numbers

    def stage_spans(self, request: int, bounds: list[int]) -> tuple[tuple[StagedPages, ...], torch.Tensor]:
        """The pages of one request of the step in spans, and the block table of each of them.

        bounds: pages at which spans begin, and where the last one ends. Returns [1, max_pages] int32 as table.
        """
        spans = tuple(StagedPages(self.entries[request, first:end], are_of_one=True) for first, end in pairwise(bounds))
        numbers = torch.arange(self.entries.shape[1], dtype=torch.int32, device=self.entries.device)
        return spans, numbers[None]

    def groups_of(self, layer: ColdLayer, group_size: int | None = None) -> list[slice]:
        """The layer's cold heads in groups that are staged together; group_size: None for the usual one."""
        size = group_size or self.sizes.group_size
        return [
            slice(first, min(first + size, layer.num_kv_heads))
            for first in range(layer.hot_heads, layer.num_kv_heads, size)
        ]

    def staged_turn(self, names: list[str], staged: list[tuple[StagedPages, ...]], *, is_alone: bool) -> StagedTurn:
        """The staging of a step for some layers, in the order in which they run.

        staged: of each of them, in the order of its passes: what is staged for one group of heads after another, in
        one piece or in spans.
        """
        assert self.staging is not None
        jobs = []
        for name in names:
            layer = self.layers[name]
            for spans in staged:
                for heads in self.groups_of(layer, spans[0].group_size):
                    first = layer.first_row + heads.start - layer.hot_heads
                    rows = slice(first, first + heads.stop - heads.start)
                    jobs += [Job(name, pages, rows, heads) for pages in spans]
                    self.num_staged += sum(len(pages.entries) for pages in spans)
        return StagedTurn(self.staging, jobs, is_alone=is_alone)

    def host_words(self, blocks: list[int]) -> torch.Tensor:
        """[num_rows, num_blocks, words] int32: the pages of some blocks in host memory. Waits for the device."""
        if not is_on_host(self.entries):
            torch.cuda.synchronize(self.entries.device)
        pages = torch.cat([layer[:, blocks] for layer in self.host.layers])
        return pages.flatten(2).view(torch.int32)

    def note_checksums(self, blocks: list[int]) -> None:
        assert self.checksums is not None
        sums = self.host_words(blocks).sum((0, 2), dtype=torch.int64)
        self.checksums.update(zip(blocks, sums.tolist(), strict=True))

    def check_integrity(self) -> None:
        """Raise AssertionError where table and pools contradict each other; between steps, as it waits for the device.

        A page in both pools must be the same in both. From the first call on, what is copied to the host is summed up,
        and must not change until it is copied anew.
        """
        self.table.check_integrity()
        blocks = sorted(self.table.on_host)
        if self.checksums is None:
            self.checksums = {}
            self.note_checksums(blocks)
        sums = self.host_words(blocks).sum((0, 2), dtype=torch.int64).tolist()
        for block, found in zip(blocks, sums, strict=True):
            assert self.checksums.get(block, found) == found, f"block {block} changed on the host"
        both = [block for block in blocks if block in self.table.known]
        if self.selection is not None:
            pages = torch.cat([layer[:, blocks] for layer in self.host.layers])
            self.selection.check_integrity(blocks, pages)
        in_slots = self.pools.slots[:, [self.table.known[block] for block in both]].cpu()
        assert torch.equal(in_slots.flatten(2).view(torch.int32), self.host_words(both)), (
            "a page is not that on the host"
        )
