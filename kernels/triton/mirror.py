"""The lower triangle of square matrices onto the upper one: what symmetric updates leave out.

One program per tile on or below the diagonal, which it writes transposed to the other side.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fisherkern.kernels._common import pair_of
from fisherkern.kernels._config import on_device

# A row of a tile is a cache line of float32 on both sides.
BLOCK = 32
WARPS = 4


@triton.jit
def mirror_kernel(factor_ptr, factor_head, factor_row, factor_column, width, BLOCK: tl.constexpr):
    """One tile of factor [H, D, D]."""
    blocks = tl.cdiv(width, BLOCK)
    tiles = blocks * (blocks + 1) // 2
    head = tl.program_id(0) // tiles
    i, j = pair_of(tl.program_id(0) - head * tiles)
    rows = (i * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    columns = (j * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    factor_ptr += head.to(tl.int64) * factor_head
    below = (columns[None, :] < rows[:, None]) & (rows[:, None] < width)
    lower = factor_ptr + rows[:, None] * factor_row + columns[None, :] * factor_column
    upper = factor_ptr + columns[:, None] * factor_row + rows[None, :] * factor_column
    tile = tl.load(lower, mask=below)
    tl.store(upper, tl.trans(tile), mask=tl.trans(below))


def mirror(factor: Tensor) -> None:
    """Copy the lower triangle of factor [H, D, D], any strides, onto the upper one."""
    heads, width, _ = factor.shape
    blocks = triton.cdiv(width, BLOCK)
    with on_device(factor):
        mirror_kernel[(heads * blocks * (blocks + 1) // 2,)](
            factor,
            *factor.stride(),
            width,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


AOT = ((mirror_kernel, None, ({"BLOCK": BLOCK, "num_warps": WARPS},)),)
