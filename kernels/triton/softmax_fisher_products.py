"""F v, L v, Lᵀ v, and the derivative of F v in the logits; F = (diag p − p pᵀ) / τ² = L Lᵀ.

One program per token reads its row twice: forward for the sums, then backward for the result, so
that the classes read last are still in L2. Notation as in _common.py; v* and g* are v and g at the
arg-max of the logits.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fisherkern.kernels._common import (
    _NEGATIVE_INFINITY,
    complement_of_star,
    exponential,
    finite_or_zero,
    first_at,
    load_logits,
    load_vector,
    mass_and_deficit,
    natural_rate,
    pair_moments,
    rate,
    row_offset,
    star_probability,
    token_weight,
    value_at,
    weighted_mean,
)
from fisherkern.kernels._config import launch, on_device

# ---- F v and Lᵀ v -----------------------------------------------------------------------------


@triton.jit
def product_kernel(
    z_ptr,
    v_ptr,
    weights_ptr,
    lse_ptr,
    out_ptr,
    inner,
    z_outer,
    z_inner,
    v_outer,
    v_inner,
    out_outer,
    out_inner,
    classes,
    scale,
    scale_low,
    ROOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """W p (v − ⟨p, v⟩) / τ², or with ROOT w √p (v − ⟨p, v⟩) / τ."""
    token = tl.program_id(0)
    z_ptr += row_offset(token, inner, z_outer, z_inner)
    v_ptr += row_offset(token, inner, v_outer, v_inner)
    out_ptr += row_offset(token, inner, out_outer, out_inner)
    weight = token_weight(weights_ptr, token)
    # a row of weight zero has no classes to read
    limit = tl.where(weight == 0, 0, classes)
    m, s, v_star, mean = weighted_mean(z_ptr, v_ptr, limit, scale, scale_low, BLOCK)
    log_p, p_star, rest = star_probability(m, s, s - 1.0, lse_ptr, token, scale, scale_low)
    mass, deficit = mass_and_deficit(log_p, p_star, rest, s, lse_ptr)
    # ⟨p, v⟩ − v*
    centre = mass * mean - v_star * deficit
    inverse = natural_rate(scale, scale_low)
    if ROOT:
        factor = weight * tl.sqrt(p_star) * inverse.to(tl.float32)
        scale = 0.5 * scale
        scale_low = 0.5 * scale_low
    else:
        factor = weight * p_star * (inverse * inverse).to(tl.float32)
    tiles = tl.cdiv(classes, BLOCK)
    for i in range(tiles):
        columns = (tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        z = load_logits(z_ptr, columns, limit, "evict_first")
        v = load_vector(v_ptr, columns, limit, "evict_first")
        out = factor * exponential(z, finite_or_zero(m), scale, scale_low) * ((v - v_star) - centre)
        out = tl.where(weight == 0, 0.0, out)
        tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=columns < classes)


def _product(
    logits: Tensor,
    v: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
    root: bool,
) -> None:
    block, warps = launch("product", logits)
    outer, inner, classes = logits.shape
    with on_device(logits):
        product_kernel[(outer * inner,)](
            logits,
            v,
            weights,
            logsumexp,
            out,
            inner,
            *logits.stride()[:2],
            *v.stride()[:2],
            *out.stride()[:2],
            classes,
            *rate(temperature),
            ROOT=root,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )


def softmax_fisher_matvec(
    logits: Tensor,
    v: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write w F v to out [B, S, V]."""
    _product(logits, v, weights, logsumexp, temperature, out, root=False)


def softmax_fisher_sqrt_rmatvec(
    logits: Tensor,
    v: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write w Lᵀ v to out [B, S, V]; the weights come with their root already taken."""
    _product(logits, v, weights, logsumexp, temperature, out, root=True)


# ---- L v --------------------------------------------------------------------------------------


@triton.jit
def sqrt_matvec_kernel(
    z_ptr,
    v_ptr,
    weights_ptr,
    lse_ptr,
    out_ptr,
    inner,
    z_outer,
    z_inner,
    v_outer,
    v_inner,
    out_outer,
    out_inner,
    classes,
    scale,
    scale_low,
    BLOCK: tl.constexpr,
):
    """W (√p v − p ⟨√p, v⟩) / τ.

    At the arg-max this is √p* v* (1 − p*) − p* Σ' √p v with Σ' over the other classes, which is
    why one star is kept out of both sums.
    """
    token = tl.program_id(0)
    z_ptr += row_offset(token, inner, z_outer, z_inner)
    v_ptr += row_offset(token, inner, v_outer, v_inner)
    out_ptr += row_offset(token, inner, out_outer, out_inner)
    weight = token_weight(weights_ptr, token)
    limit = tl.where(weight == 0, 0, classes)
    m = _NEGATIVE_INFINITY
    star = -1
    v_star = 0.0
    # what former stars add to the sums, kept apart from the tiles: they are scalars
    former = 0.0
    former_v = 0.0
    sum_e = tl.zeros([BLOCK], tl.float32)
    sum_v = tl.zeros([BLOCK], tl.float32)
    for start in range(0, limit, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = load_logits(z_ptr, columns, limit, "evict_last")
        v = load_vector(v_ptr, columns, limit, "evict_last")
        top = tl.max(z, 0)
        if top > m:
            shrink = exponential(m, top, 0.5 * scale, 0.5 * scale_low)
            former = tl.where(star < 0, 0.0, (former + 1.0) * (shrink * shrink))
            former_v = tl.where(star < 0, 0.0, (former_v + v_star) * shrink)
            sum_e = sum_e * (shrink * shrink)
            sum_v = sum_v * shrink
            star = first_at(z, top, columns)
            v_star = value_at(v, columns, star)
            m = top
        root = exponential(z, finite_or_zero(m), 0.5 * scale, 0.5 * scale_low)
        # a star that is +inf stays in, and makes its row NaN
        excluded = (columns == star) & (root == 1.0)
        sum_e += tl.where(excluded, 0.0, root * root)
        sum_v += tl.where(excluded, 0.0, root * v)
    others = tl.sum(sum_e, 0) + former
    others_v = tl.sum(sum_v, 0) + former_v
    log_p, p_star, rest = star_probability(
        m, 1.0 + others, others, lse_ptr, token, scale, scale_low
    )
    rest_star = complement_of_star(log_p, p_star, rest, lse_ptr)
    root_star = tl.sqrt(p_star)
    # ⟨√p, v⟩ of the others, and of all
    others_v = root_star * others_v
    inner_product = others_v + root_star * v_star
    factor = weight * natural_rate(scale, scale_low).to(tl.float32)
    at_star = factor * (root_star * v_star * rest_star - p_star * others_v)
    tiles = tl.cdiv(classes, BLOCK)
    for i in range(tiles):
        columns = (tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        z = load_logits(z_ptr, columns, limit, "evict_first")
        v = load_vector(v_ptr, columns, limit, "evict_first")
        root = root_star * exponential(z, finite_or_zero(m), 0.5 * scale, 0.5 * scale_low)
        out = factor * root * (v - root * inner_product)
        out = tl.where(columns == star, at_star, out)
        out = tl.where(weight == 0, 0.0, out)
        tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=columns < classes)


def softmax_fisher_sqrt_matvec(
    logits: Tensor,
    v: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write w L v to out [B, S, V]; the weights come with their root already taken."""
    block, warps = launch("product", logits)
    outer, inner, classes = logits.shape
    with on_device(logits):
        sqrt_matvec_kernel[(outer * inner,)](
            logits,
            v,
            weights,
            logsumexp,
            out,
            inner,
            *logits.stride()[:2],
            *v.stride()[:2],
            *out.stride()[:2],
            classes,
            *rate(temperature),
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )


# ---- derivative of F v ------------------------------------------------------------------------


@triton.jit
def matvec_backward_kernel(
    z_ptr,
    v_ptr,
    g_ptr,
    weights_ptr,
    lse_ptr,
    out_ptr,
    inner,
    z_outer,
    z_inner,
    v_outer,
    v_inner,
    g_outer,
    g_inner,
    out_outer,
    out_inner,
    classes,
    scale,
    scale_low,
    BLOCK: tl.constexpr,
):
    """W p ((v − ⟨p, v⟩)(g − ⟨p, g⟩) − Cov(v, g)) / τ³."""
    token = tl.program_id(0)
    z_ptr += row_offset(token, inner, z_outer, z_inner)
    v_ptr += row_offset(token, inner, v_outer, v_inner)
    g_ptr += row_offset(token, inner, g_outer, g_inner)
    out_ptr += row_offset(token, inner, out_outer, out_inner)
    weight = token_weight(weights_ptr, token)
    limit = tl.where(weight == 0, 0, classes)
    m, s, v_star, g_star, mean_v, mean_g, comoment = pair_moments(
        z_ptr, v_ptr, g_ptr, limit, scale, scale_low, BLOCK
    )
    log_p, p_star, rest = star_probability(m, s, s - 1.0, lse_ptr, token, scale, scale_low)
    mass, deficit = mass_and_deficit(log_p, p_star, rest, s, lse_ptr)
    centre_v = mass * mean_v - v_star * deficit
    centre_g = mass * mean_g - g_star * deficit
    # the second term is zero where Σ p = 1
    covariance = p_star * comoment
    covariance += mass * (deficit * (mean_v + v_star)) * (deficit * (mean_g + g_star))
    inverse = natural_rate(scale, scale_low)
    factor = weight * p_star * (inverse * inverse * inverse).to(tl.float32)
    tiles = tl.cdiv(classes, BLOCK)
    for i in range(tiles):
        columns = (tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        z = load_logits(z_ptr, columns, limit, "evict_first")
        v = load_vector(v_ptr, columns, limit, "evict_first")
        g = load_vector(g_ptr, columns, limit, "evict_first")
        product = ((v - v_star) - centre_v) * ((g - g_star) - centre_g)
        out = factor * exponential(z, finite_or_zero(m), scale, scale_low) * (product - covariance)
        out = tl.where(weight == 0, 0.0, out)
        tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=columns < classes)


def softmax_fisher_matvec_backward(
    logits: Tensor,
    v: Tensor,
    grad: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write ∂⟨grad, w F v⟩/∂z to out [B, S, V]."""
    block, warps = launch("pair", logits)
    outer, inner, classes = logits.shape
    with on_device(logits):
        matvec_backward_kernel[(outer * inner,)](
            logits,
            v,
            grad,
            weights,
            logsumexp,
            out,
            inner,
            *logits.stride()[:2],
            *v.stride()[:2],
            *grad.stride()[:2],
            *out.stride()[:2],
            classes,
            *rate(temperature),
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )


AOT = (
    (product_kernel, "product", ({"ROOT": False}, {"ROOT": True})),
    (sqrt_matvec_kernel, "product", ({},)),
    (matvec_backward_kernel, "pair", ({},)),
)
