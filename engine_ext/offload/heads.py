"""The cold heads of one KV cache group: where their pages are, and what makes their passes."""

from dataclasses import dataclass, replace

from farspan.engine_ext.offload.cache import ColdCache
from farspan.engine_ext.pass_maker import PassMaker
from farspan.engine_ext.passes import StagedPages


@dataclass(frozen=True)
class ColdHeads:
    """Of layers that have as many cold heads each."""

    cache: ColdCache
    maker: PassMaker
    """Of all cold heads of a layer."""
    layer_name: str
    """Any of the group's."""

    def group_makers(self, pages: StagedPages) -> list[PassMaker]:
        """One for each group of heads for which these pages are staged together, one after the other."""
        groups = self.cache.groups_of(self.cache.layers[self.layer_name], pages.group_size)
        return [
            replace(self.maker, num_kv_heads=heads.stop - heads.start, first_kv_head=heads.start) for heads in groups
        ]
