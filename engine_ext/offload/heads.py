"""The cold heads of one KV cache group: where their pages are, and what makes their passes."""

from dataclasses import dataclass, replace

from farspan.engine_ext.offload.cache import ColdCache
from farspan.engine_ext.pass_maker import PassMaker


@dataclass(frozen=True)
class ColdHeads:
    """Of layers that have as many cold heads each."""

    cache: ColdCache
    maker: PassMaker
    """Of all cold heads of a layer."""
    layer_name: str
    """Any of the group's."""

    def group_makers(self) -> list[PassMaker]:
        """One for each group of heads that are staged together."""
        groups = self.cache.groups_of(self.cache.layers[self.layer_name])
        return [
            replace(self.maker, num_kv_heads=heads.stop - heads.start, first_kv_head=heads.start) for heads in groups
        ]
