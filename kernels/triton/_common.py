"""Device functions that kernels share, most of them those of the softmax Fisher.

Notation: z logits of one token (a row), τ temperature, m = max z, `scale` = log2(e) / τ with
`scale_low` its rounding error, e = exp2((z − m) · scale) ≤ 1, s = Σ e, p = e / s. Subtracting m
before scaling keeps a difference of nearby logits exact. The arg-max of a row is its *star*, marked
*: e* = 1, p* = 1 / s.

1 − p* is `others` / s, where others = Σ e without one star: never 1 − p*, which cancels when the
model is certain. Classes tied with the maximum have e = 1 exactly, so they are counted, and
others = Σ_{z < m} e + (ties − 1) needs no index. A NaN is not equal to the maximum, so it enters
the sum of the rest and makes the row NaN; so does +inf, as inf − inf.

Where `logsumexp` is given, p = exp(z / τ − logsumexp) need not sum to one (a row may be one shard
of a larger one); then Σ p is the `mass` and 1 − Σ p the `deficit`.
"""

import ctypes
import math

import triton
import triton.language as tl

_LOG2E = math.log2(math.e)
_LN2 = tl.constexpr(math.log(2.0))
_NEGATIVE_INFINITY = tl.constexpr(float("-inf"))
_POSITIVE_INFINITY = tl.constexpr(float("inf"))
_NO_CLASS = tl.constexpr(2**31 - 1)
# exp2 of anything below is zero in float32
_UNDERFLOW = tl.constexpr(256.0)


def rate(temperature: float) -> tuple[float, float]:
    """log2(e) / τ as a float32, and what that rounding left out: arguments `scale`, `scale_low`."""
    exact = _LOG2E / temperature
    scale = ctypes.c_float(exact).value
    return scale, exact - scale


@triton.jit
def pair_of(index):
    """Row i and column j <= i of the lower triangle at i (i + 1) / 2 + j = index."""
    i = ((tl.sqrt(8.0 * index.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    # the root may be off by one
    i = tl.where(i * (i + 1) // 2 > index, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= index, i + 1, i)
    return i, index - i * (i + 1) // 2


@triton.jit
def row_offset(token, inner, outer_stride, inner_stride):
    """Offset of a token's row in a [B, S, V] view with S = inner, in 64 bits."""
    outer = (token // inner).to(tl.int64)
    return outer * outer_stride + (token % inner).to(tl.int64) * inner_stride


@triton.jit
def load_logits(row_ptr, columns, limit, EVICTION: tl.constexpr):
    """A tile of logits in float32, −inf (probability zero) past `limit`."""
    z = tl.load(
        row_ptr + columns,
        mask=columns < limit,
        other=_NEGATIVE_INFINITY,
        eviction_policy=EVICTION,
    )
    return z.to(tl.float32)


@triton.jit
def load_vector(row_ptr, columns, limit, EVICTION: tl.constexpr):
    """A tile of a vector over classes in float32, zero past `limit`."""
    v = tl.load(row_ptr + columns, mask=columns < limit, other=0.0, eviction_policy=EVICTION)
    return v.to(tl.float32)


@triton.jit
def token_weight(weights_ptr, token):
    """The weight of a token, one where there are none."""
    if weights_ptr is None:
        return tl.full([], 1.0, tl.float32)
    else:
        return tl.load(weights_ptr + token)


@triton.jit
def token_mask(mask_ptr, token):
    """Whether a token counts."""
    if mask_ptr is None:
        return tl.full([], 1, tl.int32) != 0
    else:
        return tl.load(mask_ptr + token) != 0


@triton.jit
def finite_or_zero(m):
    """The maximum of a row, or zero while all of it is −inf: then e = 0, not exp(−inf + inf)."""
    return tl.where(m == _NEGATIVE_INFINITY, 0.0, m)


@triton.jit
def exponential(z, m, scale, scale_low):
    """exp2((z − m) · (scale + scale_low)), one or two units in the last place off.

    exp2 of the rounded product is off by |z − m| such units, which plain PyTorch is not; the
    remainder of the product makes up for it. The bound keeps it finite and the result zero.
    """
    # by name: what the interpreter of Triton 3.8 makes of a constant over a tensor is neither
    lowest = tl.fdiv(-_UNDERFLOW, scale)
    difference = tl.maximum(z - m, lowest, propagate_nan=tl.PropagateNan.ALL)
    product = difference * scale
    remainder = tl.fma(difference, scale, -product) + difference * scale_low
    e = tl.exp2(product)
    return e + e * (remainder * _LN2)


@triton.jit
def natural_rate(scale, scale_low):
    """1 / τ in float64."""
    return (scale.to(tl.float64) + scale_low) * _LN2


@triton.jit
def raised_by(m, top, scale):
    """(top − m) · scale, bounded so that its product with an exponential of zero is zero."""
    return tl.minimum((top - m) * scale, _UNDERFLOW)


@triton.jit
def first_at(z, top, columns):
    """The first class of a tile whose logit is `top`."""
    return tl.min(tl.where(z == top, columns, _NO_CLASS), 0)


@triton.jit
def value_at(v, columns, column):
    """V of one class of a tile."""
    return tl.sum(tl.where(columns == column, v, 0.0), 0)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0 to full relative accuracy: 2 atanh(x / (2 + x)) below one."""
    y = x / (2.0 + x)
    y2 = y * y
    series = 1.0 / 11 + y2 * (1.0 / 13 + y2 * (1.0 / 15))
    series = 1.0 / 5 + y2 * (1.0 / 7 + y2 * (1.0 / 9 + y2 * series))
    series = 2.0 * y * (1.0 + y2 * (1.0 / 3 + y2 * series))
    return tl.where(x < 1.0, series, tl.log(1.0 + x))


@triton.jit
def complement_of_exp(x, exp_x):
    """1 − exp(x) to full relative accuracy: the Taylor series of expm1 near zero."""
    series = 1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040)))
    series = x * (1.0 + x * (0.5 + x * (1.0 / 6 + x * series)))
    return tl.where(tl.abs(x) < 0.25, -series, 1.0 - exp_x)


@triton.jit
def exponential_sums(row_ptr, limit, scale, scale_low, BLOCK: tl.constexpr):
    """One read of a row: m, s, and others."""
    m = _NEGATIVE_INFINITY
    rest = tl.zeros([BLOCK], tl.float32)
    ties = tl.zeros([BLOCK], tl.float32)
    for start in range(0, limit, BLOCK):
        z = load_logits(row_ptr, start + tl.arange(0, BLOCK), limit, "evict_last")
        top = tl.max(z, 0)
        if top > m:
            # former ties are below the new maximum: they join the rest
            rest = (rest + ties) * exponential(m, top, scale, scale_low)
            ties = tl.zeros([BLOCK], tl.float32)
            m = top
        e = exponential(z, finite_or_zero(m), scale, scale_low)
        rest += tl.where(e == 1.0, 0.0, e)
        ties += tl.where(e == 1.0, 1.0, 0.0)
    others = tl.sum(rest, 0) + (tl.sum(ties, 0) - 1.0)
    return m, 1.0 + others, others


@triton.jit
def star_probability(m, s, others, lse_ptr, token, scale, scale_low):
    """Log p*, p* and the Σ' p of the others; NaN where all is −inf and there is no logsumexp."""
    if lse_ptr is None:
        log_p = -log1p(others)
        p = tl.where(m == _NEGATIVE_INFINITY, float("nan"), 1.0 / s)
    else:
        # in float64, since the difference of two large numbers decides
        log_p = m * natural_rate(scale, scale_low) - tl.load(lse_ptr + token)
        log_p = log_p.to(tl.float32)
        p = tl.exp(log_p)
    return log_p, p, others * p


@triton.jit
def complement_of_star(log_p, p, rest, lse_ptr):
    """1 − p*, which is the sum of the others only if p sums to one."""
    if lse_ptr is None:
        return rest
    else:
        return complement_of_exp(log_p, p)


@triton.jit
def mass_and_deficit(log_p, p, rest, s, lse_ptr):
    """Σ p and 1 − Σ p, which are one and zero unless a logsumexp was given."""
    if lse_ptr is None:
        return tl.full([], 1.0, tl.float32), tl.full([], 0.0, tl.float32)
    else:
        return p * s, complement_of_exp(log_p, p) - rest


@triton.jit
def row_factor(m, s, others, lse_ptr, token, scale, scale_low):
    """Shift, factor and rest: p = factor · exp2((z − shift) · scale), and Σ' p for `complement`."""
    _, p, rest = star_probability(m, s, others, lse_ptr, token, scale, scale_low)
    if lse_ptr is not None:
        # only the class at +inf is NaN then, and the others are certain not to be
        p = tl.where(tl.load(lse_ptr + token) == _POSITIVE_INFINITY, 0.0, p)
    return finite_or_zero(m), p, rest


@triton.jit
def normaliser(row_ptr, limit, lse_ptr, token, scale, scale_low, BLOCK: tl.constexpr):
    """One read of a row: what `row_factor` returns."""
    m, s, others = exponential_sums(row_ptr, limit, scale, scale_low, BLOCK)
    return row_factor(m, s, others, lse_ptr, token, scale, scale_low)


@triton.jit
def complement(z, p, shift, rest):
    """1 − p, by definition the sum of the others for the most likely class."""
    return tl.where(z == shift, rest, 1.0 - p)


@triton.jit
def given_normaliser(lse, scale, scale_low):
    """Shift and factor with p = factor · exp((z − shift) / τ), from the logsumexp alone.

    The shift is logsumexp · τ rounded; the factor corrects for that rounding.
    """
    inverse = natural_rate(scale, scale_low)
    shift = (lse / inverse).to(tl.float32)
    log_factor = (shift * inverse - lse).to(tl.float32)
    # inf − inf: z − shift alone decides
    log_factor = tl.where(lse == _POSITIVE_INFINITY, 0.0, log_factor)
    return shift, tl.exp(log_factor)


@triton.jit
def weighted_mean(z_ptr, v_ptr, limit, scale, scale_low, BLOCK: tl.constexpr):
    """One read of logits and v: m, s, v*, and the e-weighted mean of v − v*.

    v* is v at the first arg-max. Centring there leaves the mean of a certain row as small as the
    probability of its other classes, so that v − mean does not cancel.
    """
    m = _NEGATIVE_INFINITY
    v_star = 0.0
    s = tl.zeros([BLOCK], tl.float32)
    sum_v = tl.zeros([BLOCK], tl.float32)
    for start in range(0, limit, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = load_logits(z_ptr, columns, limit, "evict_last")
        v = load_vector(v_ptr, columns, limit, "evict_last")
        top = tl.max(z, 0)
        if top > m:
            v_top = value_at(v, columns, first_at(z, top, columns))
            shrink = exponential(m, top, scale, scale_low)
            sum_v = (sum_v + s * (v_star - v_top)) * shrink
            s = s * shrink
            v_star = v_top
            m = top
        e = exponential(z, finite_or_zero(m), scale, scale_low)
        s += e
        sum_v += e * (v - v_star)
    total = tl.sum(s, 0)
    # an empty sum: every logit is −inf
    mean = tl.where(total == 0, 0.0, tl.sum(sum_v, 0) / total)
    return m, total, v_star, mean


@triton.jit
def pair_moments(z_ptr, v_ptr, g_ptr, limit, scale, scale_low, BLOCK: tl.constexpr):
    """One read of logits, v and g: m, s, v*, g*, their means less v*, g*, and Σ e (v − v̄)(g − ḡ).

    Tiles are centred at their own means and merged as Chan, Golub & LeVeque 1983 do: a difference
    of raw moments would cancel.
    """
    m = _NEGATIVE_INFINITY
    s = 0.0
    v_star = 0.0
    g_star = 0.0
    mean_v = 0.0
    mean_g = 0.0
    comoment = 0.0
    for start in range(0, limit, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        z = load_logits(z_ptr, columns, limit, "evict_last")
        v = load_vector(v_ptr, columns, limit, "evict_last")
        g = load_vector(g_ptr, columns, limit, "evict_last")
        top = tl.max(z, 0)
        if top > m:
            first = first_at(z, top, columns)
            v_top = value_at(v, columns, first)
            g_top = value_at(g, columns, first)
            shrink = exponential(m, top, scale, scale_low)
            s = s * shrink
            comoment = comoment * shrink
            # an empty state keeps mean zero, or its shift would only add rounding
            mean_v = tl.where(s == 0, 0.0, mean_v + (v_star - v_top))
            mean_g = tl.where(s == 0, 0.0, mean_g + (g_star - g_top))
            v_star = v_top
            g_star = g_top
            m = top
        e = exponential(z, finite_or_zero(m), scale, scale_low)
        v = v - v_star
        g = g - g_star
        tile_s = tl.sum(e, 0)
        inverse = tl.where(tile_s == 0, 0.0, 1.0 / tile_s)
        tile_v = tl.sum(e * v, 0) * inverse
        tile_g = tl.sum(e * g, 0) * inverse
        step_v = tile_v - mean_v
        step_g = tile_g - mean_g
        total = s + tile_s
        share = tl.where(tile_s == 0, 0.0, tile_s / total)
        comoment += tl.sum(e * (v - tile_v) * (g - tile_g), 0) + step_v * step_g * (s * share)
        mean_v += step_v * share
        mean_g += step_g * share
        s = total
    return m, s, v_star, g_star, mean_v, mean_g, comoment


@triton.jit
def row_moments(row_ptr, begin, limit, scale, scale_low, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Sums over classes [begin, limit) below their maximum m, for the scalars of a row.

    Returns m, the number of classes at m, and over the others Σ e, Σ e² and, where FULL, Σ e³ and
    Σ e log2(1 / e).
    """
    m = _NEGATIVE_INFINITY
    ties = tl.zeros([BLOCK], tl.float32)
    s1 = tl.zeros([BLOCK], tl.float32)
    s2 = tl.zeros([BLOCK], tl.float32)
    s3 = tl.zeros([BLOCK], tl.float32)
    surprise = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, limit, BLOCK):
        z = load_logits(row_ptr, start + tl.arange(0, BLOCK), limit, "evict_first")
        top = tl.max(z, 0)
        if top > m:
            rise = raised_by(m, top, scale)
            shrink = tl.exp2(-rise)
            s1 += ties
            surprise = (surprise + s1 * rise) * shrink
            s2 = (s2 + ties) * (shrink * shrink)
            s3 = (s3 + ties) * (shrink * shrink * shrink)
            s1 = s1 * shrink
            ties = tl.zeros([BLOCK], tl.float32)
            m = top
        e = exponential(z, finite_or_zero(m), scale, scale_low)
        ties += tl.where(e == 1.0, 1.0, 0.0)
        e = tl.where(e == 1.0, 0.0, e)
        s1 += e
        s2 += e * e
        if FULL:
            s3 += e * e * e
            surprise += e * raised_by(z, m, scale)
    return (
        m,
        tl.sum(ties, 0),
        tl.sum(s1, 0),
        tl.sum(s2, 0),
        tl.sum(s3, 0),
        tl.sum(surprise, 0),
    )
