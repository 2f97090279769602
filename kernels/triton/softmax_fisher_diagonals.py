"""The diagonal w p (1 − p) / τ² per token, and the sums Σ w p and Σ w p (1 − p) / τ² over tokens.

The sums are two kernels without atomics: one program per token finds the normaliser of its row,
then programs over [tokens of a split] × [classes of a block] add in float32, and the partials
[splits, V] are added in the order of the splits. Results do not depend on scheduling.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.kernels._common import (
    complement,
    exponential,
    given_normaliser,
    load_logits,
    natural_rate,
    normaliser,
    rate,
    row_offset,
    token_weight,
)
from fisherkern.kernels._config import COLUMN_ROWS, column_splits, launch, on_device

# ---- per token --------------------------------------------------------------------------------


@triton.jit
def diagonal_kernel(
    z_ptr,
    weights_ptr,
    lse_ptr,
    out_ptr,
    inner,
    z_outer,
    z_inner,
    out_outer,
    out_inner,
    classes,
    scale,
    scale_low,
    BLOCK: tl.constexpr,
):
    """W p (1 − p) / τ² of one token."""
    token = tl.program_id(0)
    z_ptr += row_offset(token, inner, z_outer, z_inner)
    out_ptr += row_offset(token, inner, out_outer, out_inner)
    weight = token_weight(weights_ptr, token)
    limit = tl.where(weight == 0, 0, classes)
    shift, factor, rest = normaliser(z_ptr, limit, lse_ptr, token, scale, scale_low, BLOCK)
    inverse = natural_rate(scale, scale_low)
    weight_scaled = weight * (inverse * inverse).to(tl.float32)
    tiles = tl.cdiv(classes, BLOCK)
    for i in range(tiles):
        columns = (tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        z = load_logits(z_ptr, columns, limit, "evict_first")
        p = factor * exponential(z, shift, scale, scale_low)
        out = weight_scaled * (p * complement(z, p, shift, rest))
        out = tl.where(weight == 0, 0.0, out)
        tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=columns < classes)


def softmax_fisher_diagonal(
    logits: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write w p (1 − p) / τ² to out [B, S, V]."""
    block, warps = launch("scan", logits)
    outer, inner, classes = logits.shape
    with on_device(logits):
        diagonal_kernel[(outer * inner,)](
            logits,
            weights,
            logsumexp,
            out,
            inner,
            *logits.stride()[:2],
            *out.stride()[:2],
            classes,
            *rate(temperature),
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )


# ---- over tokens ------------------------------------------------------------------------------


@triton.jit
def normaliser_kernel(
    z_ptr,
    weights_ptr,
    lse_ptr,
    state_ptr,
    inner,
    z_outer,
    z_inner,
    classes,
    tokens,
    scale,
    scale_low,
    BLOCK: tl.constexpr,
):
    """State [3, T]: shift, factor and rest of one token, as `complement` takes them."""
    token = tl.program_id(0)
    z_ptr += row_offset(token, inner, z_outer, z_inner)
    weight = token_weight(weights_ptr, token)
    limit = tl.where(weight == 0, 0, classes)
    shift, factor, rest = normaliser(z_ptr, limit, lse_ptr, token, scale, scale_low, BLOCK)
    tl.store(state_ptr + token, shift)
    tl.store(state_ptr + tokens + token, factor)
    tl.store(state_ptr + 2 * tokens + token, rest)


@triton.jit
def column_sum_kernel(
    z_ptr,
    weights_ptr,
    lse_ptr,
    state_ptr,
    partial_ptr,
    inner,
    z_outer,
    z_inner,
    classes,
    tokens,
    tokens_per_split,
    scale,
    scale_low,
    DIAGONAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial [splits, V]: Σ w p, or with DIAGONAL Σ w p (1 − p) / τ², over a split of tokens."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    split = tl.program_id(1)
    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, tokens)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, last, ROWS):
        token = start + tl.arange(0, ROWS)
        there = token < last
        if weights_ptr is None:
            weight = there.to(tl.float32)
        else:
            weight = tl.load(weights_ptr + token, mask=there, other=0.0)
        live = weight != 0
        if state_ptr is not None:
            shift = tl.load(state_ptr + token, mask=live, other=0.0)
            factor = tl.load(state_ptr + tokens + token, mask=live, other=0.0)
        else:
            lse = tl.load(lse_ptr + token, mask=live, other=0.0)
            shift, factor = given_normaliser(lse, scale, scale_low)
        rows = z_ptr + row_offset(token, inner, z_outer, z_inner)
        inside = live[:, None] & (columns < classes)[None, :]
        z = tl.load(rows[:, None] + columns[None, :], mask=inside, other=0.0)
        z = z.to(tl.float32)
        p = factor[:, None] * exponential(z, shift[:, None], scale, scale_low)
        if DIAGONAL:
            rest = tl.load(state_ptr + 2 * tokens + token, mask=live, other=0.0)
            value = p * complement(z, p, shift[:, None], rest[:, None])
        else:
            value = p
        total += tl.where(inside, weight[:, None] * value, 0.0)
    result = tl.sum(total, 0)
    if DIAGONAL:
        inverse = natural_rate(scale, scale_low)
        result = result * (inverse * inverse).to(tl.float32)
    tl.store(partial_ptr + split.to(tl.int64) * classes + columns, result, mask=columns < classes)


@triton.jit
def add_splits_kernel(partial_ptr, out_ptr, classes, splits, BLOCK: tl.constexpr):
    """Out [V] = Σ partial [splits, V], in order."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        rows = partial_ptr + tl.full([], split, tl.int64) * classes
        total += tl.load(rows + columns, mask=columns < classes, other=0.0)
    tl.store(out_ptr + columns, total, mask=columns < classes)


def _column_sum(
    logits: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
    diagonal: bool,
) -> None:
    outer, inner, classes = logits.shape
    tokens = outer * inner
    scale = rate(temperature)
    strides = logits.stride()[:2]
    splits = column_splits(tokens)
    new = {"dtype": torch.float32, "device": logits.device}
    partial = out if splits == 1 else torch.empty(splits, classes, **new)
    state = None
    with on_device(logits):
        # Σ p needs no maximum where the logsumexp is known
        if diagonal or logsumexp is None:
            state = torch.empty(3, tokens, **new)
            block, warps = launch("scan", logits)
            normaliser_kernel[(tokens,)](
                logits,
                weights,
                logsumexp,
                state,
                inner,
                *strides,
                classes,
                tokens,
                *scale,
                BLOCK=block,
                num_warps=warps,
                enable_fp_fusion=True,
            )
        block, warps = launch("columns", logits)
        blocks = triton.cdiv(classes, block)
        column_sum_kernel[(blocks, splits)](
            logits,
            weights,
            logsumexp,
            state,
            partial,
            inner,
            *strides,
            classes,
            tokens,
            triton.cdiv(tokens, splits),
            *scale,
            DIAGONAL=diagonal,
            ROWS=COLUMN_ROWS,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )
        if splits > 1:
            add_splits_kernel[(blocks,)](
                partial, out, classes, splits, BLOCK=block, num_warps=warps, enable_fp_fusion=True
            )


def softmax_fisher_diagonal_sum(
    logits: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write Σ w p (1 − p) / τ² to out [V]."""
    _column_sum(logits, weights, logsumexp, temperature, out, diagonal=True)


def softmax_fisher_mean_probs(
    logits: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write Σ w p to out [V]; the weights come already divided by N."""
    _column_sum(logits, weights, logsumexp, temperature, out, diagonal=False)


AOT = (
    (diagonal_kernel, "scan", ({},)),
    (normaliser_kernel, "scan", ({},)),
    (
        column_sum_kernel,
        "columns",
        (
            {"DIAGONAL": False, "ROWS": COLUMN_ROWS},
            {"DIAGONAL": True, "ROWS": COLUMN_ROWS},
            {"DIAGONAL": False, "ROWS": COLUMN_ROWS, "state_ptr": None},
        ),
    ),
    (add_splits_kernel, "columns", ({},)),
)
