"""The empirical Fisher of softmax outputs, U Uᵀ of the gradients at given labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.operators import _capacitance
from fisherkern.operators._capacitance import Capacitance
from fisherkern.operators._tokens import Batch, TokenOperator
from fisherkern.ops._values import check_labels
from fisherkern.reference import IGNORE_INDEX

# Elements of the panels in which probabilities are added up.
_OTHERS = 1 << 22


def _put_at_labels(panel: Tensor, labels: Tensor, begin: int, values: Tensor) -> None:
    """Set panel[t, y_t − begin] of a panel [T, n] to values [T], for the labels that are in it."""
    column = labels.flatten() - begin
    inside = (column >= 0) & (column < panel.shape[1])
    column = column.clamp(0, panel.shape[1] - 1)[:, None]
    kept = panel.gather(1, column)
    panel.scatter_(1, column, torch.where(inside[:, None], values[:, None], kept))


class EmpiricalFisher(TokenOperator):
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
        workspace: bytes for panels of U; None: 32 MiB on the CPU, 512 MiB on a GPU.
        precision: of the Gram matrix on CUDA, see :func:`fisherkern.covariance_update_`.

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
    _ALIKE = (*TokenOperator._ALIKE, "_ignore_index")

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
    ) -> None:
        super().__init__(logits, temperature, reduction, workspace, precision)
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
        batch = self._batch(z, w, lse, y)
        batch = batch._replace(others=self._one_minus_p(batch, y))
        self._add([batch], self._count + self._count_of(z, w))

    def _one_minus_p(self, batch: Batch, labels: Tensor) -> Tensor:
        """1 − p of the labels, summed from the other classes: where p is 1 it would cancel."""
        total = torch.zeros(batch.tokens, dtype=torch.float64, device=self.device)
        V = self.shape[0]
        step = max(_OTHERS // max(batch.tokens, 1), 64)
        for begin in range(0, V, step):
            end = min(begin + step, V)
            panel = self._diagonal_part.new_empty(batch.tokens, end - begin)
            self._fill_probabilities(panel, batch, batch.largest, begin, end, None, True)
            _put_at_labels(panel, labels, begin, torch.zeros_like(batch.roots))
            total += panel.sum(1, dtype=torch.float64)
        return total.to(self.dtype)

    def _fill_columns(
        self,
        panel: Tensor,
        batch: Batch,
        begin: int,
        end: int,
        scale: Tensor | None,
        transposed: bool,
    ) -> None:
        super()._fill_columns(panel, batch, begin, end, scale, transposed)
        labels, others = batch.labels, batch.others
        assert labels is not None
        assert others is not None
        values = -(batch.roots * self._root * others)
        if scale is not None:
            values = values * scale[labels.flatten().clamp(min=0)]
        _put_at_labels(panel if transposed else panel.mT, labels, begin, values)

    def _take_over(self, shard: EmpiricalFisher) -> None:
        self._add(shard._batches, self._count + shard._count)

    def _capacitance(self, gram: Tensor, sums: Tensor, damping: float) -> Capacitance:
        return _capacitance.of_sum(gram, self._sign)

    def state_dict(self) -> dict[str, Any]:
        """Logits, labels, weights and configuration, for torch.save."""
        return {**super().state_dict(), "ignore_index": self._ignore_index}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> EmpiricalFisher:
        """An operator of a state that `state_dict` gave.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or does not fit.
        """
        configuration = ("temperature", "reduction", "ignore_index")
        missing = {"logits", "labels", "weights", *configuration} - set(state)
        if missing:
            raise KeyError(f"state lacks {', '.join(sorted(missing))}")
        batches = zip(state["logits"], state["labels"], state["weights"], strict=True)
        (z, y, w), *rest = batches
        made = cls(z, y, weights=w, **{name: state[name] for name in configuration})
        for z, y, w in rest:
            made.update(z, y, weights=w)
        return made
