"""What operators D + σ U Uᵀ on a large space share: products, Woodbury solves, determinants.

Products with U [n, r] are the subclass's, which need not have it in memory; what is kept is
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
from fisherkern.operators._autocast import without_autocast
from fisherkern.operators._capacitance import Capacitance
from fisherkern.operators._iterative import Product, conjugate_gradients
from fisherkern.ops._values import check_disjoint

# Bytes per element of the capacitance: Γ in float32, S and its factor in float64.
_CAPACITANCE = 20
# Blocks of columns that conjugate gradients keep and make.
_BLOCKS = 8


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
    _memory: int | None = None
    """Bytes a solve may take beside inputs and result; None: what the Woodbury identity takes."""
    _has_diagonal = True
    """False where D is zero: then λ is divided by in the end, which rounds once and not thrice."""

    def __init__(self) -> None:
        self._damped: _Damped | None = None

    # ---- what a subclass gives -------------------------------------------------------------------

    @property
    @abstractmethod
    def rank(self) -> int:
        """The columns r of U."""

    @abstractmethod
    def _project(
        self, y: Tensor, scale: Tensor | None = None, *, ones: bool = False, gram: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Uᵀ diag(scale) [y, 1 if `ones`], and the lower triangle of Uᵀ diag(scale) U if `gram`."""

    @abstractmethod
    def _expand(
        self,
        c: Tensor,
        scale: Tensor | None,
        alpha: float,
        y: Tensor,
        y_scale: Tensor | None,
        out: Tensor,
    ) -> None:
        """Write diag(y_scale) y + alpha diag(scale) U c to `out`, contiguous, which may be y."""

    @abstractmethod
    def _panels(self, width: int, scale: Tensor | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """Ranges of rows, and these rows of diag(scale) U: [rows, r], which may share their memory.

        A panel and a block of `width` columns fit into the workspace together.
        """

    @abstractmethod
    def _capacitance(self, gram: Tensor, sums: Tensor, damping: float) -> Capacitance:
        """Of Γ = Uᵀ D_λ⁻¹ U [r, r], its lower triangle, and Uᵀ D_λ⁻¹ 1 [r]."""

    @abstractmethod
    def _column_blocks(self, count: int) -> Iterator[Tensor]:
        """All columns of U [n, at most `count`], some at a time; they may share their memory."""

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

    @property
    def path(self) -> str:
        """What solves, "woodbury" or, where that takes too much memory, "conjugate gradients".

        The Woodbury identity takes 20 r² bytes; it alone gives determinants and the diagonal of the
        inverse.
        """
        fits = self._memory is None or _CAPACITANCE * self.rank**2 <= self._memory
        return "woodbury" if fits else "conjugate gradients"

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

    @without_autocast
    def __matmul__(self, x: Tensor) -> Tensor:
        """The product with x [n] or [n, k].

        Raises:
            TypeError, ValueError: x of the wrong type, dtype, device or shape.
        """
        block = self._centred(self._block("x", x))
        coefficients, _ = self._project(block)
        out = block.new_empty(block.shape)
        self._expand(coefficients, None, float(self._sign), block, self._diagonal_part, out)
        return out.view(x.shape)

    def _centred(self, x: Tensor) -> Tensor:
        """A block that has the same product as x and cancels less in it."""
        return x

    @without_autocast
    def quadratic(self, x: Tensor) -> Tensor:
        """xᵀ A x, a scalar for x [n] and [k, k] for a block [n, k].

        Raises:
            TypeError, ValueError: x of the wrong type, dtype, device or shape.
        """
        product = self._block("product", self @ x)
        # in float64: some BLAS add thousands of terms one after another
        form = self._block("x", x).double().mT @ product.double()
        form = ((form + form.mT) / 2).to(self.dtype)
        return form[0, 0] if x.ndim == 1 else form

    @without_autocast
    def diagonal(self) -> Tensor:
        """The diagonal [n]."""
        out = self._diagonal_part.clone()
        for begin, end, panel in self._panels(0):
            out[begin:end].add_(panel.square().sum(1), alpha=self._sign)
        return out

    @without_autocast
    def trace(self) -> Tensor:
        """The sum of the diagonal, a scalar."""
        return self.diagonal().sum()

    @without_autocast
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
        U = torch.cat([panel.clone() for _, _, panel in self._panels(0)])
        dense = self._sign * (U @ U.mT)
        dense.diagonal().copy_(self.diagonal())
        return dense

    @without_autocast
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
        if checks.integer("rounds", rounds) < 1:
            raise ValueError(f"rounds is {rounds}; allowed are ints >= 1")
        if n < 4 * k + 128:
            dense = self.to_dense().double()
            if not bool(dense.isfinite().all()):  # eigh would raise, and large operators do not
                nan = dense.new_full((n, k), torch.nan).to(self.dtype)
                return nan[0], nan
            values, vectors = torch.linalg.eigh(dense)
            values, vectors = values[-k:].flip(0), vectors[:, -k:].flip(1)
        else:
            values, vectors, residual = _eigen.largest(
                lambda x: (self @ x.to(self.dtype)).double(),
                self._diagonal_part,
                k,
                tolerance,
                rounds,
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
        scale = inverse if self._has_diagonal else None
        new = known is None
        products, gram = self._project(block, scale, ones=new, gram=new)
        if scale is None:
            products.div_(lam)
            gram.div_(lam)
        if known is None:
            sums = products[:, -1]
            known = _Damped(lam, inverse, self._capacitance(gram, sums, lam))
            if bool(known.capacitance.failed):
                self._explain_failure(gram, lam)
                known.capacitance.cholesky.fill_(float("nan"))
            self._damped = known
        return known, products[:, : block.shape[1]]

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

    @without_autocast
    def solve(
        self,
        y: Tensor,
        damping: float,
        *,
        out: Tensor | None = None,
        refine: bool = False,
        tolerance: float = 1e-5,
        iterations: int = 500,
    ) -> Tensor:
        """(A + λ I)⁻¹ y for y [n] or [n, k], by the :attr:`path` that the memory allows.

        The factorisation of r × r that the Woodbury identity needs is kept for further calls of the
        same damping.

        Args:
            y: [n] or [n, k], in the dtype of the operator.
            damping: λ > 0, in the units of A.
            out: destination like y, or y itself.
            refine: whether conjugate gradients follow the Woodbury identity, which is then their
                preconditioner: for a Γ of low precision, such as "tf32". An iteration is a
                product and a solve.
            tolerance: of conjugate gradients: ‖(A + λ I) x − y‖ / ‖y‖ of every column, as they
                carry it along. Rounding of products comes on top, about 2⁻²³ (‖D‖ + λ) / λ in
                float32 (without D: ‖A‖): less is no use, and :meth:`residual` says what it was. The
                relative error of x is at most ‖y‖ / (λ ‖x‖) times as large.
            iterations: of conjugate gradients, at most.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, device, shape or value.
            torch.linalg.LinAlgError: A + λ I is not positive definite, or residuals stay above the
                tolerance.
        """
        block = self._block("y", y)
        destination = None if out is None else self._destination(out, y)
        iterates = refine or self.path != "woodbury"
        # columns that fail to converge must not leave others in an `out` that may be y
        new = destination is None or iterates
        result = block.new_empty(block.shape) if new else destination
        assert result is not None
        if iterates:
            self._iterate(block, damping, tolerance, iterations, result)
        else:
            self._woodbury(block, damping, result)
        if out is None:
            return result.view(y.shape)
        if result.data_ptr() != out.data_ptr():
            out.copy_(result.view(out.shape))
        return out

    def _woodbury(self, block: Tensor, damping: float, out: Tensor) -> None:
        """(A + λ I)⁻¹ of a block by the Woodbury identity; `out` may be the block."""
        damped, projection = self._factorised(damping, block)
        coefficients = damped.capacitance.solve(projection)
        scale = damped.inverse if self._has_diagonal else None
        self._expand(coefficients, scale, float(-self._sign), block, scale, out)
        if scale is None:
            out.div_(damping)

    def _woodbury_of(self, damping: float) -> Product:
        def solve(block: Tensor) -> Tensor:
            out = torch.empty_like(block)
            self._woodbury(block, damping, out)
            return out

        return solve

    def _destination(self, out: object, y: Tensor) -> Tensor:
        """Contiguous memory [n, k] for a result like y: that of `out` where it is."""
        o = checks.tensor("out", out)
        self._block("out", o)
        if o.shape != y.shape:
            raise ValueError(f"out has shape {list(o.shape)}; expected that of y, {list(y.shape)}")
        same = o.data_ptr() == y.data_ptr() and o.stride() == y.stride()
        if not same:
            check_disjoint(o, {"y": y}, " or y itself")
        block = self._block("out", o)
        return block if block.is_contiguous() else block.new_empty(block.shape)

    def _iterate(
        self, block: Tensor, damping: float, tolerance: float, iterations: int, out: Tensor
    ) -> None:
        lam = checks.damping(damping)
        checks.number("tolerance", tolerance, 0.0, 1.0)
        most = checks.integer("iterations", iterations)
        direct = self.path == "woodbury"
        precondition = self._woodbury_of(lam) if direct else self._preconditioner(lam)
        columns = max(block.shape[1], 1)
        column_bytes = max(_BLOCKS * self.shape[0] * self.dtype.itemsize, 1)
        at_once = columns if self._memory is None else max(self._memory // column_bytes, 1)
        for first in range(0, block.shape[1], at_once):
            part = block[:, first : first + at_once]
            x, residual, _ = conjugate_gradients(
                lambda p: torch.add(self @ p, p, alpha=lam),
                part.contiguous(),
                precondition,
                tolerance,
                most,
            )
            # a NaN of the inputs reaches the result
            if bool((residual > tolerance).any()):
                raise torch.linalg.LinAlgError(
                    f"iterations is {most}, after which a residual is {float(residual.max()):.1e}; "
                    f"tolerance is {tolerance:g}. A larger damping ({lam:g}) or memory helps"
                )
            out[:, first : first + at_once] = x

    def _preconditioner(self, damping: float) -> Product:
        """M⁻¹ X with M near A + λ I: its diagonal."""
        inverse = (1 / (self.diagonal() + damping))[:, None]
        return lambda x: inverse * x

    def _needs_woodbury(self, what: str) -> None:
        if self.path != "woodbury":
            needed = _CAPACITANCE * self.rank**2
            raise ValueError(
                f"memory is {self._memory}, and {what} takes {needed} bytes for a rank of "
                f"{self.rank}; allow more, or see fisherkern.operators.compress"
            )

    @without_autocast
    def inverse_diagonal(self, damping: float) -> Tensor:
        """The diagonal of (A + λ I)⁻¹ [n]: the marginal variances of a Laplace approximation.

        Raises:
            TypeError, ValueError, torch.linalg.LinAlgError: as :meth:`solve`.
        """
        self._needs_woodbury("the diagonal of the inverse")
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

    @without_autocast
    def logdet(self, damping: float) -> Tensor:
        """Log det (A + λ I), a float64 scalar.

        Raises:
            TypeError, ValueError, torch.linalg.LinAlgError: as :meth:`solve`.
        """
        self._needs_woodbury("a determinant")
        damped, _ = self._factorised(damping, self._diagonal_part.new_empty(self.shape[0], 0))
        return damped.capacitance.logdet() - damped.inverse.double().log().sum()

    @without_autocast
    def residual(self, x: Tensor, y: Tensor, damping: float) -> Tensor:
        """‖(A + λ I) x − y‖ / ‖y‖, a scalar: what a solution achieved.

        Raises:
            TypeError, ValueError: an argument of the wrong type, dtype, device or shape.
        """
        lam, target = checks.damping(damping), self._block("y", y)
        s = self._block("x", x)
        if x.shape != y.shape:
            raise ValueError(f"x has shape {list(x.shape)}; expected that of y, {list(y.shape)}")
        return (torch.add(self @ s, s, alpha=lam) - target).norm() / target.norm()
