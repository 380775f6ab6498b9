"""Which KV blocks a prompt reads: the seam between the attention impl and the sparse prefill methods.

An impl holds one `SparsePrefill` per layer, or none; it asks it for block lists and launches the kernel with them.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from farspan.engine_ext.config import BlockSparsePrefill, DensePrefill, FlexPrefill, Prefill
from farspan.engine_ext.metadata import PrefillGroup
from farspan.engine_ext.selection.masks import load_mask, mask_of_layer
from farspan.engine_ext.selection.stats import SelectionStats
from farspan.kernels.block_patterns import gather_rows, mask_rows, static_block_lists
from farspan.kernels.flex.coverage import BudgetController, measure_coverage, sample_rows, short_heads
from farspan.kernels.flex.select import flex_block_lists
from farspan.kernels.rotary_turn import RotaryShift
from farspan.kernels.tiles import BlockLists


@dataclass(frozen=True)
class LayerShape:
    """What a method may need to know about the layer that it selects for."""

    layer_index: int
    num_q_heads: int
    num_kv_heads: int
    """Heads on this rank."""
    total_num_kv_heads: int
    """KV heads of the model, on all ranks."""
    scale: float
    """Factor on the logits."""
    tp_rank: int
    tp_size: int
    device: torch.device


class SparsePrefill(Protocol):
    """Chooses blocks for one layer; holds that layer's state (measured budgets, masks), if any."""

    string: RotaryShift | None
    """The layer's shifted positions, if it has any."""

    def block_lists_for(self, query: torch.Tensor, kv_cache: torch.Tensor, group: PrefillGroup) -> BlockLists:
        """The blocks that each tile of `group.tiles` reads.

        query: [group.num_tokens, num_q_heads, head_dim], the group's tokens only.
        kv_cache: [num_pages, num_kv_heads, page_size, 2 * head_dim], holding the group's own keys already.
        Runs on the device without waiting for it.
        """
        ...

    @property
    def measures(self) -> bool:
        """Whether `measure` wants to see what the launch kept."""
        ...

    def measure(
        self, query: torch.Tensor, kv_cache: torch.Tensor, group: PrefillGroup, lse: torch.Tensor
    ) -> torch.Tensor | None:
        """Take in the LSE of the sparse launch, [num_q_heads, group.num_tokens] float32, natural log.

        Returns the heads that lost too much and are to be computed again over all their keys, [num_q_heads,
        num_requests] bool; None where nothing is computed again whatever was measured.
        """
        ...


def make_sparse_prefill(prefill: Prefill, layer: LayerShape) -> SparsePrefill | None:
    """The selector of one layer; None for dense. Raises ConfigError for a mask file that cannot be read."""
    if isinstance(prefill, DensePrefill):
        return None
    if isinstance(prefill, FlexPrefill):
        return FlexSelector(prefill, layer)
    if prefill.pattern == "file":
        return MaskSelector(prefill, layer)
    return PatternSelector(prefill)


class FlexSelector:
    """Dynamic selection per prompt and head. A request's own gamma arrives with its group's options."""

    def __init__(self, prefill: FlexPrefill, layer: LayerShape) -> None:
        self.prefill = prefill
        self.scale = layer.scale
        self.budgets = BudgetController(layer.num_q_heads, layer.device)
        self.string: RotaryShift | None = None
        """The layer's shifted positions, by which its keys are scored too."""
        self.stats = SelectionStats(layer.num_q_heads, layer.device)

    def block_lists_for(self, query: torch.Tensor, kv_cache: torch.Tensor, group: PrefillGroup) -> BlockLists:
        """See `SparsePrefill`."""
        assert isinstance(group.prefill, FlexPrefill)
        assert group.tiles is not None
        gamma = self.gamma_of(group)
        selection = flex_block_lists(
            query,
            kv_cache,
            group.block_table,
            group.seq_lens,
            group.query_start_loc,
            group.tiles,
            self.scale,
            requests=group.request_ids,
            gamma=self.budgets.effective_gamma(gamma) if self.measures else gamma,
            tau=self.prefill.tau,
            min_budget=self.prefill.min_budget,
            max_budget=self.prefill.max_budget,
            share_kv_group=self.prefill.share_kv_group,
            string=group.shift_of(self.string),
        )
        self.stats.add_selection(selection, group.tiles)
        return selection.block_lists

    @property
    def measures(self) -> bool:
        """See `SparsePrefill`."""
        return self.prefill.coverage_rows > 0

    def measure(
        self, query: torch.Tensor, kv_cache: torch.Tensor, group: PrefillGroup, lse: torch.Tensor
    ) -> torch.Tensor | None:
        """See `SparsePrefill`. Heads that kept less than gamma get larger budgets in the chunks to come.

        max_budget overrides gamma: nothing is computed again then.
        """
        assert group.tiles is not None
        rows = sample_rows(group.query_start_loc, self.prefill.coverage_rows)
        batch = (query, kv_cache, group.block_table, group.seq_lens, group.query_start_loc)
        coverage = measure_coverage(*batch, self.scale, lse, rows, group.shift_of(self.string))
        gamma = self.gamma_of(group)
        self.budgets.update(coverage, gamma)
        if self.prefill.max_budget is not None:
            self.stats.add_coverage(coverage)
            return None
        short = short_heads(coverage, gamma)
        self.stats.add_repair(short, group.tiles)
        self.stats.add_coverage(coverage.masked_fill(short[..., None], 1.0))
        return short

    def gamma_of(self, group: PrefillGroup) -> torch.Tensor:
        """[num_requests] float32: what the group's requests asked for."""
        assert isinstance(group.prefill, FlexPrefill)
        shape = group.request_ids.shape
        return torch.full(shape, group.prefill.gamma, dtype=torch.float32, device=group.request_ids.device)


class StaticSelector:
    """Base of the selectors whose lists depend on positions only."""

    measures = False
    string: RotaryShift | None = None

    def measure(
        self, query: torch.Tensor, kv_cache: torch.Tensor, group: PrefillGroup, lse: torch.Tensor
    ) -> torch.Tensor | None:
        """Never called: there is no promise to keep."""
        raise AssertionError


class PatternSelector(StaticSelector):
    """A named pattern, the same for every head and layer."""

    def __init__(self, prefill: BlockSparsePrefill) -> None:
        self.prefill = prefill

    def block_lists_for(self, query: torch.Tensor, kv_cache: torch.Tensor, group: PrefillGroup) -> BlockLists:
        """See `SparsePrefill`. The first layer of a step makes the lists, the others find them."""
        assert group.tiles is not None
        if "pattern" not in group.shared_lists:
            group.shared_lists["pattern"] = static_block_lists(
                group.tiles,
                self.prefill.pattern,
                sink_blocks=self.prefill.sink_blocks,
                local_blocks=self.prefill.local_blocks,
                stride=self.prefill.stride,
            )
        return group.shared_lists["pattern"]


class MaskSelector(StaticSelector):
    """A mask from a file, per layer and head if the file says so; `check_engine` has found that it fits the model."""

    def __init__(self, prefill: BlockSparsePrefill, layer: LayerShape) -> None:
        assert prefill.mask_file is not None
        mask = mask_of_layer(
            load_mask(prefill.mask_file),
            layer.layer_index,
            layer.num_q_heads,
            layer.total_num_kv_heads,
            layer.tp_rank,
            layer.tp_size,
        )
        rows = mask_rows(mask)
        self.rows = BlockLists(rows.block_ids.to(layer.device), rows.block_counts.to(layer.device))

    def block_lists_for(self, query: torch.Tensor, kv_cache: torch.Tensor, group: PrefillGroup) -> BlockLists:
        """See `SparsePrefill`."""
        assert group.tiles is not None
        return gather_rows(self.rows, group.tiles)
