"""Symmetric matrices as their lower triangle, folded into a rectangle without a gap.

The last half of the rows is one block as it is; the triangle above that block, transposed, fills
what its own triangle leaves. Index tensors would take four times the memory of the triangle.

Source: Gustavson et al. 2010, "Rectangular full packed format for Cholesky's algorithm".
"""

from __future__ import annotations

import torch
from torch import Tensor


def packed(matrix: Tensor) -> Tensor:
    """The lower triangle of a matrix [n, n], n (n + 1) / 2 values, a new tensor."""
    m = len(matrix) // 2
    upper, lower = matrix[:m, :m], matrix[m:, m:]
    folded = matrix.new_zeros(len(lower), m + 1)
    folded[:, : len(lower)] = lower.tril()
    folded[:m, 1:] += upper.mT.triu()
    return torch.cat([matrix[m:, :m], folded], 1)


def unpack_(matrix: Tensor, rectangle: Tensor) -> None:
    """Write the lower triangle of a matrix [n, n] from what :func:`packed` gave."""
    m = len(matrix) // 2
    upper, lower, folded = matrix[:m, :m], matrix[m:, m:], rectangle[:, m:]
    matrix[m:, :m] = rectangle[:, :m]
    lower.copy_(folded[:, : len(lower)].tril() + lower.triu(1))
    upper.copy_(folded[:m, 1:].triu().mT + upper.triu(1))
