"""A diagonal and a low-rank matrix of any origin, D ± U C Uᵀ."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.operators import _capacitance
from fisherkern.operators._base import LowRankOperator
from fisherkern.operators._capacitance import Capacitance
from fisherkern.ops._kernels import kernels
from fisherkern.ops.softmax_fisher.factor import PRECISIONS

_DTYPES = (torch.float32, torch.float64)


class DiagonalPlusLowRank(LowRankOperator):
    """D + U C Uᵀ with D a diagonal, U [n, r] and C symmetric [r, r], or the identity.

    Args:
        diagonal: d [n], float32 or float64, not negative.
        factor: U [n, r], the same dtype.
        core: C [r, r], symmetric and positive definite, the same dtype; None: the identity.
        precision: of Uᵀ D_λ⁻¹ U and Uᵀ D_λ⁻¹ Y, see :func:`fisherkern.covariance_update_`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.
        torch.linalg.LinAlgError: the core is not positive definite.

    Source: Woodbury 1950; Hager 1989, "Updating the inverse of a matrix".

    >>> import torch
    >>> from fisherkern.operators import DiagonalPlusLowRank
    >>> A = DiagonalPlusLowRank(torch.ones(3), torch.tensor([[1.0], [0.0], [2.0]]))
    >>> A.to_dense()
    tensor([[2., 0., 2.],
            [0., 1., 0.],
            [2., 0., 5.]])
    >>> x = A.solve(torch.tensor([1.0, 0.0, 0.0]), damping=1.0)
    >>> torch.allclose(A @ x + x, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)
    True
    """

    _sign = 1

    def __init__(
        self,
        diagonal: Tensor,
        factor: Tensor,
        core: Tensor | None = None,
        *,
        precision: str = "tf32x3",
    ) -> None:
        super().__init__()
        self._precision = checks.choice("precision", precision, PRECISIONS)
        d = checks.array("diagonal", diagonal, ("n",), _DTYPES)
        if bool((d < 0).any()):
            raise ValueError(f"diagonal holds {d.min().item():g}; allowed are values >= 0")
        u = checks.array("factor", factor, ("n", "r"), (d.dtype,))
        checks.device("factor", u, d, "diagonal")
        if u.shape[0] != d.shape[0]:
            raise ValueError(
                f"factor has shape {list(u.shape)}; expected [{d.shape[0]}, r] for a diagonal "
                f"{list(d.shape)}"
            )
        self._diagonal_part = d.detach()
        self._columns = u.detach()
        if core is not None:
            c = checks.array("core", core, ("r", "r"), (d.dtype,))
            checks.device("core", c, d, "diagonal")
            if c.shape[0] != u.shape[1]:
                raise ValueError(
                    f"core has shape {list(c.shape)}; expected [{u.shape[1]}, {u.shape[1]}] for a "
                    f"factor {list(u.shape)}"
                )
            # U C Uᵀ = (U L)(U L)ᵀ
            root = torch.linalg.cholesky(c.detach().double()).to(d.dtype)
            with torch.autocast(d.device.type, enabled=False):
                self._columns = self._columns @ root

    @property
    def rank(self) -> int:
        """The columns r of U."""
        return self._columns.shape[1]

    def _project(
        self, y: Tensor, scale: Tensor | None = None, *, ones: bool = False, gram: bool = False
    ) -> tuple[Tensor, Tensor]:
        u, r = self._columns, self.rank
        products = u.new_zeros(r, y.shape[1] + ones)
        gram_matrix = u.new_zeros((r, r) if gram else (0, 0))
        if u.numel() == 0:
            return products, gram_matrix
        if ones and not y.shape[1]:  # kernels append a column of ones, but not to nothing
            y, ones = u.new_ones(u.shape[0], 1), False
        serving, one = kernels(u, products=True), u.new_ones(1)
        rows = (u if u.stride(1) == 1 else u.contiguous())[None]
        how = (None, None if scale is None else scale.contiguous(), one, 0.0)
        if products.shape[1]:
            y = y if y.stride(1) == 1 else y.contiguous()
            serving.cross_update(y[None], rows, *how, ones, "product", self._precision, products)
        if gram:
            serving.covariance_update(
                rows[:, :, None], *how, False, self._precision, gram_matrix[None]
            )
        return products, gram_matrix

    def _expand(
        self,
        c: Tensor,
        scale: Tensor | None,
        alpha: float,
        y: Tensor,
        y_scale: Tensor | None,
        out: Tensor,
    ) -> None:
        product = self._columns @ c
        product *= alpha if scale is None else alpha * scale[:, None]
        torch.add(product, y if y_scale is None else y_scale[:, None] * y, out=out)

    def _panels(self, width: int, scale: Tensor | None = None) -> Iterator[tuple[int, int, Tensor]]:
        yield 0, self.shape[0], self._columns if scale is None else scale[:, None] * self._columns

    def _column_blocks(self, count: int) -> Iterator[Tensor]:
        yield from self._columns.split(count, 1)

    def _capacitance(self, gram: Tensor, sums: Tensor, damping: float) -> Capacitance:
        return _capacitance.of_sum(gram, self._sign)


class DiagonalMinusLowRank(DiagonalPlusLowRank):
    """D − U C Uᵀ; see :class:`DiagonalPlusLowRank` for the arguments.

    A solve needs D + λ − U C Uᵀ to be positive definite, and loses the digits that cancel in
    1 − Uᵀ (D + λ)⁻¹ U. Of a softmax Fisher :class:`fisherkern.SoftmaxFisher` knows better.

    >>> import torch
    >>> from fisherkern.operators import DiagonalMinusLowRank
    >>> p = torch.tensor([0.5, 0.25, 0.25])
    >>> DiagonalMinusLowRank(p, p[:, None]) @ torch.tensor([1.0, 0.0, 0.0])
    tensor([ 0.2500, -0.1250, -0.1250])
    """

    _sign = -1
