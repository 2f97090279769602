"""Covariance factor <- beta · factor + alpha · Σ_t w_t x̃_t x̃_tᵀ, the lower triangle alone.

x is [B, S, H, d] with T = B · S tokens, factor [H, D, D] with D = d + 1 where there is a bias and
x̃ = [x; 1]. One program per tile of the lower triangle, head, and split of the tokens; both of its
operands are tiles of x as it lies, so that nothing is transposed in memory. Where there are fewer
tiles than fill the device the tokens are split: float32 partials [splits, H, d, d] are added in the
order of the splits. The last row of the factor, which is Σ w x̃, is a sum of columns of its own.
No atomics: results do not depend on scheduling.
"""

from __future__ import annotations

import ctypes

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.kernels._common import pair_of, row_offset
from fisherkern.kernels._config import on_device
from fisherkern.kernels._covariance_common import (
    average_into,
    ends_chain,
    left_tile,
    live_tokens,
    outer_products,
    right_tile,
    store_average,
)
from fisherkern.kernels._covariance_config import (
    ADD_BLOCK,
    ADD_ROWS,
    ADD_WARPS,
    GROUP,
    PIECE,
    SUM_BLOCK,
    SUM_TOKENS,
    SUM_WARPS,
    arithmetic_of,
    sum_splits,
    tile_launch,
    token_splits,
)

# ---- tiles of the triangle ----------------------------------------------------------------------


@triton.jit
def tile_of_triangle(index, blocks, GROUP: tl.constexpr):
    """Row i and column j <= i of a tile, GROUP rows at a time and there column by column.

    Programs that run at one time then share the operands of few rows and columns in L2. A group is
    a rectangle and the triangle to the right of it.
    """
    row, _ = pair_of(index)
    first = row // GROUP * GROUP
    rows = tl.minimum(GROUP, blocks - first)
    local = index - first * (first + 1) // 2
    beyond = local - first * rows
    i, j = pair_of(tl.maximum(beyond, 0))
    i = tl.where(beyond < 0, local % rows, i)
    j = tl.where(beyond < 0, local // rows, first + j)
    return first + i, j


@triton.jit
def covariance_kernel(
    x_ptr,
    mask_ptr,
    weights_ptr,
    alpha_ptr,
    partial_ptr,
    factor_ptr,
    inner,
    x_outer,
    x_inner,
    x_head,
    factor_head,
    factor_row,
    tokens,
    tokens_per_split,
    width,
    blocks,
    beta,
    beta_low,
    ARITHMETIC: tl.constexpr,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One tile of one head: into the factor, or for one split of the tokens into the partials."""
    i, j = tile_of_triangle(tl.program_id(0), blocks, GROUP)
    split = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    rows = i * BLOCK + tl.arange(0, BLOCK)
    columns = j * BLOCK + tl.arange(0, BLOCK)
    x_ptr += head * x_head
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    CHAINED: tl.constexpr = ARITHMETIC == "half"
    if CHAINED:
        chain = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(first, last, TOKENS):
        token = start + tl.arange(0, TOKENS)
        live, weight = live_tokens(mask_ptr, weights_ptr, token, token < last)
        x_rows = x_ptr + row_offset(token, inner, x_outer, x_inner)
        left = left_tile(x_rows, rows, width, live)
        right = right_tile(x_rows, columns, width, live)
        if CHAINED:
            chain = outer_products(chain, left, right, weight, weights_ptr is not None, ARITHMETIC)
            if ends_chain(start - first, TOKENS):
                acc += chain
                chain = tl.zeros([BLOCK, BLOCK], tl.float32)
        else:
            acc = outer_products(acc, left, right, weight, weights_ptr is not None, ARITHMETIC)
    if CHAINED:
        acc += chain
    if partial_ptr is not None:
        partial_ptr += (split * tl.num_programs(2) + head) * width * width
        inside = (rows < width)[:, None] & (columns[None, :] <= rows[:, None])
        pointers = partial_ptr + rows[:, None].to(tl.int64) * width + columns[None, :]
        tl.store(pointers, acc, mask=inside)
    else:
        factor_ptr += head * factor_head
        # below the diagonal the mask leaves stores of 16 bytes whole
        if i == j:
            average_into(
                factor_ptr,
                factor_row,
                acc,
                i * BLOCK,
                j * BLOCK,
                width,
                width,
                alpha_ptr,
                beta,
                beta_low,
                True,
                PIECE,
            )
        else:
            average_into(
                factor_ptr,
                factor_row,
                acc,
                i * BLOCK,
                j * BLOCK,
                width,
                width,
                alpha_ptr,
                beta,
                beta_low,
                False,
                PIECE,
            )


# ---- the bias, and the sum of the splits --------------------------------------------------------


@triton.jit
def column_sums_kernel(
    x_ptr,
    mask_ptr,
    weights_ptr,
    partial_ptr,
    inner,
    x_outer,
    x_inner,
    x_head,
    tokens,
    group_tokens,
    groups,
    groups_per_split,
    width,
    size,
    FORM: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial [splits, H, size]: Σ w x̃, Σ w x̃², or over groups (Σ w x̃)²; x̃ is 1 past `width`."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    head = tl.program_id(2).to(tl.int64)
    x_ptr += head * x_head
    first_group = split * groups_per_split
    last_group = tl.minimum(first_group + groups_per_split, groups)
    result = tl.zeros([BLOCK], tl.float32)
    for group in range(first_group, last_group):
        first = group * group_tokens
        last = tl.minimum(first + group_tokens, tokens)
        sums = tl.zeros([TOKENS, BLOCK], tl.float32)
        for start in range(first, last, TOKENS):
            token = start + tl.arange(0, TOKENS)
            live, weight = live_tokens(mask_ptr, weights_ptr, token, token < last)
            x_rows = x_ptr + row_offset(token, inner, x_outer, x_inner)
            x = right_tile(x_rows, columns, width, live).to(tl.float32)
            x = tl.where(columns[None, :] == width, 1.0, x)
            if FORM == "squares":
                x = x * x
            sums += weight[:, None] * x
        total = tl.sum(sums, 0)
        if FORM == "samples":
            total = total * total
        result += total
    partial_ptr += (split * tl.num_programs(2) + head) * size
    tl.store(partial_ptr + columns, result, mask=columns < size)


@triton.jit
def average_splits_kernel(
    partial_ptr,
    alpha_ptr,
    factor_ptr,
    splits,
    rows,
    columns,
    factor_head,
    factor_row,
    factor_column,
    beta,
    beta_low,
    TRIANGULAR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Average Σ partial [splits, H, rows, columns] into the factor, in order of the splits."""
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[None, :]
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    head = tl.program_id(2).to(tl.int64)
    inside = (row < rows) & (column < columns)
    if TRIANGULAR:
        inside &= column <= row
    step = tl.num_programs(2).to(tl.int64) * rows * columns
    source = partial_ptr + head * rows * columns + row * columns + column
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for _ in range(splits):
        total += tl.load(source, mask=inside, other=0.0)
        source += step
    pointers = factor_ptr + head * factor_head
    pointers = pointers + row.to(tl.int64) * factor_row + column.to(tl.int64) * factor_column
    store_average(pointers, total, alpha_ptr, beta, beta_low, inside)


# ---- host ---------------------------------------------------------------------------------------


def halves(beta: float) -> tuple[float, float]:
    """Beta as a float32, and what that rounding left out: arguments `beta`, `beta_low`."""
    high = ctypes.c_float(beta).value
    return high, beta - high


def token_strides(x: Tensor) -> tuple[int, int, int]:
    """Inner, outer stride and inner stride of the tokens of x [B, S, ...].

    Tokens at one distance from each other are one dimension: the kernel divides by an inner of 1,
    which it is compiled for.
    """
    outer, inner = x.shape[:2]
    outer_stride, inner_stride = x.stride()[:2]
    if inner == 1:
        return 1, outer_stride, 0
    if outer == 1 or outer_stride == inner * inner_stride:
        return 1, inner_stride, 0
    return inner, outer_stride, inner_stride


def average_splits(
    partial: Tensor, alpha: Tensor, beta: float, factor: Tensor, triangular: bool
) -> None:
    """Average the sum of partial [splits, H, rows, columns] into factor [H, rows, columns]."""
    splits, heads, rows, columns = partial.shape
    average_splits_kernel[(triton.cdiv(columns, ADD_BLOCK), triton.cdiv(rows, ADD_ROWS), heads)](
        partial,
        alpha,
        factor,
        splits,
        rows,
        columns,
        *factor.stride(),
        *halves(beta),
        TRIANGULAR=triangular,
        ROWS=ADD_ROWS,
        BLOCK=ADD_BLOCK,
        num_warps=ADD_WARPS,
        enable_fp_fusion=True,
    )


def bias_update(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    alpha: Tensor,
    beta: float,
    form: str,
    factor: Tensor,
) -> None:
    """Average the sums of the columns of x [B, S, H, d] into factor [H, 1, d] or [H, 1, d + 1]."""
    outer, inner, heads, width = x.shape
    tokens = outer * inner
    size = factor.shape[-1]
    blocks = triton.cdiv(size, SUM_BLOCK)
    if form == "samples":
        splits, groups_per_split = sum_splits(outer, tokens, blocks * heads, x.device)
        groups, group_tokens = outer, inner
    else:
        splits, group_tokens = sum_splits(tokens, tokens, blocks * heads, x.device)
        groups, groups_per_split = splits, 1
    partial = torch.empty(splits, heads, 1, size, dtype=torch.float32, device=x.device)
    column_sums_kernel[(blocks, splits, heads)](
        x,
        mask,
        weights,
        partial,
        *token_strides(x),
        x.stride(2),
        tokens,
        group_tokens,
        groups,
        groups_per_split,
        width,
        size,
        FORM=form,
        TOKENS=SUM_TOKENS,
        BLOCK=SUM_BLOCK,
        num_warps=SUM_WARPS,
        enable_fp_fusion=True,
    )
    average_splits(partial, alpha, beta, factor, triangular=False)


def covariance_update(
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    alpha: Tensor,
    beta: float,
    bias: bool,
    precision: str,
    factor: Tensor,
) -> None:
    """Lower triangle of factor [H, D, D] <- beta · factor + alpha · Σ w x̃ x̃ᵀ."""
    outer, inner, heads, width = x.shape
    tokens = outer * inner
    arithmetic = arithmetic_of(x.dtype, weights is not None, False, precision)
    block, step, warps, stages = tile_launch("sums", arithmetic, width, x)
    blocks = triton.cdiv(width, block)
    tiles = blocks * (blocks + 1) // 2
    splits, tokens_per_split = token_splits(tokens, tiles * heads, step, x.device)
    partial = None
    if splits > 1:
        partial = torch.empty(splits, heads, width, width, dtype=torch.float32, device=x.device)
    with on_device(x):
        covariance_kernel[(tiles, splits, heads)](
            x,
            mask,
            weights,
            alpha,
            partial,
            factor,
            *token_strides(x),
            x.stride(2),
            *factor.stride()[:2],
            tokens,
            tokens_per_split,
            width,
            blocks,
            *halves(beta),
            ARITHMETIC=arithmetic,
            GROUP=GROUP,
            PIECE=PIECE,
            TOKENS=step,
            BLOCK=block,
            num_warps=warps,
            num_stages=stages,
            enable_fp_fusion=True,
        )
        if partial is not None:
            average_splits(partial, alpha, beta, factor[:, :width, :width], triangular=True)
        if bias:
            bias_update(x, mask, weights, alpha, beta, "product", factor[:, width:])


_SUMS = {"TOKENS": SUM_TOKENS, "BLOCK": SUM_BLOCK, "num_warps": SUM_WARPS}
_ADDING = {"ROWS": ADD_ROWS, "BLOCK": ADD_BLOCK, "num_warps": ADD_WARPS}
AOT = (
    (covariance_kernel, "sums", ({"GROUP": GROUP, "PIECE": PIECE},)),
    (
        column_sums_kernel,
        None,
        tuple({"FORM": form, **_SUMS} for form in ("product", "squares", "samples")),
    ),
    (
        average_splits_kernel,
        None,
        (
            {"TRIANGULAR": True, "factor_column": 1, **_ADDING},
            {"TRIANGULAR": False, "factor_column": 1, **_ADDING},
            {"TRIANGULAR": False, **_ADDING},
        ),
    ),
)
