"""The T × T system of the Woodbury identity, in float64 whatever the products are made in.

(D + σ U Uᵀ)⁻¹ = D⁻¹ − σ D⁻¹ U (I + σ Γ)⁻¹ Uᵀ D⁻¹ with Γ = Uᵀ D⁻¹ U.

Of a mean softmax Fisher (σ = −1) more is known. S = I − Γ is a symmetric M-matrix: what is off its
diagonal, −Γ, is a sum of one sign, known to full relative accuracy. Its diagonal 1 − Γ_tt cancels,
but F·1 = 0 gives its row sums: S s = λ u with s_t = √(w_t / N) / τ and u = Uᵀ D_λ⁻¹ 1, a sum of one
sign again. The diagonal that fits them is made without a subtraction:

    S_tt = (λ u_t + Σ_{r ≠ t} Γ_tr s_r) / s_t

An M-matrix that is known by its off-diagonal elements and its row sums has an inverse of the same
relative accuracy, element by element and however ill-conditioned it is (Alfa, Xue and Ye 2002,
"Entrywise perturbation theory for diagonally dominant M-matrices"). And it is positive definite by
construction: for peaked rows, low damping and a Γ of low precision too.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Capacitance:
    """I + σ Γ, factored: what a solve, a determinant and the diagonal of the inverse ask for."""

    def __init__(self, matrix: Tensor) -> None:
        """Of the float64 matrix, of which the lower triangle is read and which is overwritten."""
        self.cholesky, info = torch.linalg.cholesky_ex(matrix)
        self.failed = info != 0
        """Bool scalar on the device: the matrix is not positive definite, or holds NaN."""

    def solve(self, b: Tensor) -> Tensor:
        """(I + σ Γ)⁻¹ B in the dtype of B [T, k]."""
        return torch.cholesky_solve(b.double(), self.cholesky).to(b.dtype)

    def inverse(self) -> Tensor:
        """(I + σ Γ)⁻¹ [T, T], float64."""
        return torch.cholesky_inverse(self.cholesky)

    def logdet(self) -> Tensor:
        """Log of the determinant, a float64 scalar."""
        return 2 * self.cholesky.diagonal().log().sum()


def of_sum(gram: Tensor, sign: int) -> Capacitance:
    """I + σ Γ of the lower triangle of Γ, of which nothing more is known."""
    matrix = sign * gram.double()
    matrix.diagonal().add_(1)
    return Capacitance(matrix)


def of_softmax(gram: Tensor, roots: Tensor, sums: Tensor) -> Capacitance:
    """I − Γ of a mean softmax Fisher.

    Args:
        gram: Γ [T, T], its lower triangle.
        roots: s [T]; a token of s = 0 does not count.
        sums: λ u [T].
    """
    below = gram.double().tril_(-1)
    s = roots.double()
    counts = s > 0
    row_sums = sums.double() + below @ s + below.mT @ s
    matrix = below.neg_()
    matrix.diagonal().copy_(torch.where(counts, row_sums / torch.where(counts, s, 1), 1))
    return Capacitance(matrix)
