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


class Sketch:
    """B, grown by blocks of columns.

    Args:
        rank: of B.
        like: a tensor [n] of the dtype and device of B.
    """

    def __init__(self, rank: int, like: Tensor) -> None:
        self.rank = rank
        self.basis = like.new_zeros(like.shape[0], 2 * rank)
        self.used = 0
        self.bound = 0.0
        """δ, while no column was scaled."""

    def append(self, columns: Tensor) -> None:
        """Add columns [n, any]."""
        for block in columns.split(self.rank, 1):
            if self.used + block.shape[1] > 2 * self.rank:
                self._shrink()
            self.basis[:, self.used : self.used + block.shape[1]] = block
            self.used += block.shape[1]

    def factor(self) -> Tensor:
        """B [n, rank], its own tensor."""
        if self.used > self.rank:
            self._shrink()
        return self.basis[:, : self.rank].contiguous()

    def _shrink(self) -> None:
        # a hook runs under the autocast of the model, which would round the operands
        with torch.autocast(self.basis.device.type, enabled=False):
            self.used, taken = _shrink(self.basis, self.used, self.rank)
        self.bound += taken


def frequent_directions(columns: Iterable[Tensor], rank: int, like: Tensor) -> tuple[Tensor, float]:
    """B [n, rank] and δ, for blocks of columns of U [n, any].

    Args:
        columns: blocks of at most `rank` columns.
        rank: of B.
        like: a tensor [n] of the dtype and device of B.
    """
    sketch = Sketch(rank, like)
    for block in columns:
        sketch.append(block)
    return sketch.factor(), sketch.bound


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
