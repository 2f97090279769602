"""The reference back end: :mod:`fisherkern.reference` behind the calling convention of kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherkern import reference
from fisherkern.reference import softmax_fisher


def _per_token(logits: Tensor, value: Tensor | None) -> Tensor | None:
    return None if value is None else value.view(logits.shape[:2])


def _common(
    logits: Tensor, weights: Tensor | None, logsumexp: Tensor | None, temperature: float
) -> dict:
    return {
        "weights": _per_token(logits, weights),
        "logsumexp": _per_token(logits, logsumexp),
        "temperature": temperature,
    }


def softmax_fisher_matvec(
    logits: Tensor,
    v: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Out [B, S, V] = w F v."""
    common = _common(logits, weights, logsumexp, temperature)
    out.copy_(reference.softmax_fisher_matvec(logits, v, **common))


def softmax_fisher_matvec_backward(
    logits: Tensor,
    v: Tensor,
    grad: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Out [B, S, V] = ∂⟨grad, w F v⟩/∂z."""
    common = _common(logits, weights, logsumexp, temperature)
    out.copy_(reference.softmax_fisher_matvec_backward(logits, v, grad, **common))


def softmax_fisher_sqrt_matvec(
    logits: Tensor,
    v: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Out [B, S, V] = w L v. The weights come with their root already taken."""
    common = _common(logits, None if weights is None else weights**2, logsumexp, temperature)
    out.copy_(reference.softmax_fisher_sqrt_matvec(logits, v, **common))


def softmax_fisher_sqrt_rmatvec(
    logits: Tensor,
    v: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Out [B, S, V] = w Lᵀ v. The weights come with their root already taken."""
    common = _common(logits, None if weights is None else weights**2, logsumexp, temperature)
    out.copy_(reference.softmax_fisher_sqrt_rmatvec(logits, v, **common))


def softmax_fisher_quadratic(
    logits: Tensor,
    v: Tensor,
    mask: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Out [T, K, K] = V F Vᵀ for the rows of v [B, S, K, V]."""
    common = _common(logits, mask, logsumexp, temperature)
    out.copy_(reference.softmax_fisher_quadratic(logits, v, **common).view(out.shape))


def softmax_fisher_diagonal(
    logits: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Out [B, S, V] = w p (1 − p) / τ²."""
    out.copy_(
        reference.softmax_fisher_diagonal(
            logits, **_common(logits, weights, logsumexp, temperature)
        )
    )


def softmax_fisher_diagonal_sum(
    logits: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Out [V] = Σ w p (1 − p) / τ²."""
    common = _common(logits, weights, logsumexp, temperature)
    out.copy_(reference.softmax_fisher_diagonal(logits, reduction="sum", **common))


def softmax_fisher_mean_probs(
    logits: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Out [V] = Σ w p. The weights come already divided by N."""
    common = _common(logits, weights, logsumexp, temperature)
    out.copy_(reference.softmax_fisher_mean_probs(logits, reduction="sum", **common))


def softmax_fisher_powers(
    logits: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    sums: Tensor,
    reference: Tensor | None,
    unit: Tensor | None,
) -> None:
    """Sums [V] = Σ w p; reference and unit [T] with p = unit exp((z − reference) / τ)."""
    softmax_fisher_mean_probs(logits, weights, logsumexp, temperature, sums)
    if reference is None or unit is None:
        return
    z = logits.double()
    top = z.amax(-1)
    lse = torch.logsumexp(z / temperature, -1)
    if logsumexp is not None:
        lse = logsumexp.double().view(lse.shape)
    counts = torch.ones_like(top, dtype=torch.bool)
    if weights is not None:
        counts = weights.view(top.shape) != 0
    reference.copy_(torch.where(counts, top, 0.0).flatten())
    unit.copy_(torch.where(counts, torch.exp(top / temperature - lse), 0.0).flatten())


def softmax_fisher_panel(
    logits: Tensor,
    reference: Tensor,
    unit: Tensor,
    scale: Tensor | None,
    temperature: float,
    transposed: bool,
    out: Tensor,
) -> None:
    """Out [T, V] or [V, T] = unit · scale · exp((z − reference) / τ)."""
    lead = logits.shape[:2]
    # the argument has the name of the module
    result = softmax_fisher.softmax_fisher_panel(
        logits,
        reference.view(lead),
        unit.view(lead),
        temperature=temperature,
        scale=scale,
        transposed=transposed,
    )
    out.copy_(result)


def softmax_fisher_project(
    logits: Sequence[Tensor],
    reference: Tensor,
    unit: Tensor,
    labels: Tensor | None,
    at_label: Tensor | None,
    temperature: float,
    scale: Tensor | None,
    y: Tensor,
    ones: bool,
    precision: str,
    workspace: int,
    out: Tensor,
    gram: Tensor | None,
) -> None:
    """Out [T, K (+ 1)] = Uᵀ diag(scale) [y, 1]; lower triangle of gram = Uᵀ diag(scale) U."""
    z = torch.cat([part.reshape(-1, part.shape[-1]).double() for part in logits])
    factor = {"temperature": temperature, "labels": labels, "at_label": at_label}
    products, squares = softmax_fisher.softmax_fisher_project(
        z, reference, unit, y, scale=scale, ones=ones, gram=True, **factor
    )
    out.copy_(products)
    if gram is not None:
        gram.copy_(squares)


def softmax_fisher_expand(
    logits: Sequence[Tensor],
    reference: Tensor,
    unit: Tensor,
    labels: Tensor | None,
    at_label: Tensor | None,
    temperature: float,
    scale: Tensor | None,
    c: Tensor,
    alpha: float,
    y: Tensor | None,
    y_scale: Tensor | None,
    precision: str,
    workspace: int,
    out: Tensor,
) -> None:
    """Out [V, K] = diag(y_scale) y + alpha diag(scale) U c."""
    z = torch.cat([part.reshape(-1, part.shape[-1]).double() for part in logits])
    factor = {"temperature": temperature, "labels": labels, "at_label": at_label}
    result = softmax_fisher.softmax_fisher_expand(
        z, reference, unit, c, scale=scale, alpha=alpha, y=y, y_scale=y_scale, **factor
    )
    out.copy_(result)


def softmax_fisher_trace(
    logits: Tensor,
    mask: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Out [T] = Σ p (1 − p) / τ²."""
    common = _common(logits, mask, logsumexp, temperature)
    out.copy_(reference.softmax_fisher_trace(logits, **common).view(-1))


def softmax_fisher_stats(
    logits: Tensor,
    mask: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Out [T, 5] = logsumexp, entropy, trace, tr F², max p."""
    common = _common(logits, mask, logsumexp, temperature)
    stats = reference.softmax_fisher_stats(logits, **common)
    out.copy_(torch.stack(stats, -1).view(out.shape))


def softmax_fisher_stats_backward(
    logits: Tensor,
    stats: Tensor,
    grad: Tensor,
    mask: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Out [B, S, V] = ∂(Σ grad · stats)/∂z for stats and grad [T, 5]."""
    lead = logits.shape[:2]
    out.copy_(
        reference.softmax_fisher_stats_backward(
            logits,
            stats.view(*lead, 5),
            grad.view(*lead, 5),
            mask=_per_token(logits, mask),
            temperature=temperature,
        )
    )


def softmax_fisher_gradient(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    """Out [B, S, V] = w (p − e_label) / τ. A label outside [0, V) makes its row NaN."""
    lead = logits.shape[:2]
    outside = (labels < 0) | (labels >= logits.shape[-1])
    if weights is not None:
        outside &= weights != 0
    common = _common(logits, weights, logsumexp, temperature)
    gradient = reference.softmax_fisher_gradient(
        logits, labels.view(lead), ignore_index=-(2**63), **common
    )
    out.copy_(torch.where(outside.view(*lead, 1), torch.nan, gradient))


def softmax_fisher_sample(
    logits: Tensor,
    seed: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    labels: Tensor,
    out: Tensor,
) -> None:
    """Labels [T] ~ p, −100 where there is none; out [B, S, V] = w (p − e_label) / τ."""
    common = _common(logits, weights, logsumexp, temperature)
    sampled, gradient = reference.softmax_fisher_sample(logits, seed, **common)
    labels.copy_(sampled.view(-1))
    out.copy_(gradient)


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
    """Lower triangle of factor [H, D, D] = beta · factor + alpha · Σ w x̃ x̃ᵀ."""
    c = reference.covariance(
        x.double(),
        mask=_per_token(x, mask),
        weights=_per_token(x, weights),
        bias=bias,
        heads=True,
        reduction="sum",
    )
    _add(factor, c, alpha, beta, torch.ones_like(factor[0], dtype=torch.bool).tril())


def cross_update(
    x: Tensor,
    g: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    alpha: Tensor,
    beta: float,
    bias: bool,
    form: str,
    precision: str,
    factor: Tensor,
) -> None:
    """Factor [d_out, D_in] = beta · factor + alpha · the product of `form`."""
    x, g = x.double(), g.double()
    tokens: dict = {
        "mask": _per_token(x, mask),
        "weights": _per_token(x, weights),
        "bias": bias,
        "reduction": "sum",
    }
    if form == "product":
        c = reference.cross_covariance(g, x, **tokens)
    else:
        c = reference.squared_gradient(x, g, per_sample=form == "samples", **tokens)
    _add(factor, c, alpha, beta, torch.ones_like(factor, dtype=torch.bool))


def mirror(factor: Tensor) -> None:
    """Copy the lower triangle of factor [H, D, D], any strides, onto the upper one."""
    upper = torch.ones_like(factor[0], dtype=torch.bool).triu(1)
    factor.copy_(torch.where(upper, factor.mT, factor))


def _add(factor: Tensor, c: Tensor, alpha: Tensor, beta: float, where: Tensor) -> None:
    new = alpha.double() * c
    if beta:
        new = beta * factor.double() + new
    factor.copy_(torch.where(where, new, factor.double()))


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, out: Tensor
) -> None:
    """Out [T, V] = c tanh((h Wᵀ + b) / c), without a soft-cap c: h Wᵀ + b."""
    z, _ = reference.head_logits(hidden, weight, bias, softcap)
    out.copy_(z)


def head_pull(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """Out [T, d] = rows [T, V] times W [V, d]."""
    out.copy_(rows.double() @ weight.double())


def head_squares(rows: Tensor, hidden: Tensor, beta: float, out: Tensor) -> None:
    """Out [V, d] = β out + the transpose of rows [T, V] times h² [T, d]."""
    product = rows.double().mT @ hidden.double().square()
    out.copy_(product + beta * out.double() if beta else product)
