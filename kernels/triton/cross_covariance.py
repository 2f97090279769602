"""Cross factor <- beta · factor + alpha · (sums over tokens of the outer products of g and x̃).

g is [B, S, d_out], x [B, S, d_in], factor [d_out, d_in] or with a bias [d_out, d_in + 1], where
x̃ = [x; 1]. Forms:

======== ==========================================================================
product  Σ_t w g x̃ᵀ
squares  Σ_t w (g ⊙ g) (x̃ ⊙ x̃)ᵀ
samples  Σ_b (Σ_s w g x̃ᵀ)², entry by entry, with no gradient of a sample in memory
======== ==========================================================================

Tiles, splits and the bias are those of `covariance`, without the triangle.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.kernels._common import row_offset
from fisherkern.kernels._config import on_device
from fisherkern.kernels._covariance_common import (
    average_into,
    ends_chain,
    left_tile,
    live_tokens,
    outer_products,
    right_tile,
)
from fisherkern.kernels._covariance_config import (
    GROUP,
    PIECE,
    arithmetic_of,
    sample_splits,
    tile_launch,
    token_splits,
)
from fisherkern.kernels.covariance import average_splits, bias_update, halves, token_strides


@triton.jit
def tile_of_rectangle(index, rows, columns, GROUP: tl.constexpr):
    """Row and column of a tile, GROUP rows at a time and there column by column."""
    first = index // (GROUP * columns) * GROUP
    height = tl.minimum(GROUP, rows - first)
    local = index - first * columns
    return first + local % height, local // height


@triton.jit
def store_tile(
    acc,
    partial_ptr,
    factor_ptr,
    alpha_ptr,
    beta,
    beta_low,
    split,
    row,
    column,
    height,
    width,
    factor_row,
    PIECE: tl.constexpr,
):
    """A tile of sums: into the factor, or those of one split into partial [splits, d_out, d_in]."""
    if partial_ptr is not None:
        rows = (row + tl.arange(0, acc.shape[0]))[:, None]
        columns = (column + tl.arange(0, acc.shape[1]))[None, :]
        partial_ptr += split.to(tl.int64) * height * width
        pointers = partial_ptr + rows.to(tl.int64) * width + columns
        tl.store(pointers, acc, mask=(rows < height) & (columns < width))
    else:
        average_into(
            factor_ptr,
            factor_row,
            acc,
            row,
            column,
            height,
            width,
            alpha_ptr,
            beta,
            beta_low,
            False,
            PIECE,
        )


@triton.jit
def cross_kernel(
    g_ptr,
    x_ptr,
    mask_ptr,
    weights_ptr,
    alpha_ptr,
    partial_ptr,
    factor_ptr,
    g_token_inner,
    g_outer,
    g_inner,
    inner,
    x_outer,
    x_inner,
    factor_row,
    tokens,
    tokens_per_split,
    height,
    width,
    beta,
    beta_low,
    SQUARES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of Σ w g xᵀ or, with SQUARES, of Σ w (g ⊙ g) (x ⊙ x)ᵀ."""
    i, j = tile_of_rectangle(tl.program_id(0), tl.cdiv(height, BLOCK), tl.cdiv(width, BLOCK), GROUP)
    split = tl.program_id(1)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    CHAINED: tl.constexpr = ARITHMETIC == "half"
    if CHAINED:
        chain = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        live, weight = live_tokens(mask_ptr, weights_ptr, token, token < last)
        g_rows = g_ptr + row_offset(token, g_token_inner, g_outer, g_inner)
        x_rows = x_ptr + row_offset(token, inner, x_outer, x_inner)
        left = left_tile(g_rows, rows, height, live)
        right = right_tile(x_rows, columns, width, live)
        if SQUARES:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
            left = left * left
            right = right * right
        if CHAINED:
            chain = outer_products(chain, left, right, weight, weights_ptr is not None, ARITHMETIC)
            if ends_chain(start - first, TOKENS):
                acc += chain
                chain = tl.zeros([BLOCK, BLOCK], tl.float32)
        else:
            acc = outer_products(acc, left, right, weight, weights_ptr is not None, ARITHMETIC)
    if CHAINED:
        acc += chain
    store_tile(
        acc,
        partial_ptr,
        factor_ptr,
        alpha_ptr,
        beta,
        beta_low,
        split,
        i * BLOCK,
        j * BLOCK,
        height,
        width,
        factor_row,
        PIECE,
    )


@triton.jit
def sample_squares_kernel(
    g_ptr,
    x_ptr,
    mask_ptr,
    weights_ptr,
    alpha_ptr,
    partial_ptr,
    factor_ptr,
    g_outer,
    g_inner,
    x_outer,
    x_inner,
    factor_row,
    samples,
    sample_tokens,
    samples_per_split,
    height,
    width,
    beta,
    beta_low,
    ARITHMETIC: tl.constexpr,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of Σ_b (Σ_s w g xᵀ)².

    Samples and the steps within one are a single loop, so that the loads of the next sample are
    under way while this one is finished.
    """
    i, j = tile_of_rectangle(tl.program_id(0), tl.cdiv(height, BLOCK), tl.cdiv(width, BLOCK), GROUP)
    split = tl.program_id(1)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    first = split * samples_per_split
    last = tl.minimum(first + samples_per_split, samples)
    steps = tl.cdiv(sample_tokens, TOKENS)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(first * steps, last * steps):
        sample = step // steps
        position = step % steps * TOKENS + tl.arange(0, TOKENS)
        there = position < sample_tokens
        token = sample * sample_tokens + position
        live, weight = live_tokens(mask_ptr, weights_ptr, token, there)
        g_rows = g_ptr + row_offset(token, sample_tokens, g_outer, g_inner)
        x_rows = x_ptr + row_offset(token, sample_tokens, x_outer, x_inner)
        left = left_tile(g_rows, rows, height, live)
        right = right_tile(x_rows, columns, width, live)
        acc = outer_products(acc, left, right, weight, weights_ptr is not None, ARITHMETIC)
        if step % steps == steps - 1:
            total += acc * acc
            acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    store_tile(
        total,
        partial_ptr,
        factor_ptr,
        alpha_ptr,
        beta,
        beta_low,
        split,
        i * BLOCK,
        j * BLOCK,
        height,
        width,
        factor_row,
        PIECE,
    )


def cross_update(
    x: Tensor,
    g: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    alpha: Tensor,
    beta: float,
    bias: bool,
    form: str,
    precision: str,
    factor: Tensor,
) -> None:
    """Factor [d_out, D_in] <- beta · factor + alpha · the sums of `form`."""
    outer, inner, width = x.shape
    height = g.shape[-1]
    tokens = outer * inner
    if form == "samples" and inner == 1 and weights is None:
        # the square of a product is the product of squares: no step is filled up with nothing;
        # the square of a weight may be beyond float32 where that of its product is not
        form = "squares"
    family = "sums" if form == "product" else form
    arithmetic = arithmetic_of(x.dtype, weights is not None, form == "squares", precision)
    block, step, warps, stages = tile_launch(family, arithmetic, max(height, width), g, x)
    tiles = triton.cdiv(height, block) * triton.cdiv(width, block)
    if form == "samples":
        splits, per_split = sample_splits(outer, tokens, tiles, x.device)
    else:
        splits, per_split = token_splits(tokens, tiles, step, x.device)
    partial = None
    if splits > 1:
        partial = torch.empty(splits, 1, height, width, dtype=torch.float32, device=x.device)
    tensors = (g, x, mask, weights, alpha, partial, factor)
    constants = {
        "ARITHMETIC": arithmetic,
        "GROUP": GROUP,
        "PIECE": PIECE,
        "TOKENS": step,
        "BLOCK": block,
        "num_warps": warps,
        "num_stages": stages,
        "enable_fp_fusion": True,
    }
    with on_device(x):
        if form == "samples":
            sample_squares_kernel[(tiles, splits)](
                *tensors,
                *g.stride()[:2],
                *x.stride()[:2],
                factor.stride(0),
                outer,
                inner,
                per_split,
                height,
                width,
                *halves(beta),
                **constants,
            )
        else:
            cross_kernel[(tiles, splits)](
                *tensors,
                *token_strides(g),
                *token_strides(x),
                factor.stride(0),
                tokens,
                per_split,
                height,
                width,
                *halves(beta),
                SQUARES=form == "squares",
                **constants,
            )
        whole = factor[None]
        if partial is not None:
            average_splits(partial, alpha, beta, whole[:, :, :width], triangular=False)
        if bias:
            # the last column, as a row
            bias_update(g[:, :, None], mask, weights, alpha, beta, form, whole[:, :, width:].mT)


_TILES = {"GROUP": GROUP, "PIECE": PIECE}
AOT = (
    (cross_kernel, "sums", ({"SQUARES": False, **_TILES},)),
    (cross_kernel, "squares", ({"SQUARES": True, **_TILES},)),
    (sample_squares_kernel, "samples", (_TILES,)),
)
