"""What operators D + σ U Uᵀ on a large space share: products, Woodbury solves, determinants.

U [n, r] exists a panel of rows at a time, made by the subclass when it is needed; what is kept is
O(n + r²).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.operators import _eigen
from fisherkern.operators._capacitance import Capacitance
from fisherkern.ops.covariance import covariance_update_

# Bytes of panels: large enough for matrix products at full speed, small beside what they avoid.
_WORKSPACE = {"cpu": 32 << 20, "cuda": 512 << 20}
# Rows of a panel come in multiples of this.
_ROWS = 64


class _Damped(NamedTuple):
    """What a damping asks for once."""

    damping: float
    inverse: Tensor
    """1 / (D + λ) [n]."""
    capacitance: Capacitance


class LowRankOperator(ABC):
    """A symmetric operator D + σ U Uᵀ of order n that is never formed."""

    _sign: int
    """σ: 1 or −1."""
    _diagonal_part: Tensor
    """D [n]."""
    _has_diagonal = True
    """False where D is zero: then λ is divided by in the end, which rounds once and not thrice."""

    def __init__(self, workspace: int | None, precision: str) -> None:
        if workspace is not None and checks.integer("workspace", workspace) < 1:
            raise ValueError(f"workspace is {workspace}; allowed are numbers of bytes >= 1")
        self._workspace = workspace
        self._precision = checks.choice("precision", precision, ("tf32", "tf32x3", "ieee"))
        self._damped: _Damped | None = None

    # ---- what a subclass gives -------------------------------------------------------------------

    @property
    @abstractmethod
    def rank(self) -> int:
        """The columns r of U."""

    @abstractmethod
    def _fill_panel(
        self, panel: Tensor, begin: int, end: int, scale: Tensor | None, transposed: bool
    ) -> None:
        """Write rows [begin, end) of diag(scale) U [n, r], or their transpose."""

    @abstractmethod
    def _capacitance(self, gram: Tensor, sums: Tensor, damping: float) -> Capacitance:
        """Of Γ = Uᵀ D_λ⁻¹ U [r, r], its lower triangle, and Uᵀ D_λ⁻¹ 1 [r]."""

    # ---- shape -----------------------------------------------------------------------------------

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)."""
        n = self._diagonal_part.shape[0]
        return n, n

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of vectors and results, float32, or float64 for float64 inputs."""
        return self._diagonal_part.dtype

    @property
    def device(self) -> torch.device:
        """The device of vectors and results."""
        return self._diagonal_part.device

    def _panels(
        self, width: int, scale: Tensor | None = None, *, transposed: bool = False
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Ranges of rows, and these rows of diag(scale) U: [rows, r], or transposed.

        A panel and a block of `width` columns fit into the workspace together. All panels share
        their memory.
        """
        n, r = self.shape[0], self.rank
        workspace = self._workspace or _WORKSPACE.get(self.device.type, _WORKSPACE["cpu"])
        row_bytes = max(r + width, 1) * self.dtype.itemsize
        step = min(max(workspace // row_bytes // _ROWS * _ROWS, _ROWS), n)
        memory = self._diagonal_part.new_empty(step * r)
        for begin in range(0, n, max(step, 1)):
            end = min(begin + step, n)
            shape = (r, end - begin) if transposed else (end - begin, r)
            panel = memory[: r * (end - begin)].view(shape)
            self._fill_panel(panel, begin, end, scale, transposed)
            yield begin, end, panel

    def _block(self, name: str, value: object) -> Tensor:
        """A vector [n] or a block [n, k], as a block."""
        x = checks.tensor(name, value)
        n = self.shape[0]
        if x.dtype != self.dtype:
            raise TypeError(f"{name} has dtype {x.dtype}; expected {self.dtype}")
        if x.device != self.device:
            raise ValueError(f"{name} is on {x.device}; expected {self.device}")
        if x.ndim not in (1, 2) or x.shape[0] != n:
            raise ValueError(f"{name} has shape {list(x.shape)}; expected [{n}] or [{n}, k]")
        return x.detach() if x.ndim == 2 else x.detach()[:, None]

    # ---- products --------------------------------------------------------------------------------

    def __matmul__(self, x: Tensor) -> Tensor:
        """The product with x [n] or [n, k].

        Raises:
            TypeError, ValueError: x of the wrong type, dtype, device or shape.
        """
        block = self._centred(self._block("x", x))
        coefficients = block.new_zeros(self.rank, block.shape[1])
        for begin, end, panel in self._panels(block.shape[1], transposed=True):
            coefficients.addmm_(panel, block[begin:end])
        out = self._diagonal_part[:, None] * block
        for begin, end, panel in self._panels(block.shape[1], transposed=True):
            out[begin:end].addmm_(panel.mT, coefficients, alpha=self._sign)
        return out.view(x.shape)

    def _centred(self, x: Tensor) -> Tensor:
        """A block that has the same product as x and cancels less in it."""
        return x

    def quadratic(self, x: Tensor) -> Tensor:
        """xᵀ A x, a scalar for x [n] and [k, k] for a block [n, k].

        Raises:
            TypeError, ValueError: x of the wrong type, dtype, device or shape.
        """
        product = self @ x
        if x.ndim == 1:
            return torch.dot(x.detach(), product)
        form = x.detach().mT @ product
        return (form + form.mT) / 2

    def diagonal(self) -> Tensor:
        """The diagonal [n]."""
        out = self._diagonal_part.clone()
        for begin, end, panel in self._panels(0):
            out[begin:end].add_(panel.square_().sum(1), alpha=self._sign)
        return out

    def trace(self) -> Tensor:
        """The sum of the diagonal, a scalar."""
        return self.diagonal().sum()

    def to_dense(self, max_bytes: int = 1 << 30) -> Tensor:
        """The matrix [n, n].

        Raises:
            ValueError: it takes more than `max_bytes`.
        """
        n = self.shape[0]
        size = n * n * self.dtype.itemsize
        if size > max_bytes:
            raise ValueError(
                f"max_bytes is {max_bytes}, and the matrix [{n}, {n}] takes {size}; the operator "
                "multiplies and solves without it"
            )
        U = self._diagonal_part.new_empty(n, self.rank)
        self._fill_panel(U, 0, n, None, False)
        dense = self._sign * (U @ U.mT)
        dense.diagonal().copy_(self.diagonal())
        return dense

    def eigsh(
        self, count: int, *, tolerance: float = 1e-5, rounds: int = 100
    ) -> tuple[Tensor, Tensor]:
        """The largest eigenvalues, and their eigenvectors.

        Small operators are written down; of large ones a block Lanczos method with thick restarts
        takes about 2 k + 40 vectors of memory, and two passes over U per 8 products.

        Args:
            count: k, how many.
            tolerance: of the residuals ‖A v − θ v‖, relative to the largest eigenvalue.
            rounds: of restarts, at most.

        Returns:
            Eigenvalues [k] in decreasing order and orthonormal eigenvectors [n, k].

        Raises:
            TypeError, ValueError: an argument of the wrong type or value.
            torch.linalg.LinAlgError: residuals stay above the tolerance.

        Source: Wu and Simon 2000, "Thick-restart Lanczos method for large symmetric eigenvalue
        problems".
        """
        n, k = self.shape[0], checks.integer("count", count)
        if not 1 <= k <= n:
            raise ValueError(f"count is {k}; allowed are 1 to {n}, the order of the operator")
        checks.number("tolerance", tolerance, 0.0, 1.0)
        if n < 4 * k + 128:
            values, vectors = torch.linalg.eigh(self.to_dense().double())
            values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
        else:
            values, vectors, residual = _eigen.largest(
                lambda x: (self @ x.to(self.dtype)).double(),
                self._diagonal_part,
                k,
                tolerance,
                checks.integer("rounds", rounds),
            )
            if residual > tolerance:
                raise torch.linalg.LinAlgError(
                    f"rounds is {rounds}, after which the residuals are {residual:.1e} of the "
                    f"largest eigenvalue; tolerance is {tolerance:g}"
                )
        return values.to(self.dtype), vectors.to(self.dtype)

    # ---- (A + λ I)⁻¹ -----------------------------------------------------------------------------

    def _factorised(self, damping: float, block: Tensor) -> tuple[_Damped, Tensor]:
        """What `damping` asks for, and Uᵀ D_λ⁻¹ Y of the block Y, in one pass over U if need be."""
        lam = checks.damping(damping)
        known = self._damped if self._damped and self._damped.damping == lam else None
        inverse = known.inverse if known else 1 / (self._diagonal_part + lam)
        root = inverse.sqrt() if self._has_diagonal else None
        r, k = self.rank, block.shape[1]
        gram, sums = block.new_zeros(0 if known else r, r), block.new_zeros(0 if known else r)
        projection = block.new_zeros(r, k)
        scaled: Tensor | None = None
        for begin, end, panel in self._panels(k, root):
            rows = block[begin:end]
            if root is not None:
                if scaled is None:
                    scaled = torch.empty_like(rows)
                rows = torch.mul(root[begin:end, None], rows, out=scaled[: end - begin])
            projection.addmm_(panel.mT, rows)
            if not known:
                self._add_gram(gram, panel)
                ones = torch.ones_like(inverse[begin:end]) if root is None else root[begin:end]
                sums.addmv_(panel.mT, ones)
        if root is None:
            for product in (gram, sums, projection):
                product.div_(lam)
        if not known:
            known = _Damped(lam, inverse, self._capacitance(gram, sums, lam))
            if bool(known.capacitance.failed):
                self._explain_failure(gram, lam)
                known.capacitance.cholesky.fill_(float("nan"))
            self._damped = known
        return known, projection

    def _add_gram(self, gram: Tensor, panel: Tensor) -> None:
        if self.rank:
            covariance_update_(
                gram,
                panel,
                ema_decay=None,
                reduction="sum",
                precision=self._precision,
                mirror=False,
            )

    def _explain_failure(self, gram: Tensor, damping: float) -> None:
        """Raise unless it is a NaN of the inputs, which reaches the results instead."""
        lower = gram.double().tril()
        if bool(lower.isnan().any()):
            return
        # Γ shrinks at least as (max D + λ) / (max D + λ') when λ grows to λ'
        largest = torch.linalg.eigvalsh(lower + lower.tril(-1).mT)[-1]
        top = self._diagonal_part.max().double()
        enough = float(largest * (top + damping) - top)
        raise torch.linalg.LinAlgError(
            f"damping is {damping:g}, and the damped operator is not positive definite; it is "
            f"above {enough:g}"
        )

    def solve(self, y: Tensor, damping: float) -> Tensor:
        """(A + λ I)⁻¹ y for y [n] or [n, k], by the Woodbury identity.

        The factorisation of r × r is kept for further calls of the same damping.

        Args:
            y: [n] or [n, k], in the dtype of the operator.
            damping: λ > 0, in the units of A.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, device, shape or value.
            torch.linalg.LinAlgError: A + λ I is not positive definite.
        """
        block = self._block("y", y)
        damped, projection = self._factorised(damping, block)
        coefficients = damped.capacitance.solve(projection)
        out = torch.empty_like(block)
        scale = damped.inverse if self._has_diagonal else None
        for begin, end, panel in self._panels(block.shape[1], scale, transposed=True):
            rows = out[begin:end]
            if scale is None:
                rows.copy_(block[begin:end])
            else:
                torch.mul(scale[begin:end, None], block[begin:end], out=rows)
            rows.addmm_(panel.mT, coefficients, alpha=-self._sign)
        if scale is None:
            out.div_(damping)
        return out.view(y.shape)

    def inverse_diagonal(self, damping: float) -> Tensor:
        """The diagonal of (A + λ I)⁻¹ [n]: the marginal variances of a Laplace approximation.

        Raises:
            TypeError, ValueError, torch.linalg.LinAlgError: as :meth:`solve`.
        """
        damped, _ = self._factorised(damping, self._diagonal_part.new_empty(self.shape[0], 0))
        core = damped.capacitance.inverse()
        scale = damped.inverse if self._has_diagonal else None
        if scale is None:
            core /= damping
        core = core.to(self.dtype)
        out = torch.ones_like(damped.inverse) if scale is None else damped.inverse.clone()
        for begin, end, panel in self._panels(self.rank, scale):
            out[begin:end].add_((panel @ core).mul_(panel).sum(1), alpha=-self._sign)
        return out.div_(damping) if scale is None else out

    def logdet(self, damping: float) -> Tensor:
        """Log det (A + λ I), a float64 scalar.

        Raises:
            TypeError, ValueError, torch.linalg.LinAlgError: as :meth:`solve`.
        """
        damped, _ = self._factorised(damping, self._diagonal_part.new_empty(self.shape[0], 0))
        return damped.capacitance.logdet() - damped.inverse.double().log().sum()

    def residual(self, x: Tensor, y: Tensor, damping: float) -> Tensor:
        """‖(A + λ I) x − y‖ / ‖y‖, a scalar: what a solution achieved.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, device or shape.
        """
        self._block("y", y)
        return (torch.add(self @ x, x, alpha=damping) - y).norm() / y.norm()
