"""A block of columns as a sum of bfloat16 terms, split once for all programs that multiply by it.

x = x0 + x1 + x2 with x0 = x rounded, x1 the rounded remainder, x2 the rounded remainder of that:
three hold a float32, two are better than TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows of a block come in multiples of this: the tiles of a product need not ask for its end.
GRANULE = 128
_ROWS = 16
_COLUMNS = 64
_WARPS = 4
_TERMS = {"bf16x6": 3, "bf16x3": 2, "ieee": 1}


@triton.jit
def terms_kernel(
    y_ptr,
    scale_ptr,
    terms_ptr,
    rows,
    width,
    y_row,
    terms_plane,
    terms_row,
    TERMS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The terms of diag(scale) x, a plane apart; zero where x ends. A single term is x itself."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    wide = row[:, None].to(tl.int64)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    x = tl.load(y_ptr + wide * y_row + column[None, :], mask=inside, other=0.0)
    if scale_ptr is not None:
        x *= tl.load(scale_ptr + row, mask=row < rows, other=0.0)[:, None]
    at = terms_ptr + wide * terms_row + column[None, :]
    there = (column < terms_row)[None, :]
    if TERMS == 1:
        tl.store(at, x, mask=there)
    else:
        for k in tl.static_range(TERMS):
            term = x.to(tl.bfloat16)
            tl.store(at + k * terms_plane, term, mask=there)
            x -= term.to(tl.float32)


def terms_of(x: Tensor, scale: Tensor | None, columns: int, arithmetic: str) -> Tensor:
    """Terms [k, R, C] of diag(scale) x [n, K]: R and C whole granules and tiles of `columns`."""
    rows, width = x.shape
    shape = (
        _TERMS[arithmetic],
        triton.cdiv(rows, GRANULE) * GRANULE,
        max(1, triton.cdiv(width, columns)) * columns,
    )
    kind = torch.float32 if arithmetic == "ieee" else torch.bfloat16
    terms = torch.empty(shape, dtype=kind, device=x.device)
    terms_kernel[(shape[1] // _ROWS, triton.cdiv(shape[2], _COLUMNS))](
        x,
        scale,
        terms,
        rows,
        width,
        x.stride(0),
        *terms.stride()[:2],
        TERMS=shape[0],
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        num_warps=_WARPS,
        enable_fp_fusion=True,
    )
    return terms


_TILE = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "num_warps": _WARPS}
AOT = ((terms_kernel, None, tuple({"TERMS": k, **_TILE} for k in (1, 2, 3))),)
