"""Bilinear forms vᵢᵀ F vⱼ = Cov_p(vᵢ, vⱼ) / τ² in one read of the logits.

v is [B, S, K, V]; one program per token and unordered pair of directions i >= j, which it writes to
both halves of out [T, K, K]. The pairs of a token are neighbours in the grid: they share its logits
in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fisherkern.kernels._common import (
    mass_and_deficit,
    natural_rate,
    pair_moments,
    pair_of,
    rate,
    row_offset,
    star_probability,
    token_mask,
)
from fisherkern.kernels._config import launch, on_device


@triton.jit
def quadratic_kernel(
    z_ptr,
    v_ptr,
    mask_ptr,
    lse_ptr,
    out_ptr,
    inner,
    z_outer,
    z_inner,
    v_outer,
    v_inner,
    v_direction,
    directions,
    pairs,
    classes,
    scale,
    scale_low,
    SINGLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Cov_p(vᵢ, vⱼ) / τ² for one token and one pair; SINGLE where K = 1."""
    program = tl.program_id(0)
    if SINGLE:
        token = program
        i = 0
        j = 0
    else:
        token = program // pairs
        i, j = pair_of(program % pairs)
    z_ptr += row_offset(token, inner, z_outer, z_inner)
    v_ptr += row_offset(token, inner, v_outer, v_inner)
    live = token_mask(mask_ptr, token)
    limit = tl.where(live, classes, 0)
    inverse = natural_rate(scale, scale_low)
    # before the loop: after it, the compiler of Triton 3.6 spills the two halves of a float64
    square = (inverse * inverse).to(tl.float32)
    if SINGLE:
        v_i = v_ptr
        v_j = v_ptr
    else:
        v_i = v_ptr + i.to(tl.int64) * v_direction
        v_j = v_ptr + j.to(tl.int64) * v_direction
    m, s, star_i, star_j, mean_i, mean_j, comoment = pair_moments(
        z_ptr, v_i, v_j, limit, scale, scale_low, BLOCK
    )
    log_p, p_star, rest = star_probability(m, s, s - 1.0, lse_ptr, token, scale, scale_low)
    mass, deficit = mass_and_deficit(log_p, p_star, rest, s, lse_ptr)
    # the second term is zero where Σ p = 1
    covariance = p_star * comoment
    covariance += mass * (deficit * (mean_i + star_i)) * (deficit * (mean_j + star_j))
    covariance = tl.where(live, covariance * square, 0.0)
    out_ptr += token.to(tl.int64) * directions * directions
    tl.store(out_ptr + i * directions + j, covariance)
    if not SINGLE:
        tl.store(out_ptr + j * directions + i, covariance)


def softmax_fisher_quadratic(
    logits: Tensor,
    v: Tensor,
    mask: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write V F Vᵀ for the rows of v [B, S, K, V] to out [T, K, K]."""
    outer, inner, directions, classes = v.shape
    pairs = directions * (directions + 1) // 2
    block, warps = launch("pair", logits)
    with on_device(logits):
        quadratic_kernel[(outer * inner * pairs,)](
            logits,
            v,
            mask,
            logsumexp,
            out,
            inner,
            *logits.stride()[:2],
            *v.stride()[:3],
            directions,
            pairs,
            classes,
            *rate(temperature),
            SINGLE=directions == 1,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )


AOT = ((quadratic_kernel, "pair", ({"SINGLE": True}, {"SINGLE": False})),)
