"""Dense float64 truths of the operators, and logits from diffuse to one-hot."""

from __future__ import annotations

import torch
from torch import Tensor

from conftest import DEVICE

SCALES = (0.5, 2.0, 6.0, "one-hot")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(T: int, V: int, scale: float | str, dtype: torch.dtype = torch.float32) -> Tensor:
    if scale == "one-hot":
        z = torch.zeros(T, V)
        z.scatter_(1, torch.randint(V, (T, 1), generator=generator(T + V)), 60.0)
    else:
        z = torch.randn(T, V, generator=generator(T + V)) * scale
    return z.to(dtype).to(DEVICE)


def weights(T: int) -> Tensor:
    """Weights of which every fifth is zero, but not the only one."""
    w = torch.rand(T, generator=generator(T))
    if T > 1:
        w[::5] = 0
    return w.to(DEVICE)


def block(V: int, k: int = 5) -> Tensor:
    return torch.randn(V, k, generator=generator(V)).to(DEVICE)


def softmax_fisher(z: Tensor, w: Tensor | None = None, tau: float = 1.0) -> Tensor:
    """(1/N) Σ w (diag p − p pᵀ) / τ², its diagonal from its row sums, which do not cancel."""
    z = z.double()
    w = torch.ones(z.shape[0], dtype=torch.float64, device=z.device) if w is None else w.double()
    p = torch.where((w == 0)[:, None], 0.0, (z / tau).softmax(-1))
    F = -(p.mT * w) @ p
    F.diagonal().zero_()
    F.diagonal().copy_(-F.sum(1))
    return F / (w.sum() * tau**2)


def empirical_fisher(z: Tensor, y: Tensor, w: Tensor, tau: float = 1.0) -> Tensor:
    """(1/N) Σ w g gᵀ with g = (p − e_y) / τ, its elements at the labels from the others."""
    g = (z.double() / tau).softmax(-1)
    g[torch.arange(len(y)), y] = 0
    g[torch.arange(len(y)), y] = -g.sum(1)
    w = w.double()
    return (g.mT * w) @ g / (w.sum() * tau**2)


def error(found: Tensor, truth: Tensor) -> float:
    """In the Euclidean norm, relative."""
    return ((found.double() - truth).norm() / truth.norm()).item()
