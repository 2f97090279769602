"""Panels u s exp((z − r) / τ), [T, V] or transposed: one tile of tokens and classes a program."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fisherkern.kernels._common import exponential, rate, row_offset
from fisherkern.kernels._config import on_device

# Either side of a tile is whole cache lines.
TOKENS = 32
CLASSES = 64
WARPS = 4


@triton.jit
def panel_kernel(
    z_ptr,
    reference_ptr,
    unit_ptr,
    scale_ptr,
    out_ptr,
    inner,
    z_outer,
    z_inner,
    tokens,
    classes,
    out_row,
    scale,
    scale_low,
    TRANSPOSED: tl.constexpr,
    TOKENS: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """One tile."""
    tiles = tl.cdiv(classes, CLASSES)
    row_of_tiles = tl.program_id(0) // tiles
    token = row_of_tiles * TOKENS + tl.arange(0, TOKENS)
    column = (tl.program_id(0) - row_of_tiles * tiles) * CLASSES + tl.arange(0, CLASSES)
    unit = tl.load(unit_ptr + token, mask=token < tokens, other=0.0)
    reference = tl.load(reference_ptr + token, mask=token < tokens, other=0.0)
    # a row that does not count is not read; the mask stays one that vector loads can have
    row = z_ptr + row_offset(token, inner, z_outer, z_inner)
    counts = (column < classes)[None, :] & (unit != 0)[:, None]
    z = tl.load(row[:, None] + column[None, :], mask=counts, other=0.0).to(tl.float32)
    panel = exponential(z, reference[:, None], scale, scale_low) * unit[:, None]
    panel = tl.where((unit == 0)[:, None], 0.0, panel)
    if scale_ptr is not None:
        panel *= tl.load(scale_ptr + column, mask=column < classes, other=0.0)[None, :]
    inside = (token < tokens)[:, None] & (column < classes)[None, :]
    if TRANSPOSED:
        to = out_ptr + column[:, None].to(tl.int64) * out_row + token[None, :]
        tl.store(to, tl.trans(panel), mask=tl.trans(inside))
    else:
        to = out_ptr + token[:, None].to(tl.int64) * out_row + column[None, :]
        tl.store(to, panel, mask=inside)


def softmax_fisher_panel(
    logits: Tensor,
    reference: Tensor,
    unit: Tensor,
    scale: Tensor | None,
    temperature: float,
    transposed: bool,
    out: Tensor,
) -> None:
    """Write unit · scale · exp((z − reference) / τ) to out [T, V], or [V, T] if transposed."""
    outer, inner, classes = logits.shape
    tokens = outer * inner
    with on_device(logits):
        panel_kernel[(triton.cdiv(classes, CLASSES) * triton.cdiv(tokens, TOKENS),)](
            logits,
            reference,
            unit,
            scale,
            out,
            inner,
            *logits.stride()[:2],
            tokens,
            classes,
            out.stride(0),
            *rate(temperature),
            TRANSPOSED=transposed,
            TOKENS=TOKENS,
            CLASSES=CLASSES,
            num_warps=WARPS,
            enable_fp_fusion=True,
        )


AOT = (
    (
        panel_kernel,
        None,
        tuple(
            {"TRANSPOSED": way, "TOKENS": TOKENS, "CLASSES": CLASSES, "num_warps": WARPS, **scale}
            for way in (False, True)
            for scale in ({}, {"scale_ptr": None})
        ),
    ),
)
