"""What mean Fishers D̄ − U Uᵀ share, wherever their logits come from."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from fisherkern.operators import _capacitance
from fisherkern.operators._capacitance import Capacitance
from fisherkern.operators._tokens import Batch, TokenOperator
from fisherkern.ops.softmax_fisher import (
    softmax_fisher_diagonal,
    softmax_fisher_sample,
    softmax_fisher_trace,
)


class MeanFisher(TokenOperator):
    """(1 / N) Σ w (diag p − p pᵀ) / τ²."""

    _sign = -1

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._sum = torch.zeros_like(self._diagonal_part)  # Σ w p

    @abstractmethod
    def _logits(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The logits [..., V] of all tokens, some at a time, and their weights."""

    def _join(self, batches: Sequence[Batch], count: Tensor | int, sums: Tensor) -> None:
        """Take over more batches: their N, and their Σ w p."""
        self._sum = self._sum + sums
        self._add(batches, self._count + count)
        self._diagonal_part = self._sum * (self._factor / self._temperature**2)

    def _take_over(self, shard: Self) -> None:
        self._join(shard._batches, shard._count, shard._sum)

    def _capacitance(self, gram: Tensor, sums: Tensor, damping: float) -> Capacitance:
        return _capacitance.of_softmax(gram, self._roots(), damping * sums)

    def _centred(self, x: Tensor) -> Tensor:
        # F 1 = 0: without the mean under D̄ there is less to cancel
        total = self._sum.sum()
        return x - (self._sum @ x) / torch.where(total == 0, 1.0, total)

    def diagonal(self) -> Tensor:
        """The diagonal Σ w p (1 − p) / (N τ²) [V]."""
        return self._factor * self._sum_over_tokens(softmax_fisher_diagonal, self.shape[0])

    def trace(self) -> Tensor:
        """The trace Σ w Σ p (1 − p) / (N τ²), a scalar."""
        return self._factor * self._sum_over_tokens(softmax_fisher_trace)

    def _sum_over_tokens(self, op: Any, *shape: int) -> Tensor:
        how = {"temperature": self._temperature, "reduction": "sum"}
        total = self._factor.new_zeros(shape)
        for logits, weights in self._logits():
            total += op(logits, weights=weights, **how)
        return total

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Gradients of sampled labels, g = (p − e_y) / τ, whose second moment is the operator.

        Tokens are drawn in proportion to their weights, then y ~ p (type-mc).

        Args:
            count: how many.
            generator: of the device of the operator.

        Returns:
            [count, V], E[g gᵀ] = F̄; times √N for a sum.

        Raises:
            TypeError, ValueError: an argument of the wrong type or value, or no token counts.
        """
        z = self._logits_of(self._drawn(count, generator))
        sampled = softmax_fisher_sample(z, generator, temperature=self._temperature)
        return self._reduced(sampled.gradients)
