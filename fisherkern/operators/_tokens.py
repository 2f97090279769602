"""Operators with one column of U per token, made from logits: √(w / N) p / τ, or a change of it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from copy import copy
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.operators._base import LowRankOperator
from fisherkern.ops.softmax_fisher import softmax_fisher_panel, softmax_fisher_stats
from fisherkern.ops.softmax_fisher._common import check_tokens
from fisherkern.reference import accumulation_dtype


class Batch(NamedTuple):
    """Logits [..., V] as they were given, and what panels need per token."""

    logits: Tensor
    weights: Tensor | None
    labels: Tensor | None
    reference: Tensor
    """The largest logit; zero where the weight is."""
    largest: Tensor
    """The largest probability; zero where the weight is."""
    roots: Tensor
    """√w [T]."""
    others: Tensor | None = None
    """1 − p of the labels [T]."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.roots.shape[0]


class TokenOperator(LowRankOperator):
    """D + σ U Uᵀ whose columns belong to the tokens of one or more batches of logits."""

    _ALIKE: tuple[str, ...] = ("_temperature", "_reduction", "shape", "dtype", "device")

    def __init__(
        self,
        logits: Tensor,
        temperature: float,
        reduction: str,
        workspace: int | None,
        precision: str,
    ) -> None:
        super().__init__(workspace, precision)
        self._temperature = checks.temperature(temperature)
        self._reduction = checks.reduction(reduction, ("mean", "sum"))
        z = checks.logits(logits)
        checks.classes(z, "an operator")
        self._batches: list[Batch] = []
        self._count = torch.zeros((), dtype=torch.float64, device=z.device)
        dtype = accumulation_dtype(z.dtype)
        self._diagonal_part = torch.zeros(z.shape[-1], dtype=dtype, device=z.device)

    def __repr__(self) -> str:
        """Configuration, without values."""
        return (
            f"{type(self).__name__}(classes={self.shape[0]}, tokens={self.rank}, "
            f"temperature={self._temperature}, reduction={self._reduction!r}, "
            f"dtype={self.dtype}, device='{self.device}')"
        )

    @property
    def rank(self) -> int:
        """T, the number of tokens."""
        return sum(batch.tokens for batch in self._batches)

    @property
    def count(self) -> Tensor:
        """N = Σ w, a float64 scalar."""
        return self._count.clone()

    def _checked(
        self, logits: object, mask: object, weights: object, logsumexp: object
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Logits of the V, dtype and device of the operator; weights and logsumexp."""
        z = checks.logits(logits).detach()
        if z.shape[-1] != self.shape[0] or accumulation_dtype(z.dtype) != self.dtype:
            raise ValueError(
                f"logits has shape {list(z.shape)} and dtype {z.dtype}; the operator has "
                f"{self.shape[0]} classes and dtype {self.dtype}"
            )
        checks.device("logits", z, self._diagonal_part, "the operator")
        w, lse, _ = check_tokens(z, self._temperature, mask, weights, logsumexp)
        return z, w, lse

    def _batch(
        self, z: Tensor, w: Tensor | None, lse: Tensor | None, labels: Tensor | None
    ) -> Batch:
        lead = z.shape[:-1]
        reference = z.amax(-1).to(self.dtype)
        if lse is None:
            valid = None if w is None else w != 0
            stats = softmax_fisher_stats(z, temperature=self._temperature, mask=valid)
            largest = stats.max_probability
        else:
            largest = torch.exp(reference / self._temperature - lse)
        if w is None:
            roots = torch.ones(lead.numel(), dtype=self.dtype, device=self.device)
        else:
            roots = w.sqrt().flatten()
            reference = torch.where(w == 0, 0.0, reference)
            largest = torch.where(w == 0, 0.0, largest)
        return Batch(z, w, labels, reference, largest, roots)

    def _add(self, batches: Sequence[Batch], count: Tensor) -> None:
        """Take over more batches, and the N of all."""
        self._batches = [*self._batches, *batches]
        self._count = count
        factor = torch.ones_like(count)
        if self._reduction == "mean":
            factor = torch.where(count == 0, 0.0, 1 / count)
        # what multiplies sums over tokens, and √w p in a column of U
        self._factor = factor.to(self.dtype)
        self._root = factor.sqrt().to(self.dtype) / self._temperature
        self._damped = None

    def _count_of(self, z: Tensor, w: Tensor | None) -> Tensor | int:
        return z.shape[:-1].numel() if w is None else w.sum(dtype=torch.float64)

    def _roots(self) -> Tensor:
        """√(w / N) / τ of all tokens [T]."""
        return torch.cat([batch.roots for batch in self._batches]) * self._root

    def _fill_panel(
        self, panel: Tensor, begin: int, end: int, scale: Tensor | None, transposed: bool
    ) -> None:
        first = 0
        for batch in self._batches:
            last = first + batch.tokens
            part = panel[first:last] if transposed else panel[:, first:last]
            self._fill_columns(part, batch, begin, end, scale, transposed)
            first = last

    def _fill_columns(
        self,
        panel: Tensor,
        batch: Batch,
        begin: int,
        end: int,
        scale: Tensor | None,
        transposed: bool,
    ) -> None:
        """The columns of one batch, probabilities times √(w / N) / τ."""
        unit = batch.largest * (batch.roots * self._root).view(batch.largest.shape)
        self._fill_probabilities(panel, batch, unit, begin, end, scale, transposed)

    def _fill_probabilities(
        self,
        panel: Tensor,
        batch: Batch,
        unit: Tensor,
        begin: int,
        end: int,
        scale: Tensor | None,
        transposed: bool,
    ) -> None:
        softmax_fisher_panel(
            batch.logits[..., begin:end],
            batch.reference,
            unit,
            temperature=self._temperature,
            scale=None if scale is None else scale[begin:end],
            transposed=not transposed,
            out=panel,
        )

    @abstractmethod
    def _take_over(self, shard: Self) -> None:
        """Add the tokens of another operator that is like this one."""

    @classmethod
    def merge(cls, shards: Sequence[Self]) -> Self:
        """The operator of the union of the tokens, as if it were one batch.

        Raises:
            ValueError: no shards, or shards of different configuration, V, dtype or device.
        """
        if not shards:
            raise ValueError(f"shards is empty; expected at least one {cls.__name__}")
        first, *others = shards
        merged = copy(first)
        for shard in others:
            if any(getattr(shard, name) != getattr(first, name) for name in cls._ALIKE):
                raise ValueError(f"shards holds {shard!r} and {first!r}; they must be alike")
            merged._take_over(shard)
        return merged

    def state_dict(self) -> dict[str, Any]:
        """Logits, weights, labels and configuration of all batches, for torch.save."""
        return {
            "logits": [batch.logits for batch in self._batches],
            "weights": [batch.weights for batch in self._batches],
            "labels": [batch.labels for batch in self._batches],
            "temperature": self._temperature,
            "reduction": self._reduction,
        }
