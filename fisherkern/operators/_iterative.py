"""Solves that need nothing but products: conjugate gradients for a block of right-hand sides."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]


def conjugate_gradients(
    product: Product, y: Tensor, precondition: Product, tolerance: float, iterations: int
) -> tuple[Tensor, Tensor, int]:
    """X with A X = Y for a positive definite A, every column a problem of its own.

    Columns that have converged stay as they are. Inner products are taken in float64. The residual
    is that of the recurrence; y − A X differs from it by what products round off. Going on from
    y − A X divided that by 1 to 2.7 in float32 (400 classes, λ = 1e-5), for half as many products
    again, and so is left out.

    Args:
        product: A X of a block X [n, k].
        y: Y [n, k].
        precondition: M⁻¹ X of a block, M positive definite and near A.
        tolerance: of the residual of a column, relative to the norm of its y.
        iterations: products, at most.

    Returns:
        X, the residual of every column as the recurrence has it, and the iterations taken.

    Source: Hestenes and Stiefel 1952; preconditioned as in Saad 2003, algorithm 9.1.
    """

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(0, dtype=torch.float64)

    x, r = torch.zeros_like(y), y.clone()
    norm = inner(y, y).sqrt()
    norm = torch.where(norm == 0, 1.0, norm)
    p = torch.zeros_like(y)
    before = torch.ones_like(norm)
    residual = inner(r, r).sqrt() / norm
    taken = 0
    while taken < iterations and bool((residual > tolerance).any()):
        z = precondition(r)
        now = inner(r, z)
        # of a column that has converged both may be zero
        ratio = torch.where(residual > tolerance, now / before, 0.0)
        p = torch.addcmul(z, p, ratio.to(y.dtype) if taken else torch.zeros_like(y[0]))
        before = now
        image = product(p)
        step = torch.where(residual > tolerance, now / inner(p, image), 0.0).to(y.dtype)
        x.addcmul_(p, step)
        r.addcmul_(image, step, value=-1)
        residual = inner(r, r).sqrt() / norm
        taken += 1
    # a NaN converges nowhere and must not leave zeros behind
    return torch.where(residual.isnan(), torch.nan, x), residual, taken
