"""An operator of lower rank in place of D + σ U Uᵀ, with a bound of what it leaves out."""

from __future__ import annotations

from typing import NamedTuple

from fisherkern import checks
from fisherkern.operators._base import LowRankOperator
from fisherkern.operators._sketch import frequent_directions
from fisherkern.operators.low_rank import DiagonalMinusLowRank, DiagonalPlusLowRank


class Compressed(NamedTuple):
    """What :func:`compress` returns."""

    operator: DiagonalPlusLowRank
    """D + σ B Bᵀ."""
    error: float
    """δ with 0 ⪯ U Uᵀ − B Bᵀ ⪯ δ I, up to rounding."""


def compress(operator: LowRankOperator, rank: int) -> Compressed:
    """An operator of rank `rank` in place of one of a rank that is too large to solve with.

    One pass over the columns of U, in memory for 2 · rank columns. Since B Bᵀ ⪯ U Uᵀ, a compressed
    Fisher D − B Bᵀ stays positive semidefinite, and its solves x' are near those of the operator:
    ‖x' − x‖ ≤ (δ / λ) ‖x‖.

    Args:
        operator: such as a :class:`fisherkern.SoftmaxFisher` of many tokens.
        rank: columns of B, at least 1.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Source: Ghashami, Liberty, Phillips and Woodruff 2016, "Frequent Directions".

    >>> import torch, fisherkern
    >>> from fisherkern.operators import compress
    >>> z = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    >>> F = fisherkern.SoftmaxFisher(z)
    >>> small, error = compress(F, 4)
    >>> eigenvalues = torch.linalg.eigvalsh(small.to_dense() - F.to_dense())
    >>> bool(eigenvalues.min() > -1e-7) and bool(eigenvalues.max() < error + 1e-7)
    True
    """
    if not isinstance(operator, LowRankOperator):
        raise TypeError(
            f"operator has type {type(operator).__name__}; expected one of fisherkern with a factor"
        )
    if checks.integer("rank", rank) < 1:
        raise ValueError(f"rank is {rank}; allowed are integers >= 1")
    kept = min(rank, operator.shape[0])
    factor, error = frequent_directions(
        operator._column_blocks(kept), kept, operator._diagonal_part
    )
    kind = DiagonalPlusLowRank if operator._sign > 0 else DiagonalMinusLowRank
    return Compressed(kind(operator._diagonal_part, factor), error)
