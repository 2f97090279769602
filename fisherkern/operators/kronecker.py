"""The Kronecker product of two symmetric operators, as K-FAC makes of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.operators._autocast import without_autocast
from fisherkern.operators._base import LowRankOperator

_DTYPES = (torch.float32, torch.float64)


class Kronecker:
    """G ⊗ A on matrices [m, n]: X ↦ G X A, the curvature of a layer with weight [m, n].

    Either factor is a symmetric matrix or an operator of this package, a vocabulary-sized G among
    them.

    Args:
        left: G, a matrix [m, m] or an operator.
        right: A, a matrix [n, n] or an operator.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype or device.

    Source: Martens and Grosse 2015, section 4 and section 6.3 (factored damping).

    >>> import torch
    >>> from fisherkern.operators import Kronecker
    >>> K = Kronecker(torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2))
    >>> K @ torch.ones(2, 2)
    tensor([[1., 1.],
            [3., 3.]])
    >>> K.solve(torch.ones(2, 2), damping=1.0, pi=1.0)
    tensor([[0.2500, 0.2500],
            [0.1250, 0.1250]])
    """

    def __init__(self, left: Tensor | LowRankOperator, right: Tensor | LowRankOperator) -> None:
        self.left = _factor("left", left)
        self.right = _factor("right", right)
        if self.left.device != self.right.device or self.left.dtype != self.right.dtype:
            raise ValueError(
                f"right is {self.right.dtype} on {self.right.device}; expected that of left, "
                f"{self.left.dtype} on {self.left.device}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        """(m n, m n)."""
        size = self.left.shape[0] * self.right.shape[0]
        return size, size

    @property
    def device(self) -> torch.device:
        """The device of matrices and results."""
        return self.left.device

    def _matrix(self, name: str, value: object) -> Tensor:
        x = checks.array(name, value, ("m", "n"), (self.left.dtype,))
        m, n = self.left.shape[0], self.right.shape[0]
        if x.shape != (m, n):
            raise ValueError(f"{name} has shape {list(x.shape)}; expected [{m}, {n}]")
        return x.detach()

    @without_autocast
    def __matmul__(self, x: Tensor) -> Tensor:
        """G X A for X [m, n].

        Raises:
            TypeError, ValueError: x of the wrong type, dtype or shape.
        """
        return (self.right @ (self.left @ self._matrix("x", x)).mT).mT.contiguous()

    def pi(self) -> float:
        """π = √((tr A / n) / (tr G / m)), which shares the damping out; 1 where that is not > 0.

        Source: Martens and Grosse 2015, section 6.3.
        """
        means = [float(f.trace()) / max(f.shape[0], 1) for f in (self.right, self.left)]
        return (means[0] / means[1]) ** 0.5 if min(means) > 0 else 1.0

    @without_autocast
    def solve(self, x: Tensor, damping: float, pi: float | None = None) -> Tensor:
        """(G + √λ / π I)⁻¹ X (A + π √λ I)⁻¹: the natural gradient of a layer.

        Args:
            x: X [m, n], the gradient of the weight.
            damping: λ > 0.
            pi: π > 0; None: that of :meth:`pi`.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
            torch.linalg.LinAlgError: a damped factor is not positive definite.
        """
        gradient = self._matrix("x", x)
        left, right = self._dampings(damping, pi)
        half = _solve(self.left, gradient, left)
        return _solve(self.right, half.mT.contiguous(), right).mT.contiguous()

    @without_autocast
    def residual(
        self, solution: Tensor, x: Tensor, damping: float, pi: float | None = None
    ) -> Tensor:
        """‖(G + √λ / π I) S (A + π √λ I) − X‖ / ‖X‖, a scalar: what a solution S achieved.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, shape or value.
        """
        left, right = self._dampings(damping, pi)
        s = self._matrix("solution", solution)
        half = torch.add(self.left @ s, s, alpha=left).mT.contiguous()
        whole = torch.add(self.right @ half, half, alpha=right).mT
        target = self._matrix("x", x)
        return (whole - target).norm() / target.norm()

    def _dampings(self, damping: float, pi: float | None) -> tuple[float, float]:
        """Those of the left and the right factor."""
        lam = checks.damping(damping)
        ratio = self.pi() if pi is None else checks.number("pi", pi, 1e-30, float("inf"))
        return lam**0.5 / ratio, lam**0.5 * ratio


def _factor(name: str, value: object) -> Tensor | LowRankOperator:
    if isinstance(value, LowRankOperator):
        return value
    return checks.array(name, value, ("n", "n"), _DTYPES).detach()


def _solve(factor: Tensor | LowRankOperator, x: Tensor, damping: float) -> Tensor:
    if isinstance(factor, LowRankOperator):
        return factor.solve(x, damping)
    damped = factor.clone()
    damped.diagonal().add_(damping)
    cholesky, info = torch.linalg.cholesky_ex(damped)
    if bool(info != 0):  # rounding of the float32 matrix, where float64 may still do
        cholesky, info = torch.linalg.cholesky_ex(damped.double())
    if bool(info != 0):
        least = float(torch.linalg.eigvalsh(damped.double())[0]) - damping
        raise torch.linalg.LinAlgError(
            f"damping is {damping:g}, and the factor has an eigenvalue of {least:g}: it would have "
            f"to be more than {-least:g}"
        )
    return torch.cholesky_solve(x.to(cholesky.dtype), cholesky).to(x.dtype)
