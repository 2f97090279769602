"""Operators with one column of U per token, made of its logits: √(w / N) p / τ, or near it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.operators._base import LowRankOperator
from fisherkern.ops._kernels import kernels
from fisherkern.ops._panel_products import Factor
from fisherkern.ops._rows import token_rows
from fisherkern.ops.softmax_fisher import factor
from fisherkern.ops.softmax_fisher._common import check_tokens
from fisherkern.reference import accumulation_dtype

# Bytes that a solve may take beside the workspace.
_MEMORY = {"cpu": 2 << 30, "cuda": 8 << 30}


class Batch(NamedTuple):
    """Logits [..., V], or hidden states [..., d], as given, and what panels need per token."""

    rows: Tensor
    weights: Tensor | None
    labels: Tensor | None
    reference: Tensor
    """r [T] with p = u exp((z − r) / τ)."""
    unit: Tensor
    """u [T]; zero where the weight is."""
    roots: Tensor
    """√w [T]."""
    at_label: Tensor | None = None
    """What √w p is at the labels instead [T]."""

    @property
    def tokens(self) -> int:
        """T."""
        return self.roots.shape[0]


class TokenOperator(LowRankOperator):
    """D + σ U Uᵀ whose columns belong to the tokens of one or more batches of logits."""

    _ALIKE: tuple[str, ...] = ("_temperature", "_reduction", "shape", "dtype", "device")

    def __init__(
        self,
        rows: Tensor,
        classes: int,
        temperature: float,
        reduction: str,
        workspace: int,
        precision: str,
        memory: int | None,
    ) -> None:
        super().__init__()
        self._temperature = checks.temperature(temperature)
        self._reduction = checks.reduction(reduction, ("mean", "sum"))
        self._precision = checks.choice("precision", precision, factor.PRECISIONS)
        self._workspace = workspace
        self._memory = checks.byte_count("memory", memory, _MEMORY, rows)
        self._batches: list[Batch] = []
        self._count = torch.zeros((), dtype=torch.float64, device=rows.device)
        dtype = accumulation_dtype(rows.dtype)
        self._diagonal_part = torch.zeros(classes, dtype=dtype, device=rows.device)

    def __repr__(self) -> str:
        """Configuration, without values."""
        return (
            f"{type(self).__name__}(classes={self.shape[0]}, tokens={self.rank}, "
            f"temperature={self._temperature}, reduction={self._reduction!r}, "
            f"dtype={self.dtype}, device='{self.device}', path={self.path!r})"
        )

    @property
    def rank(self) -> int:
        """T, the number of tokens."""
        return sum(batch.tokens for batch in self._batches)

    @property
    def count(self) -> Tensor:
        """N = Σ w, a float64 scalar."""
        return self._count.clone()

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

    def _columns(self) -> tuple[Any, ...]:
        """What makes U of logits: the arguments of products with it that follow these."""

        def joined(tensors: Iterable[Tensor]) -> Tensor:
            return torch.cat([t.flatten() for t in tensors])

        batches = self._batches
        labels = [b.labels for b in batches if b.labels is not None]
        at_label = [b.at_label for b in batches if b.at_label is not None]
        return (
            joined(b.reference for b in batches),
            joined(b.unit * b.roots for b in batches) * self._root,
            joined(labels) if labels else None,
            joined(at_label) * self._root if at_label else None,
            self._temperature,
        )

    def _tiles(self) -> Iterator[tuple[int, int, list[Tensor]]]:
        """Ranges of classes, and the logits of all tokens for them; they may share their memory."""
        yield 0, self.shape[0], [batch.rows for batch in self._batches]

    def _token_blocks(self, count: int) -> Iterator[Tensor]:
        """The logits [t, V] of all tokens, at most `count` at a time."""
        for batch in (b for b in self._batches if b.tokens):
            (rows,) = token_rows(batch.rows.ndim - 1, batch.rows)
            for part in rows:
                yield from part.split(count)

    def _project(
        self, y: Tensor, scale: Tensor | None = None, *, ones: bool = False, gram: bool = False
    ) -> tuple[Tensor, Tensor]:
        columns, how = self._columns(), (self._precision, self._workspace)
        sums: tuple[Tensor, Tensor] | None = None
        for begin, end, z in self._tiles():
            s = None if scale is None else scale[begin:end]
            parts = factor.project(z, *columns, s, y[begin:end], ones, gram, *how)
            if sums is None:
                sums = parts
            else:
                for total, part in zip(sums, parts, strict=True):
                    total += part
        assert sums is not None
        return sums

    def _expand(
        self,
        c: Tensor,
        scale: Tensor | None,
        alpha: float,
        y: Tensor,
        y_scale: Tensor | None,
        out: Tensor,
    ) -> None:
        columns, how = self._columns(), (self._precision, self._workspace)
        for begin, end, z in self._tiles():
            s, t = (None if x is None else x[begin:end] for x in (scale, y_scale))
            operands = (*columns, s, c, alpha, y[begin:end], t, *how)
            factor.expand_into(out[begin:end], z, *operands)

    def _panels(self, width: int, scale: Tensor | None = None) -> Iterator[tuple[int, int, Tensor]]:
        columns = self._columns()
        for begin, end, logits in self._tiles():
            z = [token_rows(x.ndim - 1, x)[0] for x in logits if x.numel()]
            if not z:
                yield begin, end, self._diagonal_part.new_empty(end - begin, 0)
                continue
            u = Factor(kernels(z[0]), z, *columns)
            s = None if scale is None else scale[begin:end]
            for first, last, panel in u.panels(width, self._workspace, s, by_class=True):
                yield begin + first, begin + last, panel

    def _column_blocks(self, count: int) -> Iterator[Tensor]:
        reference, unit, labels, at_label, temperature = self._columns()
        memory = self._diagonal_part.new_empty(self.shape[0] * count)
        first = 0
        for z in self._token_blocks(count):
            last = first + z.shape[0]
            here = slice(first, last)
            u = Factor(
                kernels(z),
                [z[None]],
                reference[here],
                unit[here],
                None if labels is None else labels[here],
                None if at_label is None else at_label[here],
                temperature,
            )
            block = memory[: self.shape[0] * (last - first)].view(-1, last - first)
            u.fill(block, 0, self.shape[0], None, True)
            yield block
            first = last

    @abstractmethod
    def _logits_of(self, tokens: Tensor) -> Tensor:
        """The logits [n, V] of the tokens with these numbers [n]."""

    def _drawn(self, count: int, generator: torch.Generator | None) -> Tensor:
        """The numbers [count] of tokens drawn in proportion to their weights."""
        if checks.integer("count", count) < 0:
            raise ValueError(f"count is {count}; expected an int >= 0")
        weights = torch.cat([batch.roots.double().square() for batch in self._batches])
        if not bool(weights.sum() > 0):
            raise ValueError("the operator has no token that counts: none can be drawn")
        # torch draws one at least
        drawn = torch.multinomial(weights, max(count, 1), replacement=True, generator=generator)
        return drawn[:count]

    def _reduced(self, samples: Tensor) -> Tensor:
        """Samples whose second moment is the operator, of those for a mean."""
        return samples * self._count.sqrt().to(self.dtype) if self._reduction == "sum" else samples

    @abstractmethod
    def _take_over(self, shard: Self) -> None:
        """Add the tokens of another operator that is like this one."""

    def _is_like(self, shard: Self) -> bool:
        return type(shard) is type(self) and all(
            getattr(shard, name) == getattr(self, name) for name in self._ALIKE
        )

    @classmethod
    def merge(cls, shards: Sequence[Self]) -> Self:
        """The operator of the union of the tokens, as if it were one batch.

        Raises:
            TypeError: a shard is no such operator.
            ValueError: no shards, or shards of different configuration, V, dtype or device.
        """
        if not shards:
            raise ValueError(f"shards is empty; expected at least one {cls.__name__}")
        for shard in shards:
            if not isinstance(shard, cls):
                raise TypeError(f"shards holds a {type(shard).__name__}; expected {cls.__name__}")
        first, *others = shards
        merged = copy(first)
        for shard in others:
            if not first._is_like(shard):
                raise ValueError(f"shards holds {shard!r} and {first!r}; they must be alike")
            merged._take_over(shard)
        return merged


class LogitsOperator(TokenOperator):
    """One whose logits are given."""

    def __init__(
        self,
        logits: Tensor,
        temperature: float,
        reduction: str,
        workspace: int | None,
        precision: str,
        memory: int | None,
    ) -> None:
        z = checks.logits(logits)
        checks.classes(z, "an operator")
        limit = checks.byte_count("workspace", workspace, factor.WORKSPACE, z)
        super().__init__(z, z.shape[-1], temperature, reduction, limit, precision, memory)

    def _logits_of(self, tokens: Tensor) -> Tensor:
        out = torch.empty(len(tokens), self.shape[0], dtype=self.dtype, device=self.device)
        first = 0
        for batch in self._batches:
            here = (tokens >= first) & (tokens < first + batch.tokens)
            flat = batch.rows.reshape(batch.tokens, self.shape[0])
            out[here] = flat[tokens[here] - first].to(self.dtype)
            first += batch.tokens
        return out

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
    ) -> tuple[Batch, Tensor]:
        """A batch, and its Σ w p [V]."""
        sums, reference, unit = factor.powers(z, w, lse, self._temperature)
        roots = torch.ones_like(unit) if w is None else w.sqrt().flatten()
        return Batch(z, w, labels, reference, unit, roots), sums

    def state_dict(self) -> dict[str, Any]:
        """Logits, weights, labels and configuration of all batches, for torch.save."""
        return {
            "logits": [batch.rows for batch in self._batches],
            "weights": [batch.weights for batch in self._batches],
            "labels": [batch.labels for batch in self._batches],
            "temperature": self._temperature,
            "reduction": self._reduction,
            "precision": self._precision,
        }
