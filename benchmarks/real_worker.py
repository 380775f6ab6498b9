"""The worker's side of benchmark `real`: rules for choosing blocks that no engine of ours has, in place of flex's."""

from dataclasses import replace
from typing import Any

import torch
from farspan.engine_ext.config import BlockSparsePrefill, FlexPrefill
from farspan.engine_ext.selection.methods import Chunks, DeviceSelections, FlexSelector, flex_budget
from farspan.evaluation.audit_worker import AuditMetrics
from farspan.kernels.block_patterns import static_block_lists
from farspan.kernels.flex.oracle import block_mass
from farspan.kernels.tiles import BlockLists, PrefillTiles
from farspan.vllm_compat.runner import metadata_builders


class RuleSelector(FlexSelector):
    """Chooses by `rule`: flex's own, the tile oracle, or a number of local blocks besides the first one."""

    rule: str | int = "flex"

    def block_lists(
        self, prefill: FlexPrefill | BlockSparsePrefill, chunks: Chunks, select: DeviceSelections
    ) -> BlockLists:
        """See `Selector`."""
        assert isinstance(prefill, FlexPrefill)
        if self.rule == "flex":
            return super().block_lists(prefill, chunks, select)
        if isinstance(self.rule, int):
            lists = static_block_lists(chunks.tiles, "sink_local", sink_blocks=1, local_blocks=self.rule)
        else:
            mass = block_mass(
                chunks.query, chunks.kv, chunks.batch, chunks.tiles, chunks.scale, turn=chunks.turn, dtype=torch.float32
            )
            lists = oracle_lists(mass, chunks.tiles, prefill.gamma, flex_budget(prefill, 128, 1).min_blocks)
        if self.stats is not None:
            self.stats.add_lists(lists, chunks.tiles, chunks.q_heads, chunks.batch.num_reqs)
        return lists


def oracle_lists(mass: torch.Tensor, tiles: PrefillTiles, gamma: float, min_blocks: int) -> BlockLists:
    """Per tile and head the fewest blocks, its first and its own among them, that keep gamma of all its rows' mass.

    mass: [num_heads, num_tiles, num_blocks], rows sum to 1. min_blocks: of every list, where they exist.
    """
    own = tiles.tile_block.long()
    forced = torch.zeros_like(mass, dtype=torch.bool)
    forced[:, :, 0] = True
    forced.scatter_(2, own[None, :, None].expand(mass.shape[0], -1, 1), True)
    order = (mass + 10 * forced).argsort(2, descending=True)
    kept = mass.gather(2, order).cumsum(2)
    counts = ((kept < gamma - 1e-6).sum(2) + 1).clamp(min=min_blocks)
    counts = torch.minimum(torch.maximum(counts, forced.sum(2)), own[None] + 1)
    index = torch.arange(mass.shape[2], device=mass.device)
    keep = torch.zeros_like(forced).scatter_(2, order, index < counts[..., None])
    ids = torch.where(keep, index, mass.shape[2]).sort(2).values.clamp_(max=mass.shape[2] - 1)
    return BlockLists(ids.int(), counts.int())


class RuleMetrics(AuditMetrics):
    """As `AuditMetrics`, with a choice of rules."""

    def farspan_rule(self, rule: str | int) -> None:
        """Choose blocks by a rule of `RuleSelector` from now on, and forget the statistics."""
        worker: Any = self
        for builder in metadata_builders(worker.model_runner):
            for name, layer in builder.layers.items():
                selector = RuleSelector(layer.selector.stats)
                selector.rule = rule
                if selector.stats is not None:
                    selector.stats.reset()
                builder.layers[name] = replace(layer, selector=selector)
