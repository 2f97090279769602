"""∂(Σ grad · statistics)/∂z, from the logits and the saved logsumexp.

With a = −g_H log p − 2 g_tr p / τ² + g_tr2 (2p − 6p² + 4p Σp²) / τ⁴ the result is
p (g_lse + a − ⟨p, a⟩) / τ, and g_max p* (e* − p) / τ for the largest probability. On a certain row
a* and ⟨p, a⟩ agree to all digits, so everything is taken relative to the arg-max: b = a − a*, and
⟨p, b⟩ in closed form from the sums over the other classes (notation of softmax_fisher_stats.py).
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fisherkern.kernels._common import (
    _LN2,
    _NEGATIVE_INFINITY,
    complement_of_star,
    exponential,
    finite_or_zero,
    load_logits,
    mass_and_deficit,
    natural_rate,
    raised_by,
    rate,
    row_moments,
    row_offset,
    star_probability,
    token_mask,
)
from fisherkern.kernels._config import launch, on_device


@triton.jit
def stats_backward_kernel(
    z_ptr,
    stats_ptr,
    grad_ptr,
    mask_ptr,
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
    """The gradient of one token; stats and grad are [T, 5]."""
    token = tl.program_id(0)
    z_ptr += row_offset(token, inner, z_outer, z_inner)
    out_ptr += row_offset(token, inner, out_outer, out_inner)
    live = token_mask(mask_ptr, token)
    limit = tl.where(live, classes, 0)
    m, ties, s1, s2, s3, surprise = row_moments(z_ptr, 0, limit, scale, scale_low, BLOCK, True)

    saved = token.to(tl.int64) * 5
    grad_ptr += saved
    inverse = natural_rate(scale, scale_low)
    inverse2 = inverse * inverse
    g_lse = tl.load(grad_ptr)
    g_entropy = tl.load(grad_ptr + 1)
    g_trace = tl.load(grad_ptr + 2) * inverse2.to(tl.float32)
    g_squared = tl.load(grad_ptr + 3) * (inverse2 * inverse2).to(tl.float32)
    g_max = tl.load(grad_ptr + 4)

    others = s1 + (ties - 1.0)
    log_p, p_star, rest = star_probability(
        m, 1.0 + others, others, stats_ptr, saved, scale, scale_low
    )
    _, deficit = mass_and_deficit(log_p, p_star, rest, 1.0 + others, stats_ptr)
    missing = complement_of_star(log_p, p_star, rest, stats_ptr)
    p2 = p_star * p_star
    # Σ' p (p − p*) and Σ' p (p² − p*²)
    q = (s2 + (ties - 1.0)) * p2
    below = q - p2 * others
    below2 = (s3 + (ties - 1.0)) * (p2 * p_star) - p2 * p_star * others
    # b = −g_H log(p / p*) + (p − p*) (linear + square (p + p*))
    linear = g_squared * (2.0 + 4.0 * (p2 + q)) - 2.0 * g_trace
    square = -6.0 * g_squared
    mean_b = g_entropy * (p_star * (surprise * _LN2)) + linear * below + square * below2
    # what is left of a* where Σ p is not one
    log_p = tl.where(log_p == _NEGATIVE_INFINITY, 0.0, log_p)
    a_star = p_star * (linear + square * p_star) - g_entropy * log_p
    constant = g_lse + (a_star * deficit - mean_b)
    # ties share the derivative of the largest: 1 / ties − p*
    at_top = g_max * p_star * ((missing - p_star * (ties - 1.0)) / ties)
    below_top = -g_max * p_star

    tiles = tl.cdiv(classes, BLOCK)
    for i in range(tiles):
        columns = (tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        z = load_logits(z_ptr, columns, limit, "evict_first")
        p = p_star * exponential(z, finite_or_zero(m), scale, scale_low)
        b = (p - p_star) * (linear + square * (p + p_star))
        b += g_entropy * (_LN2 * raised_by(z, m, scale))
        out = p * (constant + b) + tl.where(z == m, at_top, below_top * p)
        out = tl.where(live, out * inverse.to(tl.float32), 0.0)
        tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=columns < classes)


def softmax_fisher_stats_backward(
    logits: Tensor,
    stats: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write ∂(Σ grad · stats)/∂z to out [B, S, V] for stats and grad [T, 5]."""
    block, warps = launch("product", logits)
    outer, inner, classes = logits.shape
    with on_device(logits):
        stats_backward_kernel[(outer * inner,)](
            logits,
            stats,
            grad,
            mask,
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


AOT = ((stats_backward_kernel, "product", ({},)),)
