"""Per-token scalars in one read of the logits: logsumexp, entropy, trace, tr F² and max p.

One program per token, or, where tokens are fewer than the device has room for, several programs per
token that leave their moments in partial [T, 6, splits] for a finaliser. With the star apart (see
_common.py), ε = Σ' p, Q = Σ' p², C = Σ' p³ over the other classes, nothing cancels:

    tr F · τ² = p* (1 − p*) + ε − Q,   tr F² · τ⁴ = p*² (1 − p*)² + Q − 2 C + 2 p*² Q + Q²,
    entropy = Σ' p log(p* / p) − Σp log p*.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.kernels._common import (
    _LN2,
    _NEGATIVE_INFINITY,
    _POSITIVE_INFINITY,
    exponential,
    log1p,
    natural_rate,
    raised_by,
    rate,
    row_moments,
    row_offset,
    star_probability,
    token_mask,
)
from fisherkern.kernels._config import ROW_SPLITS, launch, on_device, row_splits


@triton.jit
def store_statistics(
    out_ptr,
    lse_ptr,
    token,
    live,
    m,
    ties,
    s1,
    s2,
    s3,
    surprise,
    scale,
    scale_low,
    FULL: tl.constexpr,
):
    """Write the trace of a token to out [T], or where FULL its five statistics to out [T, 5]."""
    others = s1 + (ties - 1.0)
    log_p, p, rest = star_probability(m, 1.0 + others, others, lse_ptr, token, scale, scale_low)
    epsilon = others * p
    q = (s2 + (ties - 1.0)) * (p * p)
    inverse = natural_rate(scale, scale_low)
    square = inverse * inverse
    trace = (p * rest + (epsilon - q)) * square.to(tl.float32)
    if FULL:
        c = (s3 + (ties - 1.0)) * (p * p * p)
        if lse_ptr is None:
            logsumexp = (m * inverse + log1p(others)).to(tl.float32)
            # inf − inf made a NaN of the sum
            logsumexp = tl.where(m == _POSITIVE_INFINITY, m, logsumexp)
        else:
            logsumexp = tl.load(lse_ptr + token)
        entropy = p * (surprise * _LN2) - log_p * (p * (1.0 + others))
        # p log p is zero at p = 0
        entropy = tl.where(p == 0, 0.0, entropy)
        squared = (p * rest) * (p * rest) + (q - 2.0 * c) + q * (2.0 * p * p + q)
        out_ptr += token.to(tl.int64) * 5
        tl.store(out_ptr, tl.where(live, logsumexp, 0.0))
        tl.store(out_ptr + 1, tl.where(live, entropy, 0.0))
        tl.store(out_ptr + 2, tl.where(live, trace, 0.0))
        tl.store(
            out_ptr + 3,
            tl.where(live, squared * square.to(tl.float32) * square.to(tl.float32), 0.0),
        )
        tl.store(out_ptr + 4, tl.where(live, p, 0.0))
    else:
        tl.store(out_ptr + token, tl.where(live, trace, 0.0))


@triton.jit
def statistics_kernel(
    z_ptr,
    mask_ptr,
    lse_ptr,
    partial_ptr,
    out_ptr,
    inner,
    z_outer,
    z_inner,
    classes,
    splits,
    classes_per_split,
    scale,
    scale_low,
    FULL: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The moments of one split of a token to partial or, of a WHOLE row, its statistics to out."""
    program = tl.program_id(0)
    token = program // splits
    split = program % splits
    z_ptr += row_offset(token, inner, z_outer, z_inner)
    live = token_mask(mask_ptr, token)
    begin = split * classes_per_split
    limit = tl.where(live, tl.minimum(begin + classes_per_split, classes), 0)
    m, ties, s1, s2, s3, surprise = row_moments(z_ptr, begin, limit, scale, scale_low, BLOCK, FULL)
    if WHOLE:
        store_statistics(
            out_ptr,
            lse_ptr,
            token,
            live,
            m,
            ties,
            s1,
            s2,
            s3,
            surprise,
            scale,
            scale_low,
            FULL,
        )
    else:
        partial_ptr += token.to(tl.int64) * splits * 6 + split
        tl.store(partial_ptr, m)
        tl.store(partial_ptr + splits, ties)
        tl.store(partial_ptr + 2 * splits, s1)
        tl.store(partial_ptr + 3 * splits, s2)
        tl.store(partial_ptr + 4 * splits, s3)
        tl.store(partial_ptr + 5 * splits, surprise)


@triton.jit
def merge_statistics_kernel(
    partial_ptr,
    mask_ptr,
    lse_ptr,
    out_ptr,
    splits,
    scale,
    scale_low,
    FULL: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """The statistics of one token from the moments of its splits, at most SPLITS."""
    token = tl.program_id(0)
    live = token_mask(mask_ptr, token)
    split = tl.arange(0, SPLITS)
    there = split < splits
    partial_ptr += token.to(tl.int64) * splits * 6
    top = tl.load(partial_ptr + split, mask=there, other=_NEGATIVE_INFINITY)
    ties = tl.load(partial_ptr + splits + split, mask=there, other=0.0)
    s1 = tl.load(partial_ptr + 2 * splits + split, mask=there, other=0.0)
    s2 = tl.load(partial_ptr + 3 * splits + split, mask=there, other=0.0)
    s3 = tl.load(partial_ptr + 4 * splits + split, mask=there, other=0.0)
    surprise = tl.load(partial_ptr + 5 * splits + split, mask=there, other=0.0)
    m = tl.max(top, 0)
    # as in `row_moments`: the ties of a split below the maximum join its rest
    rise = tl.where(top == m, 0.0, raised_by(top, m, scale))
    shrink = tl.where(top == m, 1.0, exponential(top, m, scale, scale_low))
    joining = tl.where(top == m, 0.0, ties)
    s1 += joining
    surprise = tl.sum((surprise + s1 * rise) * shrink, 0)
    s3 = tl.sum((s3 + joining) * (shrink * shrink * shrink), 0)
    s2 = tl.sum((s2 + joining) * (shrink * shrink), 0)
    s1 = tl.sum(s1 * shrink, 0)
    ties = tl.sum(ties - joining, 0)
    store_statistics(
        out_ptr,
        lse_ptr,
        token,
        live,
        m,
        ties,
        s1,
        s2,
        s3,
        surprise,
        scale,
        scale_low,
        FULL,
    )


def _statistics(
    logits: Tensor,
    mask: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
    full: bool,
) -> None:
    block, warps = launch("scan", logits)
    outer, inner, classes = logits.shape
    tokens = outer * inner
    tiles = triton.cdiv(classes, block)
    classes_per_split = block * triton.cdiv(tiles, row_splits(tokens, tiles))
    splits = triton.cdiv(classes, classes_per_split)
    partial = None
    scale = rate(temperature)
    if splits > 1:
        partial = torch.empty(tokens, 6, splits, dtype=torch.float32, device=logits.device)
    with on_device(logits):
        statistics_kernel[(tokens * splits,)](
            logits,
            mask,
            logsumexp,
            partial,
            out,
            inner,
            *logits.stride()[:2],
            classes,
            splits,
            classes_per_split,
            *scale,
            FULL=full,
            WHOLE=splits == 1,
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )
        if partial is not None:
            merge_statistics_kernel[(tokens,)](
                partial,
                mask,
                logsumexp,
                out,
                splits,
                *scale,
                FULL=full,
                SPLITS=ROW_SPLITS,
                num_warps=1,
                enable_fp_fusion=True,
            )


def softmax_fisher_trace(
    logits: Tensor,
    mask: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write Σ p (1 − p) / τ² to out [T]."""
    _statistics(logits, mask, logsumexp, temperature, out, full=False)


def softmax_fisher_stats(
    logits: Tensor,
    mask: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write logsumexp, entropy, trace, tr F² and max p to out [T, 5]."""
    _statistics(logits, mask, logsumexp, temperature, out, full=True)


AOT = (
    (
        statistics_kernel,
        "scan",
        (
            {"FULL": False, "WHOLE": True},
            {"FULL": False, "WHOLE": False},
            {"FULL": True, "WHOLE": True},
            {"FULL": True, "WHOLE": False},
        ),
    ),
    (
        merge_statistics_kernel,
        None,
        ({"FULL": False, "SPLITS": ROW_SPLITS}, {"FULL": True, "SPLITS": ROW_SPLITS}),
    ),
)
