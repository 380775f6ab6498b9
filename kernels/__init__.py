"""Attention kernels on paged KV: Triton (Gluon on Hopper) and PyTorch, importing nothing else of farspan."""

# transformers takes any importable top-level module `kernels` for the package of that name and asks for its version;
# with the repository as the current directory it finds this folder, and "0.0.0" tells it that the package is not there.
__version__ = "0.0.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from farspan.kernels.block_patterns import PATTERNS, static_block_lists
    from farspan.kernels.contiguous.attention import attention, attention_tiles
    from farspan.kernels.tiles import BlockLists, PrefillTiles

__all__ = ["PATTERNS", "BlockLists", "PrefillTiles", "attention", "attention_tiles", "static_block_lists"]

_HOMES = {
    "PATTERNS": "block_patterns",
    "BlockLists": "tiles",
    "PrefillTiles": "tiles",
    "attention": "contiguous.attention",
    "attention_tiles": "contiguous.attention",
    "static_block_lists": "block_patterns",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: a module that needs no Triton must not load it."""
    if name in _HOMES:
        return getattr(import_module(f"farspan.kernels.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
