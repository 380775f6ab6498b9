"""How the copying warps of Hopper's kernels find a tile in memory and have the copy engine bring it."""

from farspan.kernels.hopper.tile_steps import BLOCK_N
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma

# Triton 3.7 gave it another name.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared


@gluon.jit
def row_of(table_row_ptr, start, last_key, head_row, page_rows, PAGE_SIZE: gl.constexpr, BOX: gl.constexpr):
    """The row of memory of the key at `start`; a box past the last key reads the last one's again."""
    if PAGE_SIZE == 0:
        return gl.load(table_row_ptr) * page_rows + head_row + start
    if BOX < BLOCK_N:
        start = gl.minimum(start, last_key // BOX * BOX)
    return gl.load(table_row_ptr + start // PAGE_SIZE) * page_rows + head_row + start % PAGE_SIZE


@gluon.jit
def box_of(tile, box: gl.constexpr, BOX: gl.constexpr):
    """The rows of a tile that one copy fills."""
    if BOX == BLOCK_N:
        return tile
    return tile.slice(box * BOX, BOX)
