"""w (p − e_y) / τ at a given label y, and at one that is drawn from p.

At the label the result is −w (1 − p_y) / τ, with 1 − p_y as accurate as p (see _common.py). Both
kernels work in place: a tile is loaded and stored by the same threads, and where there is a first
pass its reductions (barriers) lie between its reads and any write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fisherkern.kernels._common import (
    _NEGATIVE_INFINITY,
    _NO_CLASS,
    complement,
    exponential,
    finite_or_zero,
    first_at,
    load_logits,
    natural_rate,
    normaliser,
    rate,
    row_factor,
    row_offset,
    token_weight,
)
from fisherkern.kernels._config import launch, on_device

IGNORE_INDEX = -100
_IGNORED = tl.constexpr(IGNORE_INDEX)


@triton.jit
def store_gradient(
    z_ptr,
    out_ptr,
    label,
    weight,
    shift,
    factor,
    rest,
    classes,
    limit,
    scale,
    scale_low,
    BLOCK: tl.constexpr,
):
    """Write w (p − e_label) / τ of one row, its last tile first."""
    weight_scaled = weight * natural_rate(scale, scale_low).to(tl.float32)
    tiles = tl.cdiv(classes, BLOCK)
    for i in range(tiles):
        columns = (tiles - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        z = load_logits(z_ptr, columns, limit, "evict_first")
        p = factor * exponential(z, shift, scale, scale_low)
        missing = complement(z, p, shift, rest)
        out = weight_scaled * tl.where(columns == label, -missing, p)
        out = tl.where(weight == 0, 0.0, out)
        tl.store(out_ptr + columns, out.to(out_ptr.dtype.element_ty), mask=columns < classes)


# ---- given labels -----------------------------------------------------------------------------


@triton.jit
def gradient_kernel(
    z_ptr,
    labels_ptr,
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
    """W (p − e_label) / τ of one token; NaN where the label is no class."""
    token = tl.program_id(0)
    z_ptr += row_offset(token, inner, z_outer, z_inner)
    out_ptr += row_offset(token, inner, out_outer, out_inner)
    label = tl.load(labels_ptr + token)
    weight = token_weight(weights_ptr, token)
    outside = (label < 0) | (label >= classes)
    weight = tl.where(outside & (weight != 0), float("nan"), weight)
    limit = tl.where(weight == 0, 0, classes)
    shift, factor, rest = normaliser(z_ptr, limit, lse_ptr, token, scale, scale_low, BLOCK)
    store_gradient(
        z_ptr,
        out_ptr,
        label,
        weight,
        shift,
        factor,
        rest,
        classes,
        limit,
        scale,
        scale_low,
        BLOCK,
    )


def softmax_fisher_gradient(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Write w (p − e_label) / τ to out [B, S, V], which may be the logits themselves."""
    block, warps = launch("scan", logits)
    outer, inner, classes = logits.shape
    with on_device(logits):
        gradient_kernel[(outer * inner,)](
            logits,
            labels,
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


# ---- drawn labels -----------------------------------------------------------------------------


@triton.jit
def philox_uniform(seed, index):
    """One float64 in [0, 1) from 53 bits of Philox-4x32-10, as `reference.philox_uniform`."""
    # counters of 64 bits would select another generator
    first, second = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    zero = tl.zeros_like(first)
    high, low, _, _ = tl.philox(seed, first, second, zero, zero)
    high = (high >> 5).to(tl.float64)
    low = (low >> 6).to(tl.float64)
    return (high * 67108864.0 + low) * (1.0 / 9007199254740992.0)


@triton.jit
def sample_kernel(
    z_ptr,
    seed_ptr,
    weights_ptr,
    lse_ptr,
    labels_ptr,
    out_ptr,
    inner,
    z_outer,
    z_inner,
    out_outer,
    out_inner,
    classes,
    scale,
    scale_low,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A label y ~ p of one token and w (p − e_y) / τ.

    y is the least class whose cumulative Σ e exceeds u Σ e. The first pass keeps the sums of the
    tiles, TILES at most; only the tile where the target falls is read again for a cumulative sum.
    """
    token = tl.program_id(0)
    z_ptr += row_offset(token, inner, z_outer, z_inner)
    out_ptr += row_offset(token, inner, out_outer, out_inner)
    weight = token_weight(weights_ptr, token)
    limit = tl.where(weight == 0, 0, classes)

    m = _NEGATIVE_INFINITY
    star = 0
    below = tl.zeros([BLOCK], tl.float32)
    ties = tl.zeros([BLOCK], tl.float32)
    tile = tl.arange(0, TILES)
    sums = tl.zeros([TILES], tl.float32)
    for start in range(0, limit, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = load_logits(z_ptr, columns, limit, "evict_last")
        top = tl.max(z, 0)
        if top > m:
            shrink = exponential(m, top, scale, scale_low)
            below = (below + ties) * shrink
            ties = tl.zeros([BLOCK], tl.float32)
            sums = sums * shrink
            star = first_at(z, top, columns)
            m = top
        e = exponential(z, finite_or_zero(m), scale, scale_low)
        below += tl.where(e == 1.0, 0.0, e)
        ties += tl.where(e == 1.0, 1.0, 0.0)
        sums = tl.where(tile == start // BLOCK, tl.sum(e, 0), sums)
    others = tl.sum(below, 0) + (tl.sum(ties, 0) - 1.0)
    s = 1.0 + others

    # the tile of the target, and what lies before it
    cumulative = tl.cumsum(sums.to(tl.float64), 0)
    index = tl.load(seed_ptr + 1) + token
    target = philox_uniform(tl.load(seed_ptr), index) * tl.max(cumulative, 0)
    chosen = tl.sum(tl.where(cumulative <= target, 1, 0), 0)
    # rounding must not lead past the last tile that has any probability
    chosen = tl.minimum(chosen, tl.max(tl.where(sums > 0, tile, 0), 0))
    before = tl.max(tl.where(tile < chosen, cumulative, 0.0), 0)

    columns = chosen * BLOCK + tl.arange(0, BLOCK)
    z = load_logits(z_ptr, columns, limit, "evict_last")
    e = exponential(z, finite_or_zero(m), scale, scale_low)
    cumulative = before + tl.cumsum(e.to(tl.float64), 0)
    label = tl.min(tl.where((cumulative > target) & (e > 0), columns, _NO_CLASS), 0)
    # the tile sums rounded differently: its last class with any probability, or the arg-max
    last = tl.max(tl.where(e > 0, columns, -1), 0)
    label = tl.where(label == _NO_CLASS, tl.where(last < 0, star, last), label)
    # no distribution: NaN or +inf in the row, or nothing but −inf
    none = (s != s) | (m == _NEGATIVE_INFINITY) | (weight == 0)
    label = tl.where(none, _IGNORED, label)
    tl.store(labels_ptr + token, label.to(tl.int64))

    shift, factor, rest = row_factor(m, s, others, lse_ptr, token, scale, scale_low)
    store_gradient(
        z_ptr,
        out_ptr,
        label,
        weight,
        shift,
        factor,
        rest,
        classes,
        limit,
        scale,
        scale_low,
        BLOCK,
    )


def _tiles(classes: int, block: int) -> int:
    """The constant TILES: the tiles of a row, to a power of two."""
    return triton.next_power_of_2(triton.cdiv(classes, block))


def softmax_fisher_sample(
    logits: Tensor,
    seed: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    labels: Tensor,
    out: Tensor,
) -> None:
    """Write labels [T] ~ p, −100 where there is none, and w (p − e_label) / τ to out [B, S, V]."""
    block, warps = launch("sample", logits)
    outer, inner, classes = logits.shape
    with on_device(logits):
        sample_kernel[(outer * inner,)](
            logits,
            seed,
            weights,
            logsumexp,
            labels,
            out,
            inner,
            *logits.stride()[:2],
            *out.stride()[:2],
            classes,
            *rate(temperature),
            TILES=_tiles(classes, block),
            BLOCK=block,
            num_warps=warps,
            enable_fp_fusion=True,
        )


AOT = (
    (gradient_kernel, "scan", ({},)),
    # a rule without a limit: the 262144 classes of Gemma
    (
        sample_kernel,
        "sample",
        ({"TILES": lambda rule: _tiles(min(rule.classes, 262144), rule.launch.block)},),
    ),
)
