"""The largest eigenvalues of an operator: block Lanczos with thick restarts.

The basis is kept orthonormal in float64 whatever the products are made in, and Ritz pairs come from
the projection itself, not from a recurrence: nothing is lost by rounding but in the products.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Columns that are multiplied at a time: a product reads all logits, whatever their number.
_BLOCK = 8


def _orthonormal(x: Tensor, basis: Tensor) -> Tensor:
    """An orthonormal basis of the part of x that is orthogonal to `basis`."""
    for _ in range(2):  # what rounding left of the basis in x goes in the second pass
        x = torch.linalg.qr(x - basis @ (basis.mT @ x)).Q
    return x


def largest(
    product: Callable[[Tensor], Tensor], like: Tensor, count: int, tolerance: float, rounds: int
) -> tuple[Tensor, Tensor, float]:
    """Eigenvalues [k], decreasing, eigenvectors [n, k], and the largest residual.

    Args:
        product: of the operator with a float64 block [n, b].
        like: a tensor [n], whose device the result has.
        count: k; the basis takes about 2 k + 40 columns, of which n must have twice as many.
        tolerance: of residuals ‖A v − θ v‖, relative to the largest |θ|.
        rounds: of restarts, at most.
    """
    n = like.shape[0]
    most, kept = 2 * count + 4 * _BLOCK, count + _BLOCK
    start = torch.randn(n, _BLOCK, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(start.to(like.device)).Q
    image = product(basis)
    for _ in range(rounds):
        while basis.shape[1] < most:
            block = _orthonormal(image[:, -_BLOCK:], basis)
            basis = torch.cat([basis, block], 1)
            image = torch.cat([image, product(block)], 1)
        projected = basis.mT @ image
        values, rotation = torch.linalg.eigh((projected + projected.mT) / 2)
        vectors, images = basis @ rotation[:, -count:], image @ rotation[:, -count:]
        top = values[-count:]
        residual = (images - vectors * top).norm(dim=0).max()
        scale = values.abs().max()
        if bool(residual <= tolerance * scale) or not bool(residual.isfinite()):
            break
        # the residuals of all Ritz vectors lie in what the last block adds
        block = _orthonormal(image[:, -_BLOCK:], basis)
        basis = torch.cat([basis @ rotation[:, -kept:], block], 1)
        image = torch.cat([image @ rotation[:, -kept:], product(block)], 1)
    relative = residual / torch.where(scale > 0, scale, 1.0)
    return top.flip(0), vectors.flip(1), float(relative)
