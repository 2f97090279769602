"""The softmax Fisher ops by their definition.

Notation: T tokens (all leading dimensions flattened), V classes, z logits, τ temperature,
p = softmax(z / τ), w token weights, N = Σ w; F_t = (diag p_t − p_t p_tᵀ) / τ².
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherkern.reference.tokens import accumulation_dtype, normalised, token_weights

# Label of a token that has none; the default `ignore_index` of torch.nn.functional.cross_entropy.
IGNORE_INDEX = -100


class SoftmaxFisherStats(NamedTuple):
    """Per-token statistics of p = softmax(z / τ), each of the leading shape of the logits."""

    logsumexp: Tensor
    """log Σ exp(z / τ), in nats."""
    entropy: Tensor
    """−Σ p log p, in nats."""
    trace: Tensor
    """tr F = Σ p (1 − p) / τ²."""
    trace_squared: Tensor
    """tr F² = (Σ p² − 2 Σ p³ + (Σ p²)²) / τ⁴."""
    max_probability: Tensor
    """max p."""


def _scaled_logits(logits: Tensor, temperature: float, weights: Tensor | None) -> Tensor:
    """Z / τ in float64, with the rows of weight zero replaced by zeros."""
    x = logits.double() / temperature
    return x if weights is None else torch.where((weights == 0)[..., None], 0.0, x)


def _probabilities(x: Tensor, logsumexp: Tensor | None) -> Tensor:
    return torch.softmax(x, -1) if logsumexp is None else torch.exp(x - logsumexp[..., None])


def _complement(p: Tensor) -> Tensor:
    """1 − p, where that of the most likely class is the sum of the others: 1 − p would cancel."""
    if p.shape[-1] == 0:
        return p
    top = p.argmax(-1, keepdim=True)
    others = p.scatter(-1, top, 0.0).sum(-1, keepdim=True)
    # p - p is zero, or the NaN that the scatter may have covered
    return (1 - p).scatter(-1, top, others) + (p - p)


def _weighted(rows: Tensor, weights: Tensor | None) -> Tensor:
    """Rows [..., V] times w [...]; exactly zero where w = 0, whatever the row (or v) holds."""
    if weights is None:
        return rows
    w = weights[..., None]
    return torch.where(w == 0, 0.0, rows * w)


def _over_tokens(rows: Tensor) -> Tensor:
    return rows.reshape(rows.shape[:-1].numel(), rows.shape[-1]).sum(0)


def _reduced(values: Tensor, weights: Tensor | None, logits: Tensor, reduction: str) -> Tensor:
    """Per-token scalars [...] times their weights, then `reduction` over tokens."""
    w = normalised(weights, logits, reduction)
    if w is not None:
        values = torch.where(w == 0, 0.0, values * w)
    values = values if reduction == "none" else values.sum()
    return values.to(accumulation_dtype(logits.dtype))


def softmax_fisher_matvec(
    logits: Tensor,
    v: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> Tensor:
    """W F v = w p ⊙ (v − ⟨p, v⟩) / τ²."""
    w = token_weights(logits, mask, weights)
    p = _probabilities(_scaled_logits(logits, temperature, w), logsumexp)
    v = v.to(p.dtype)
    fv = p * (v - (p * v).sum(-1, keepdim=True)) / temperature**2
    return _weighted(fv, w).to(logits.dtype)


def softmax_fisher_matvec_backward(
    logits: Tensor,
    v: Tensor,
    grad: Tensor,
    *,
    temperature: float = 1.0,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> Tensor:
    """∂⟨grad, w F v⟩/∂z = w (a − p Σ a) / τ³ with a = p ⊙ (v − ⟨p, v⟩) ⊙ (grad − ⟨p, grad⟩).

    The third cumulant of p contracted with v and grad: symmetric and linear in both.
    """
    p = _probabilities(_scaled_logits(logits, temperature, weights), logsumexp)
    v, grad = v.to(p.dtype), grad.to(p.dtype)
    a = p * (v - (p * v).sum(-1, keepdim=True)) * (grad - (p * grad).sum(-1, keepdim=True))
    return _weighted((a - p * a.sum(-1, keepdim=True)) / temperature**3, weights).to(logits.dtype)


def softmax_fisher_sqrt_matvec(
    logits: Tensor,
    v: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> Tensor:
    """√w L v = √w (√p ⊙ v − p ⟨√p, v⟩) / τ, where L Lᵀ = F."""
    w = token_weights(logits, mask, weights)
    p = _probabilities(_scaled_logits(logits, temperature, w), logsumexp)
    root, v = p.sqrt(), v.to(p.dtype)
    lv = (root * v - p * (root * v).sum(-1, keepdim=True)) / temperature
    return _weighted(lv, None if w is None else w.sqrt()).to(logits.dtype)


def softmax_fisher_sqrt_rmatvec(
    logits: Tensor,
    v: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> Tensor:
    """√w Lᵀ v = √w √p ⊙ (v − ⟨p, v⟩) / τ, where L Lᵀ = F."""
    w = token_weights(logits, mask, weights)
    p = _probabilities(_scaled_logits(logits, temperature, w), logsumexp)
    v = v.to(p.dtype)
    ltv = p.sqrt() * (v - (p * v).sum(-1, keepdim=True)) / temperature
    return _weighted(ltv, None if w is None else w.sqrt()).to(logits.dtype)


def softmax_fisher_quadratic(
    logits: Tensor,
    v: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """W vᵀ F v = w Var_p(v) / τ²; K directions [..., K, V] give their covariance [..., K, K]."""
    w = token_weights(logits, mask, weights)
    p = _probabilities(_scaled_logits(logits, temperature, w), logsumexp)[..., None, :]
    directions = v if v.ndim > logits.ndim else v.expand(logits.shape)[..., None, :]
    directions = directions.to(p.dtype)
    c = directions - (p * directions).sum(-1, keepdim=True)
    covariance = (p * c) @ c.mT / temperature**2
    w = normalised(w, logits, reduction)
    if w is not None:
        covariance = torch.where((w == 0)[..., None, None], 0.0, covariance * w[..., None, None])
    if reduction != "none":
        *lead, K, _ = covariance.shape
        covariance = covariance.reshape(math.prod(lead), K, K).sum(0)
    covariance = covariance.to(accumulation_dtype(logits.dtype))
    return covariance if v.ndim > logits.ndim else covariance[..., 0, 0]


def softmax_fisher_diagonal(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """W p (1 − p) / τ² per token, or summed or averaged over tokens to [V]."""
    w = token_weights(logits, mask, weights)
    p = _probabilities(_scaled_logits(logits, temperature, w), logsumexp)
    rows = _weighted(p * _complement(p) / temperature**2, normalised(w, logits, reduction))
    if reduction == "none":
        return rows.to(logits.dtype)
    return _over_tokens(rows).to(accumulation_dtype(logits.dtype))


def softmax_fisher_mean_probs(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """D̄ = Σ w p / N, the diagonal part of the mean Fisher (τ = 1), or Σ w p."""
    w = token_weights(logits, mask, weights)
    p = _probabilities(_scaled_logits(logits, temperature, w), logsumexp)
    total = _over_tokens(_weighted(p, normalised(w, logits, reduction)))
    return total.to(accumulation_dtype(logits.dtype))


def softmax_fisher_trace(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """W tr F = w Σ p (1 − p) / τ²."""
    w = token_weights(logits, mask, weights)
    p = _probabilities(_scaled_logits(logits, temperature, w), logsumexp)
    return _reduced((p * _complement(p)).sum(-1) / temperature**2, w, logits, reduction)


def softmax_fisher_stats(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> SoftmaxFisherStats:
    """W times the logsumexp, entropy, trace, tr F² and largest probability of each token."""
    w = token_weights(logits, mask, weights)
    x = _scaled_logits(logits, temperature, w)
    if logsumexp is None:
        lse, log_p = torch.logsumexp(x, -1), torch.log_softmax(x, -1)
    else:
        lse, log_p = logsumexp, x - logsumexp[..., None]
    p = _probabilities(x, logsumexp)
    rest = _complement(p)
    # p log p → 0 at p = 0, where log p is −inf; `where` on both sides keeps autograd finite too
    entropy = -(p * torch.where(p > 0, log_p, torch.where(p == 0, 0.0, log_p))).sum(-1)
    largest = p.amax(-1) if p.shape[-1] else torch.zeros_like(lse)
    # tr F² = Σ_i p_i² ((1 − p_i)² + Σ_{j≠i} p_j²); without the largest class nothing cancels
    square = p * p
    top = square.argmax(-1, keepdim=True) if p.shape[-1] else None
    others = square.sum(-1, keepdim=True) - square
    if top is not None:
        others = others.scatter(-1, top, square.scatter(-1, top, 0.0).sum(-1, keepdim=True))
    values = (
        lse,
        entropy,
        (p * rest).sum(-1) / temperature**2,
        (square * (rest * rest + others)).sum(-1) / temperature**4,
        largest,
    )
    return SoftmaxFisherStats(*(_reduced(value, w, logits, "none") for value in values))


def softmax_fisher_gradient(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """W (p − e_label) / τ: the gradient of Σ w · cross-entropy with respect to the logits."""
    w = token_weights(logits, mask, weights)
    valid = labels != ignore_index
    kept = valid.to(accumulation_dtype(logits.dtype))
    w = kept if w is None else torch.where(valid, w, 0.0)
    p = _probabilities(_scaled_logits(logits, temperature, w), logsumexp)
    classes = torch.arange(logits.shape[-1], device=logits.device)
    gradient = torch.where(classes == labels[..., None], -_complement(p), p) / temperature
    return _weighted(gradient, w).to(logits.dtype)


def softmax_fisher_sample(
    logits: Tensor,
    seed: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Labels y ~ p by inversion of the cumulative sum, and w (p − e_y) / τ.

    y is the least class whose cumulative probability exceeds ``philox_uniform(seed[0], seed[1] +
    token)``: of a key, and the index of the first token among those that share it.
    Masked tokens and rows without a distribution (NaN) have label −100.
    """
    w = token_weights(logits, mask, weights)
    p = torch.softmax(_scaled_logits(logits, temperature, w), -1)
    cumulative = p.cumsum(-1)
    tokens = torch.arange(logits.shape[:-1].numel(), device=logits.device)
    u = philox_uniform(seed[0], seed[1] + tokens).view(logits.shape[:-1])
    target = u * cumulative[..., -1]
    labels = (cumulative <= target[..., None]).sum(-1)
    labels = torch.where(target.isnan(), IGNORE_INDEX, labels)
    if w is not None:
        labels = torch.where(w == 0, IGNORE_INDEX, labels)
    # −1 is no class: a row of NaN has no label, yet its gradient is NaN and not zero
    gradient = softmax_fisher_gradient(
        logits,
        labels,
        temperature=temperature,
        weights=w,
        logsumexp=logsumexp,
        ignore_index=-1,
    )
    return labels, gradient


def philox_uniform(seed: Tensor, index: Tensor) -> Tensor:
    """One float64 in [0, 1) for each int64 index, by Philox-4x32-10 with 53 random bits.

    Key: the two halves of the int64 `seed`; counter: (low half, high half of index, 0, 0). Counter
    based, so a value depends on seed and index alone: not on the back end, grid or thread count.
    Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    low = 0xFFFFFFFF
    k0, k1 = seed & low, (seed >> 32) & low
    c0, c1 = index & low, (index >> 32) & low
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        # products wrap in int64; their halves are still exact
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((b >> 32) & low) ^ c1 ^ k0, b & low, ((a >> 32) & low) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return ((c0 >> 5) * 2**26 + (c1 >> 6)).double() * 2.0**-53


def softmax_fisher_stats_backward(
    logits: Tensor,
    stats: Tensor,
    grad: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Gradient of Σ grad · stats with respect to the logits; stats and grad [..., 5] as above.

    p (g_lse + a − ⟨p, a⟩) / τ with a = −g_H log p − 2 g_tr p / τ² + g_tr2 (2p − 6p² + 4p Σp²) / τ⁴
    and g_max p_max (e_argmax − p) / τ for the last one, shared evenly between ties.
    """
    x, stats, grad = logits.double() / temperature, stats.double(), grad.double()
    if mask is not None:
        x = torch.where(mask[..., None], x, 0.0)
        stats = torch.where(mask[..., None], stats, 0.0)
    g_lse, g_entropy, g_trace, g_trace2, g_max = (g[..., None] for g in grad.unbind(-1))
    log_p = x - stats[..., :1]
    p = log_p.exp()
    s2 = (p**2).sum(-1, keepdim=True)
    a = (
        -g_entropy * torch.where(p == 0, 0.0, log_p)
        - 2 * g_trace * p / temperature**2
        + g_trace2 * (2 * p - 6 * p**2 + 4 * p * s2) / temperature**4
    )
    top = (x == x.amax(-1, keepdim=True)).to(p.dtype)
    largest = p.amax(-1, keepdim=True)
    result = p * (g_lse + a - (p * a).sum(-1, keepdim=True))
    result = (result + g_max * largest * (top / top.sum(-1, keepdim=True) - p)) / temperature
    if mask is not None:
        result = torch.where(mask[..., None], result, 0.0)
    return result.to(logits.dtype)


def softmax_fisher_panel(
    logits: Tensor,
    reference: Tensor,
    unit: Tensor,
    *,
    temperature: float = 1.0,
    scale: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """U s exp((z − r) / τ) as [T, V], or transposed, with u, r per token and s per class."""
    e = torch.exp((logits.double() - reference[..., None]) / temperature)
    panel = torch.where((unit == 0)[..., None], 0.0, unit[..., None] * e)
    panel = (panel if scale is None else panel * scale).flatten(0, -2)
    return (panel.mT if transposed else panel).to(accumulation_dtype(logits.dtype))


def softmax_fisher_factor(
    logits: Tensor,
    reference: Tensor,
    unit: Tensor,
    *,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    at_label: Tensor | None = None,
) -> Tensor:
    """Uᵀ [T, V] in float64: u exp((z − r) / τ), but for `at_label` at the label of a token."""
    panel = softmax_fisher_panel(
        logits.double(), reference.double(), unit.double(), temperature=temperature
    )
    if labels is None or at_label is None:
        return panel
    classes = torch.arange(logits.shape[-1], device=logits.device)
    here = labels.reshape(-1, 1) == classes
    return torch.where(here, at_label.double().reshape(-1, 1), panel)


def softmax_fisher_project(
    logits: Tensor,
    reference: Tensor,
    unit: Tensor,
    y: Tensor,
    *,
    scale: Tensor | None = None,
    ones: bool = False,
    gram: bool = False,
    **factor: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """Uᵀ diag(s) [Y, 1 if `ones`], and the lower triangle of Uᵀ diag(s) U if `gram`."""
    u = softmax_fisher_factor(logits, reference, unit, **factor)
    y = y.double()
    y = torch.cat([y, y.new_ones(len(y), 1)], 1) if ones else y
    scaled = u if scale is None else u * scale.double()
    dtype = accumulation_dtype(logits.dtype)
    out = (scaled @ y).to(dtype)
    return (out, (scaled @ u.mT).tril().to(dtype)) if gram else out


def softmax_fisher_expand(
    logits: Tensor,
    reference: Tensor,
    unit: Tensor,
    c: Tensor,
    *,
    scale: Tensor | None = None,
    alpha: float = 1.0,
    y: Tensor | None = None,
    y_scale: Tensor | None = None,
    **factor: Any,
) -> Tensor:
    """diag(s_y) Y + α diag(s) U C."""
    out = alpha * (softmax_fisher_factor(logits, reference, unit, **factor).mT @ c.double())
    out = out if scale is None else scale.double()[:, None] * out
    if y is not None:
        out = out + (y.double() if y_scale is None else y_scale.double()[:, None] * y.double())
    return out.to(accumulation_dtype(logits.dtype))
