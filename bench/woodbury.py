"""(F̄ + λ I)⁻¹ Y of the mean softmax Fisher in plain PyTorch: the published sketch, and the truth.

F̄ = D̄ − U Uᵀ with D̄ the mean of p over T tokens and U = Pᵀ / √T [V, T]. The capacitance is
S = I − Uᵀ D_λ⁻¹ U [T, T], D_λ = D̄ + λ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# Room for a panel of probabilities in float64.
_PANEL_BYTES = 1 << 28


def sketch(z: Tensor, y: Tensor, damping: float) -> Tensor:
    """The published formulation, with U in the dtype of Y: P, U, U / D_λ and S exist as a whole."""
    tokens = z.shape[0]
    p = torch.softmax(z.to(y.dtype), -1)
    u = math.sqrt(1 / tokens) * p
    d = p.mean(0) + damping
    du = u / d
    s = torch.eye(tokens, dtype=y.dtype, device=z.device) - du @ u.mT
    b = du @ y
    c = torch.cholesky_solve(b, torch.linalg.cholesky(s))
    return y / d[:, None] + du.mT @ c


def sketch_half(z: Tensor, y: Tensor, damping: float) -> Tensor:
    """The same with U, U / D_λ and what they are multiplied by in the half precision of z."""
    tokens, half = z.shape[0], z.dtype
    p = torch.softmax(z.float(), -1)
    d = p.mean(0) + damping
    u = math.sqrt(1 / tokens) * p
    du = (u / d).to(half)
    s = torch.eye(tokens, device=z.device) - (du @ u.to(half).mT).float()
    b = (du @ y.to(half)).float()
    c = torch.cholesky_solve(b, torch.linalg.cholesky(s))
    return y / d[:, None] + (du.mT @ c.to(half)).float()


def apply(z: Tensor, r: Tensor, u: Tensor, d: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """D⁻¹ (Y + U C), the end of a solve; d holds the inverse of D."""
    return d[:, None] * (y + torch.softmax(z.to(y.dtype), -1).mT @ c / math.sqrt(z.shape[0]))


def exact_apply(z: Tensor, r: Tensor, u: Tensor, d: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """The same in float64."""
    out = y.to(torch.float64, copy=True)
    for part, p in _panels(z):
        out[part].addmm_(p.mT, c.double(), alpha=1 / math.sqrt(z.shape[0]))
    return d.double()[:, None] * out


def gram(z: Tensor, r: Tensor, u: Tensor, d: Tensor) -> Tensor:
    """Uᵀ D⁻¹ U [T, T], its lower triangle; d holds the inverse of D."""
    p = torch.softmax(z.to(d.dtype), -1)
    return (p * (d / z.shape[0]) @ p.mT).tril_()


def exact_gram(z: Tensor, r: Tensor, u: Tensor, d: Tensor) -> Tensor:
    """The same in float64."""
    total = torch.zeros(z.shape[0], z.shape[0], dtype=torch.float64, device=z.device)
    for part, p in _panels(z):
        total.addmm_(p * d[part].double(), p.mT, alpha=1 / z.shape[0])
    return total.tril_()


def _panels(z: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Classes and p of them [T, classes], in float64 whatever the logits are."""
    tokens, classes = z.shape
    step = max(1, _PANEL_BYTES // (8 * max(tokens, 1)))
    parts = [slice(i, min(i + step, classes)) for i in range(0, classes, step)]
    lse = torch.stack([torch.logsumexp(z[:, part].double(), -1) for part in parts]).logsumexp(0)
    for part in parts:
        yield part, torch.exp(z[:, part].double() - lse[:, None])


def exact(z: Tensor, y: Tensor, damping: float) -> Tensor:
    """The truth, in float64.

    The diagonal of S cancels in 1 − Σ p² / (T D_λ). Since F̄ 1 = 0, the rows of S add up to
    λ Σ_v p_v / D_λ, so its diagonal is that less the other elements of its row, all of one sign.
    """
    tokens = z.shape[0]
    d = torch.cat([p.mean(0) for _, p in _panels(z)]) + damping
    gram = torch.zeros(tokens, tokens, dtype=torch.float64, device=z.device)
    row_sums = gram.new_zeros(tokens)
    b = gram.new_zeros(tokens, y.shape[1])
    for part, p in _panels(z):
        scaled = p / d[part]
        row_sums += damping * scaled.sum(1)
        gram.addmm_(scaled, p.mT, alpha=1 / tokens)
        b.addmm_(scaled, y[part].double())
    s = -gram.fill_diagonal_(0)
    s.diagonal().copy_(row_sums - s.sum(1))
    c = torch.cholesky_solve(b, torch.linalg.cholesky(s)) / tokens
    out = y.double() / d[:, None]
    for part, p in _panels(z):
        out[part].addmm_((p / d[part]).mT, c)
    return out
