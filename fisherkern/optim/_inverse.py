"""Inverses of damped factors: by Cholesky, or by Newton–Schulz iterations of products alone.

Rounding can make a factor of float32 indefinite where its damping is small. What fails is tried
again in float64 and then reported as a LinAlgError, with the damping that would have done.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern.curvature._finite import all_finite

INVERSES = ("cholesky", "eigh", "inverse-free")
# Newton–Schulz: the ‖I − M X‖_F / √n that is aimed at, the largest that is taken where rounding
# keeps it from that, and the iterations it may take: two or three from a near start, for each
# squares the error, and from afar about log2 of the condition number.
_AIM = {torch.float32: 1e-5, torch.float64: 1e-10}
_TAKEN = 1e-3
_ITERATIONS = 60


def damped_inverse(factor: Tensor, damping: float) -> Tensor:
    """(F + λ I)⁻¹ by Cholesky.

    Args:
        factor: F [n, n], symmetric.
        damping: λ > 0.

    Raises:
        torch.linalg.LinAlgError: F + λ I is not positive definite, in float64 either.
    """
    for dtype in _precisions(factor):
        damped = factor.to(dtype, copy=True)
        damped.diagonal().add_(damping)
        cholesky, info = torch.linalg.cholesky_ex(damped)
        if not bool(info != 0):
            inverse = torch.cholesky_inverse(cholesky).to(factor.dtype)
            if all_finite([inverse]):
                return inverse
    raise _failure(factor, damping)


def eigendecomposition(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, none below zero, and eigenvectors of F.

    Raises:
        torch.linalg.LinAlgError: it does not converge in float64 either, or F is not finite.
    """
    finite(factor)
    for dtype in _precisions(factor):
        try:
            values, vectors = torch.linalg.eigh(factor.to(dtype))
        except torch.linalg.LinAlgError as error:
            failure = error
            continue
        return values.clamp(min=0).to(factor.dtype), vectors.to(factor.dtype)
    raise failure


def inverse_free(factor: Tensor, damping: float, start: Tensor | None = None) -> Tensor:
    """M⁻¹, M = F + λ I, without a factorisation: X ← 2 X − X M X.

    Other than iterations for M^(−1/2), which a start that does not commute with M throws off, this
    converges from every X with ‖I − M X‖ < 1.

    Args:
        factor: F [n, n], symmetric positive semidefinite.
        damping: λ > 0.
        start: the inverse of an earlier M, where the iterations start if it is near enough.

    Raises:
        torch.linalg.LinAlgError: they do not converge, in float64 either.

    Source: Schulz 1933; Pan and Schreiber 1991, "An improved Newton iteration for the generalized
    inverse of a matrix, with applications"; Lin et al. 2023, "Structured inverse-free natural
    gradient", for the use of products alone.
    """
    for dtype in _precisions(factor):
        M = factor.to(dtype, copy=True)
        M.diagonal().add_(damping)
        X, error = _newton_schulz(M, None if start is None else start.to(dtype))
        if error <= _TAKEN:
            return X.to(factor.dtype)
    raise _failure(factor, damping)


def _newton_schulz(M: Tensor, X: Tensor | None) -> tuple[Tensor, float]:
    """The best X of the iterations, and its ‖I − M X‖_F / √n."""
    E = None if X is None else _residual(M, X)
    if E is None or not float(E.norm()) < 0.9:  # the 2-norm is no larger
        largest = float(torch.linalg.matrix_norm(M, ord=float("inf")))
        X = torch.eye(len(M), dtype=M.dtype, device=M.device) / max(largest, 1e-30)
        E = _residual(M, X)
    assert X is not None
    best, least, last = X, float("inf"), float("inf")
    for _ in range(_ITERATIONS):
        norm = float(E.norm())
        if norm < least:
            best, least = X, norm
        # below a half it falls by more than half, until rounding is all that is left
        stalled = not norm < last * (0.5 if last < 0.5 else 2.0)
        if stalled or norm <= _AIM[M.dtype] * len(M) ** 0.5:
            break
        last = norm
        # not made symmetric: that brings rounding back multiplied by the condition number
        X = torch.addmm(X, X, E)
        E = _residual(M, X)
    return best, least / len(M) ** 0.5


def _residual(M: Tensor, X: Tensor) -> Tensor:
    """I − M X."""
    E = -(M @ X)
    E.diagonal().add_(1)
    return E


def _precisions(factor: Tensor) -> tuple[torch.dtype, ...]:
    """What is tried in turn."""
    double = torch.float64
    return (double,) if factor.dtype == double else (factor.dtype, double)


def finite(values: Tensor) -> Tensor:
    """The values themselves, of a factor.

    Raises:
        torch.linalg.LinAlgError: they are not finite.
    """
    if not all_finite([values]):
        raise torch.linalg.LinAlgError("the factor holds NaN or infinity")
    return values


def _failure(factor: Tensor, damping: float) -> torch.linalg.LinAlgError:
    values = torch.linalg.eigvalsh(finite(factor).double())
    least, largest = float(values[0]), float(values[-1])
    if least > -damping:
        return torch.linalg.LinAlgError(
            f"a factor with an eigenvalue of {largest:g} is damped by {damping:g}, too little"
        )
    return torch.linalg.LinAlgError(
        f"a factor with an eigenvalue of {least:g} is damped by {damping:g}; it takes more than "
        f"{-least:g}"
    )
