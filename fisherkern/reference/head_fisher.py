"""The head Fisher ops by definition: the softmax Fisher of z = W h + b, seen from h or from W.

Notation of :mod:`fisherkern.reference.softmax_fisher`, and h hidden states [T, d], W [V, d], b [V],
a = W h + b, c the soft-cap: z = c tanh(a / c), or a without one. J = diag(∂z / ∂a) W is the
Jacobian of the logits in h, and M_t = J_tᵀ F_t J_t the Fisher of a hidden state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fisherkern.reference import softmax_fisher
from fisherkern.reference.softmax_fisher import SoftmaxFisherStats
from fisherkern.reference.tokens import accumulation_dtype, normalised, token_weights


class HeadFisherSample(NamedTuple):
    """Labels drawn from the model and the gradients they give in the hidden states."""

    labels: Tensor
    """int64 [...]; −100 for masked tokens and rows that hold NaN."""
    gradients: Tensor
    """w Jᵀ (p − e_label) / τ [..., d], in the dtype of the hidden states."""


class HeadFisherWeightDiagonal(NamedTuple):
    """The diagonal of the Fisher of the parameters of a head."""

    weight: Tensor
    """Of W [V, d]."""
    bias: Tensor
    """Of b [V]."""


def head_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    softcap: float | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits z and ∂z / ∂a [..., V] in float64; of rows whose weight is zero, those of h = 0."""
    h = hidden.double()
    if weights is not None:
        h = torch.where((weights == 0)[..., None], 0.0, h)
    a = h @ weight.double().mT
    if bias is not None:
        a = a + bias.double()
    if softcap is None:
        return a, torch.ones_like(a)
    z = softcap * torch.tanh(a / softcap)
    return z, 1 - (z / softcap) ** 2


def head_fisher_stats(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[SoftmaxFisherStats, Tensor]:
    """The statistics of p, and the expected embedding w Σ_v p_v W_v."""
    w = token_weights(hidden, mask, weights)
    z, _ = head_logits(hidden, weight, bias, softcap, w)
    stats = softmax_fisher.softmax_fisher_stats(z, temperature=temperature, weights=w)
    expected = torch.softmax(z / temperature, -1) @ weight.double()
    if w is not None:
        expected = torch.where((w == 0)[..., None], 0.0, expected * w[..., None])
    dtype = accumulation_dtype(hidden.dtype)
    return SoftmaxFisherStats(*(x.to(dtype) for x in stats)), expected.to(dtype)


def head_fisher_matvec(
    hidden: Tensor,
    weight: Tensor,
    u: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """W M u = w Jᵀ F J u [..., d]."""
    w = token_weights(hidden, mask, weights)
    z, slope = head_logits(hidden, weight, bias, softcap, w)
    v = slope * (u.double() @ weight.double().mT)
    fv = softmax_fisher.softmax_fisher_matvec(z, v, temperature=temperature, weights=w)
    return ((slope * fv) @ weight.double()).to(hidden.dtype)


def head_fisher_pullback(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Per token w M [..., d, d], or Σ w M (over N) [d, d]: the covariance of J_v under v ~ p."""
    w = token_weights(hidden, mask, weights)
    z, slope = head_logits(hidden, weight, bias, softcap, w)
    p = torch.softmax(z / temperature, -1)
    factors = normalised(w, hidden, reduction)
    W, d = weight.double(), weight.shape[1]
    rows = [x.reshape(-1, z.shape[-1]) for x in (p, slope)]
    parts = []
    for q, s in zip(*rows, strict=True):
        J = s[:, None] * W
        centred = J - q @ J
        parts.append(centred.mT @ (q[:, None] * centred) / temperature**2)
    M = torch.stack(parts) if parts else p.new_zeros(0, d, d)
    if factors is not None:
        f = factors.double().reshape(-1, 1, 1)
        M = torch.where(f == 0, 0.0, f * M)
    M = M.view(*hidden.shape[:-1], d, d) if reduction == "none" else M.sum(0)
    return M.to(accumulation_dtype(hidden.dtype))


def head_fisher_mean_probs(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Σ w p (over N) [V]."""
    w = token_weights(hidden, mask, weights)
    z, _ = head_logits(hidden, weight, bias, softcap, w)
    sums = softmax_fisher.softmax_fisher_mean_probs(
        z, temperature=temperature, weights=w, reduction=reduction
    )
    return sums.to(accumulation_dtype(hidden.dtype))


def head_fisher_gram(
    hidden: Tensor,
    weight: Tensor,
    damping: float,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Uᵀ (D̄ / τ² + λ)⁻¹ U [T, T] with U = √(w / N) p / τ in columns."""
    w = token_weights(hidden, mask, weights)
    z, _ = head_logits(hidden, weight, bias, softcap, w)
    p = torch.softmax(z.reshape(-1, z.shape[-1]) / temperature, -1)
    factors = normalised(w, hidden, reduction)
    f = torch.ones_like(p[:, 0]) if factors is None else factors.double().reshape(-1)
    p = torch.where((f == 0)[:, None], 0.0, p)
    scale = 1 / ((f @ p) / temperature**2 + damping)
    U = f.sqrt()[:, None] * p / temperature
    silent = (f == 0)[:, None] | (f == 0)
    return torch.where(silent, 0.0, (U * scale) @ U.mT).to(accumulation_dtype(hidden.dtype))


def head_fisher_weight_diagonal(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> HeadFisherWeightDiagonal:
    """Σ w p (1 − p) s² h² / τ² (over N) for W, the same without h² for b, s = ∂z / ∂a."""
    w = token_weights(hidden, mask, weights)
    z, slope = head_logits(hidden, weight, bias, softcap, w)
    factors = normalised(w, hidden, reduction)
    diagonal = softmax_fisher.softmax_fisher_diagonal(z, temperature=temperature, weights=factors)
    rows = (slope**2 * diagonal).reshape(-1, z.shape[-1])
    h = hidden.double().reshape(-1, hidden.shape[-1])
    if w is not None:
        h = torch.where((w == 0).reshape(-1, 1), 0.0, h)
    dtype = accumulation_dtype(hidden.dtype)
    return HeadFisherWeightDiagonal((rows.mT @ h**2).to(dtype), rows.sum(0).to(dtype))


def head_fisher_sample(
    hidden: Tensor,
    weight: Tensor,
    seed: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
) -> HeadFisherSample:
    """Y ~ p by inversion, as :func:`softmax_fisher_sample`, and w Jᵀ (p − e_y) / τ."""
    w = token_weights(hidden, mask, weights)
    z, slope = head_logits(hidden, weight, bias, softcap, w)
    labels, rows = softmax_fisher.softmax_fisher_sample(z, seed, temperature=temperature, weights=w)
    return HeadFisherSample(labels, ((slope * rows) @ weight.double()).to(hidden.dtype))
