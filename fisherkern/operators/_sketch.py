"""A low-rank stand-in for U Uᵀ from one pass over its columns, with a bound of what it leaves out.

Frequent Directions (Ghashami, Liberty, Phillips and Woodruff 2016): columns are appended to a basis
B; when it is full its squared singular values are lowered by that of its middle, which empties half
of it. B Bᵀ never exceeds U Uᵀ, and falls short of it by no more than all that was taken off:

    0 ⪯ U Uᵀ − B Bᵀ ⪯ δ I,   δ = the sum of what was taken off.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def frequent_directions(columns: Iterable[Tensor], rank: int, like: Tensor) -> tuple[Tensor, float]:
    """B [n, rank] and δ, for blocks of columns of U [n, any].

    Args:
        columns: blocks of at most `rank` columns.
        rank: of B.
        like: a tensor [n] of the dtype and device of B.
    """
    n = like.shape[0]
    basis, used, bound = like.new_zeros(n, 2 * rank), 0, 0.0
    for block in columns:
        if used + block.shape[1] > 2 * rank:
            used, taken = _shrink(basis, used, rank)
            bound += taken
        basis[:, used : used + block.shape[1]] = block
        used += block.shape[1]
    if used > rank:
        used, taken = _shrink(basis, used, rank)
        bound += taken
    return basis[:, :rank].contiguous(), bound


def _shrink(basis: Tensor, used: int, rank: int) -> tuple[int, float]:
    """Leave at most `rank` columns, orthogonal ones; what was taken off their squares."""
    columns = basis[:, :used]
    squares, vectors = torch.linalg.eigh((columns.mT @ columns).double())
    # the squared singular value that becomes zero, with all below it
    taken = squares[used - rank - 1].clamp(min=0) if used > rank else squares.new_zeros(())
    kept = min(rank, used)
    squares, vectors = squares[-kept:].flip(0), vectors[:, -kept:].flip(1)
    left = (squares - taken).clamp(min=0)
    scale = torch.where(squares > 0, left / torch.where(squares > 0, squares, 1), 0.0).sqrt()
    basis[:, :kept] = columns @ (vectors * scale).to(basis.dtype)
    basis[:, kept:] = 0
    return kept, float(taken)
