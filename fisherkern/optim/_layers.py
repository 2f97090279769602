"""What turns the gradient of a layer into its natural gradient: one class per form of curvature.

A solver is made of the curvature as it is, and is not changed by what the curvature sees later. Its
tensors can be sent to other ranks, and saved.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fisherkern.curvature import (
    BlockCurvature,
    DiagonalCurvature,
    EigenCurvature,
    KroneckerCurvature,
    LayerCurvature,
    LowRankCurvature,
    WideCurvature,
)
from fisherkern.curvature.head import Kept
from fisherkern.operators import DiagonalPlusLowRank, SoftmaxFisher
from fisherkern.optim._inverse import (
    damped_inverse,
    eigendecomposition,
    finite,
    inverse_free,
)

DAMPING_MODES = ("pi", "exact", "per-factor")


@dataclass(frozen=True)
class Damping:
    """λ, and how it is shared out among the factors of a layer."""

    value: float
    mode: str
    inverse: str

    def shares(self, G: tuple[float, int], A: tuple[float, int]) -> tuple[float, float]:
        """λ_G and λ_A, given trace and order of each factor."""
        if self.mode == "per-factor":
            return self.value, self.value
        a, g = (trace / order for trace, order in (A, G))
        known = 0 < a < math.inf and 0 < g < math.inf  # what is not will be found out elsewhere
        pi = (a / g) ** 0.5 if known else 1.0
        return self.value**0.5 / pi, self.value**0.5 * pi


class Solver(ABC):
    """(F + λ)⁻¹ of one layer."""

    @abstractmethod
    def solve(self, gradient: Tensor) -> Tensor:
        """Of the matrix [d_out, D] of the layer."""

    parts: ClassVar[tuple[str, ...]]
    """Names of what it is made of."""

    def tensors(self) -> dict[str, Any]:
        """Everything it is made of, tensors and plain values, by name."""
        return {name: getattr(self, name) for name in self.parts}


@dataclass
class Inverses(Solver):
    """(G + λ_G)⁻¹ X (A + λ_A)⁻¹; A⁻¹ is [D] for an embedding."""

    G: Tensor
    A: Tensor
    parts = ("G", "A")

    def solve(self, gradient: Tensor) -> Tensor:
        """Two products."""
        half = self.G @ gradient
        return half * self.A if self.A.ndim == 1 else half @ self.A


@dataclass
class Eigenbases(Solver):
    """Q_G ((Q_Gᵀ X Q_A) / (Λ + λ)) Q_Aᵀ; Q_A is None for an embedding: A is diagonal."""

    Q_G: Tensor
    Q_A: Tensor | None
    denominators: Tensor
    parts = ("Q_G", "Q_A", "denominators")

    def solve(self, gradient: Tensor) -> Tensor:
        """Four products, or two."""
        rotated = self.Q_G.mT @ gradient
        if self.Q_A is None:
            return self.Q_G @ rotated.div_(self.denominators)
        rotated = (rotated @ self.Q_A).div_(self.denominators)
        return self.Q_G @ rotated @ self.Q_A.mT


@dataclass
class Elementwise(Solver):
    """X / (D + λ)."""

    denominators: Tensor
    parts = ("denominators",)

    def solve(self, gradient: Tensor) -> Tensor:
        """One division."""
        return gradient / self.denominators


@dataclass
class LowRank(Solver):
    """(D + B Bᵀ + λ)⁻¹ of all parameters of a layer at once."""

    diagonal: Tensor
    factor: Tensor
    damping: Tensor
    parts = ("diagonal", "factor", "damping")

    def __post_init__(self) -> None:
        """Make the operator, which keeps its factorisation."""
        self._operator = DiagonalPlusLowRank(self.diagonal, self.factor)

    def solve(self, gradient: Tensor) -> Tensor:
        """The Woodbury identity."""
        solved = self._operator.solve(gradient.reshape(-1), float(self.damping))
        return solved.reshape(gradient.shape)


@dataclass
class Dense(Solver):
    """(F + λ)⁻¹ of all parameters of a layer at once."""

    inverse: Tensor
    parts = ("inverse",)

    def solve(self, gradient: Tensor) -> Tensor:
        """One product."""
        return (self.inverse @ gradient.reshape(-1)).reshape(gradient.shape)


class Wide(Solver):
    """(G + λ_G)⁻¹ X (A + λ_A)⁻¹ with G an operator of the tokens that are kept."""

    parts = ("kept", "A", "damping")

    def __init__(
        self,
        kept: Kept,
        A: Tensor,
        damping: float,
        G: SoftmaxFisher | DiagonalPlusLowRank | None = None,
    ) -> None:
        self.kept, self.A, self.damping = kept, A, damping
        self._G = kept.operator() if G is None else G

    def solve(self, gradient: Tensor) -> Tensor:
        """The Woodbury identity, whose factorisation G keeps."""
        assert self._G is not None
        return self._G.solve(gradient @ self.A, self.damping)

    def tensors(self) -> dict[str, Any]:
        """The tokens among them."""
        return {**super().tensors(), "kept": vars(self.kept)}


KINDS: dict[str, type[Solver]] = {
    kind.__name__: kind for kind in (Inverses, Eigenbases, Elementwise, LowRank, Dense, Wide)
}


def solver(curvature: LayerCurvature, damping: Damping, before: Solver | None) -> Solver | None:
    """The solver of a layer; None where there is no curvature to make it of.

    Args:
        curvature: of the layer.
        damping: of its factors.
        before: the last solver of the layer, near which "inverse-free" starts.

    Raises:
        torch.linalg.LinAlgError: a factor is not positive definite, or not finite.
    """
    if isinstance(curvature, WideCurvature):
        return _wide(curvature, damping)
    # a layer that was never called has counted terms all the same, and curvature of zero
    if isinstance(curvature, KroneckerCurvature):
        if not (curvature.G.count > 0 and curvature.A.count > 0):
            return None
        if isinstance(curvature, EigenCurvature):
            damping = replace(damping, mode="exact")
        return _kronecker(curvature, damping, before)
    if isinstance(curvature, BlockCurvature):
        F = curvature.matrix()
        return Dense(damped_inverse(F, damping.value)) if F.any() else None
    if isinstance(curvature, LowRankCurvature):
        D, B = map(finite, curvature.parts())
        return LowRank(D, B, D.new_tensor(damping.value)) if D.any() or B.any() else None
    assert isinstance(curvature, DiagonalCurvature)
    squares = finite(curvature.squares.mean())
    return Elementwise(squares + damping.value) if squares.any() else None


def _kronecker(curvature: KroneckerCurvature, damping: Damping, before: Solver | None) -> Solver:
    G, A = curvature.factors()
    if A.ndim == 1:
        if damping.mode == "exact":
            g, Q_G = eigendecomposition(G)
            return Eigenbases(Q_G, None, torch.outer(g, finite(A)) + damping.value)
        lam_G, lam_A = damping.shares((float(G.trace()), len(G)), (float(A.sum()), len(A)))
        return Inverses(damped_inverse(G, lam_G), 1 / (finite(A) + lam_A))
    if damping.inverse == "eigh" or damping.mode == "exact":
        (g, Q_G), (a, Q_A) = eigendecomposition(G), eigendecomposition(A)
        if damping.mode == "exact":
            return Eigenbases(Q_G, Q_A, torch.outer(g, a) + damping.value)
        lam_G, lam_A = damping.shares((float(g.sum()), len(g)), (float(a.sum()), len(a)))
        return Eigenbases(Q_G, Q_A, torch.outer(g + lam_G, a + lam_A))
    lam_G, lam_A = damping.shares((float(G.trace()), len(G)), (float(A.trace()), len(A)))
    if damping.inverse == "inverse-free":
        near = (before.G, before.A) if isinstance(before, Inverses) else (None, None)
        return Inverses(inverse_free(G, lam_G, near[0]), inverse_free(A, lam_A, near[1]))
    return Inverses(damped_inverse(G, lam_G), damped_inverse(A, lam_A))


def _wide(curvature: WideCurvature, damping: Damping) -> Solver | None:
    # lists of its own: a refresh in the middle of a step must not see what is kept after it
    kept, A = Kept().joined(curvature.kept), curvature.A.factor()
    G = kept.operator()
    if G is None or not G.rank:  # no token of the step: what is known of earlier ones is better
        return None
    lam_G, lam_A = damping.shares((float(G.trace()), G.shape[0]), (float(A.trace()), len(A)))
    # factorised now, for the last inverse is kept where that fails
    finite(G.solve(torch.ones(G.shape[0], dtype=G.dtype, device=G.device), lam_G))
    return Wide(kept, damped_inverse(A, lam_A), lam_G, G)


def saved(solver: Solver) -> dict[str, Any]:
    """A solver as tensors and plain values; copies."""
    return {"kind": type(solver).__name__, **copy.deepcopy(solver.tensors())}


def check_saved(name: str, state: Mapping[str, Any]) -> None:
    """Raise ValueError where :func:`restored` cannot."""
    kind = state.get("kind")
    if kind not in KINDS or set(state) != {"kind", *KINDS[kind].parts}:
        raise ValueError(
            f"state has an inverse of {name} of kind {kind!r} with {', '.join(sorted(state))}, "
            "which is none of this version"
        )


def restored(state: Mapping[str, Any], device: torch.device) -> Solver:
    """The solver that :func:`saved` was given, on a device."""
    parts = {name: _moved(value, device) for name, value in state.items() if name != "kind"}
    if state["kind"] == Wide.__name__:
        parts["kept"] = Kept(**parts["kept"])
    return made(state["kind"], parts)


def made(kind: str, parts: dict[str, Any]) -> Solver:
    """A solver by the name of its class."""
    return KINDS[kind](**parts)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(part, device) for part in value)
    if isinstance(value, Mapping):
        return {name: _moved(part, device) for name, part in value.items()}
    return value
