"""The empirical Fisher of softmax outputs, U Uᵀ of the gradients at given labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.operators import _capacitance
from fisherkern.operators._capacitance import Capacitance
from fisherkern.operators._iterative import Product
from fisherkern.operators._tokens import Batch, LogitsOperator
from fisherkern.operators.compression import compress
from fisherkern.ops._values import check_labels
from fisherkern.ops.softmax_fisher import factor, softmax_fisher_gradient
from fisherkern.reference import IGNORE_INDEX

# Rank of the preconditioner of conjugate gradients.
_SKETCH = 256


class EmpiricalFisher(LogitsOperator):
    """(1 / N) Σ w_t g_t g_tᵀ with g_t = (p_t − e_y) / τ, the gradient of the loss at label y_t.

    Not the Fisher, whose labels follow the model: it depends on how well the model fits the labels
    (Kunstner, Balles and Hennig 2019). As an operator on [V] it has one column per token, made from
    the logits whenever it is needed; see :class:`fisherkern.SoftmaxFisher` for what both do.

    Args:
        logits: z [..., V]; float32, bfloat16, float16 or float64 (float64: CPU and reference).
        labels: int64 [...], in [0, V) or `ignore_index`.
        mask: bool [...]; tokens that are False contribute exactly zero.
        weights: float [...] >= 0, instead of a mask.
        temperature: τ > 0; p = softmax(z / τ).
        logsumexp: logsumexp(z / τ) [...], if at hand.
        reduction: "mean" divides by N = Σ w over the tokens that have a label, "sum" does not.
        ignore_index: the label of a token that has none.
        workspace: bytes for parts of U; None: 64 MiB on the CPU, 512 MiB on a GPU.
        precision: of products with U, see :func:`fisherkern.covariance_update_`.
        memory: bytes that a solve may take, see :class:`fisherkern.SoftmaxFisher`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    >>> import torch, fisherkern
    >>> F = fisherkern.EmpiricalFisher(torch.zeros(1, 2), torch.tensor([0]))
    >>> F.to_dense()
    tensor([[ 0.2500, -0.2500],
            [-0.2500,  0.2500]])
    """

    _sign = 1
    _has_diagonal = False
    _ALIKE = (*LogitsOperator._ALIKE, "_ignore_index")

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        temperature: float = 1.0,
        logsumexp: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = IGNORE_INDEX,
        workspace: int | None = None,
        precision: str = "tf32x3",
        memory: int | None = None,
    ) -> None:
        super().__init__(logits, temperature, reduction, workspace, precision, memory)
        self._ignore_index = checks.integer("ignore_index", ignore_index)
        self.update(logits, labels, mask=mask, weights=weights, logsumexp=logsumexp)

    def update(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        logsumexp: Tensor | None = None,
    ) -> None:
        """Add the tokens of another batch; see the constructor for the arguments.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value; the
                operator is as it was.
        """
        z, w, lse = self._checked(logits, mask, weights, logsumexp)
        y = checks.labels(labels, z)
        check_labels(y, z.shape[-1], self._ignore_index)
        given = y != self._ignore_index
        w = given.to(self.dtype) if w is None else torch.where(given, w, 0.0)
        # a token without a label has a weight of zero, and so has whatever is put at its label
        batch, _ = self._batch(z, w, lse, y)
        batch = batch._replace(at_label=-batch.roots * self._one_minus_p(batch, y))
        self._add([batch], self._count + self._count_of(z, w))

    def _one_minus_p(self, batch: Batch, labels: Tensor) -> Tensor:
        """1 − p of the labels [T], summed from the other classes: where p is 1 it would cancel."""
        none = self._diagonal_part.new_empty(self.shape[0], 0)
        sums, _ = factor.project(
            [batch.rows],
            batch.reference,
            batch.unit,
            labels,
            torch.zeros_like(batch.roots),
            self._temperature,
            None,
            none,
            True,
            False,
            self._precision,
            self._workspace,
        )
        return sums[:, 0]

    def sample(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Gradients g = (p − e_y) / τ of tokens drawn in proportion to their weights.

        Args:
            count: how many.
            generator: of the device of the operator.

        Returns:
            [count, V], E[g gᵀ] = the operator; times √N for a sum.

        Raises:
            TypeError, ValueError: an argument of the wrong type or value, or no token counts.
        """
        drawn = self._drawn(count, generator)
        labels = [batch.labels.flatten() for batch in self._batches if batch.labels is not None]
        z, y = self._logits_of(drawn), torch.cat(labels)[drawn]
        return self._reduced(softmax_fisher_gradient(z, y, temperature=self._temperature))

    def _take_over(self, shard: EmpiricalFisher) -> None:
        self._add(shard._batches, self._count + shard._count)

    def _preconditioner(self, damping: float) -> Product:
        # λ I + U Uᵀ is ill-conditioned by the large eigenvalues of U Uᵀ: a sketch has those. Its
        # basis, of twice the rank, takes half the memory at most.
        column_bytes = 4 * self.shape[0] * self.dtype.itemsize
        most = min(_SKETCH, self.rank, (self._memory or 0) // column_bytes)
        if most < 1:
            return super()._preconditioner(damping)
        sketch = compress(self, most).operator
        return lambda x: sketch.solve(x, damping)

    def _capacitance(self, gram: Tensor, sums: Tensor, damping: float) -> Capacitance:
        return _capacitance.of_sum(gram, self._sign)

    def state_dict(self) -> dict[str, Any]:
        """Logits, labels, weights and configuration, for torch.save."""
        return {**super().state_dict(), "ignore_index": self._ignore_index}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], *, workspace: int | None = None, memory: int | None = None
    ) -> EmpiricalFisher:
        """An operator of a state that `state_dict` gave, in the memory that this machine allows.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or does not fit.
        """
        configuration = ("temperature", "reduction", "precision", "ignore_index")
        missing = {"logits", "labels", "weights", *configuration} - set(state)
        if missing:
            raise KeyError(f"state lacks {', '.join(sorted(missing))}")
        batches = zip(state["logits"], state["labels"], state["weights"], strict=True)
        (z, y, w), *rest = batches
        how = {name: state[name] for name in configuration}
        made = cls(z, y, weights=w, workspace=workspace, memory=memory, **how)
        for z, y, w in rest:
            made.update(z, y, weights=w)
        return made
