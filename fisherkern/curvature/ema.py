"""EMACovariance: the moving average of a covariance factor, bias-corrected and mergeable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops.covariance import covariance_update_, mirror_


class EMACovariance:
    """A = S / n, with moving averages S of Σ w x̃ x̃ᵀ and n of N = Σ w over the steps.

    Averaging sum and count apart makes the average exact where that of means is not: the first
    steps need no further bias correction, a step of few tokens weighs little, a step without any
    changes nothing, and any split of a step into micro-batches or shards gives the same factor.
    With equal N per step it is the usual A ← β A + (1 − β) C over 1 − βᵗ.

    Only the lower triangle of S is kept up; :meth:`factor` returns whole matrices.

    Args:
        width: d, the last dimension of x; the factor has one column more with `bias`.
        ema_decay: β in [0, 1), the weight of the old value; None averages all steps alike.
        bias: whether rows get the homogeneous coordinate 1.
        heads: H for x [..., H, d] and one factor per head; None for x [..., d].
        dtype: of S, float32 or float64.
        device: of S.
        precision: of float32 products on CUDA, see :func:`fisherkern.covariance_update_`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value.

    Source: Martens and Grosse 2015, section 5; Kingma and Ba 2015, section 3 (bias correction).

    >>> import torch
    >>> from fisherkern.curvature import EMACovariance
    >>> A = EMACovariance(2, ema_decay=0.9)
    >>> A.update(torch.tensor([[1.0, 0.0], [1.0, 2.0]]))
    >>> A.factor()
    tensor([[1., 1.],
            [1., 2.]])
    """

    def __init__(
        self,
        width: int,
        *,
        ema_decay: float | None = 0.95,
        bias: bool = False,
        heads: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        precision: str = "tf32x3",
    ) -> None:
        for name, value in (("width", width), ("heads", 1 if heads is None else heads)):
            if checks.integer(name, value) < 1:
                raise ValueError(f"{name} is {value}; expected an int >= 1")
        if ema_decay is not None:
            checks.number("ema_decay", ema_decay, 0.0, 1.0)
            if ema_decay == 1:
                raise ValueError("ema_decay is 1: the average would never move; allowed is [0, 1)")
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}; allowed are float32, float64")
        self.width = width
        self.ema_decay = ema_decay
        self.bias = bool(bias)
        self.heads = heads
        self.precision = precision
        D = width + self.bias
        shape = (D, D) if heads is None else (heads, D, D)
        self._sum = torch.zeros(shape, dtype=dtype, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)

    def __repr__(self) -> str:
        """Configuration, without values."""
        return (
            f"EMACovariance({self.width}, ema_decay={self.ema_decay}, bias={self.bias}, "
            f"heads={self.heads}, dtype={self._sum.dtype}, device='{self._sum.device}')"
        )

    @property
    def count(self) -> Tensor:
        """The moving average of the number of tokens, a float64 scalar."""
        return self._count.clone()

    def update(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        scale: float = 1.0,
        new_step: bool = True,
    ) -> None:
        """Add a batch.

        Args:
            x: [..., d], or [..., H, d] with heads; see :func:`fisherkern.covariance_update_`.
            mask: bool [...] over the tokens.
            weights: float [...] >= 0, instead of a mask.
            scale: factor of the new term, not of the count: N² makes gradients of a mean-reduced
                loss those of the sum.
            new_step: False for a further micro-batch of the step before: nothing decays.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value; the
                state is as it was.
        """
        lead = 1 if self.heads is None else 2
        tokens = checks.activations("x", x, lead).shape[:-lead]
        decay = self.ema_decay if new_step else None
        share = 1.0 if self.ema_decay is None else 1.0 - self.ema_decay
        covariance_update_(
            self._sum,
            x,
            ema_decay=decay,
            scale=scale if decay is not None else share * scale,
            mask=mask,
            weights=weights,
            bias=self.bias,
            reduction="sum",
            precision=self.precision,
            mirror=False,
        )
        if decay is not None:
            self._count.mul_(decay)
        given = mask if weights is None else weights
        count = tokens.numel() if given is None else given.sum(dtype=torch.float64)
        self._count.add_(count, alpha=share)

    def factor(self) -> Tensor:
        """A = S / n, exactly symmetric, a new tensor; zeros while no token was seen."""
        n = torch.where(self._count == 0, 1.0, self._count)
        return mirror_((self._sum / n).to(self._sum.dtype))

    @classmethod
    def merge(cls, shards: Sequence[EMACovariance]) -> EMACovariance:
        """The average of the union of the tokens: shards of the same steps as if they were one.

        Raises:
            ValueError: no shards, or shards of different configurations.
        """
        if not shards:
            raise ValueError("shards is empty; expected at least one EMACovariance")
        merged = shards[0]._like()
        for shard in shards:
            if repr(shard) != repr(merged):
                raise ValueError(f"shards holds {shard!r} and {merged!r}; they must be alike")
            merged._sum.add_(shard._sum)
            merged._count.add_(shard._count)
        return merged

    def all_reduced(self, group: Any = None) -> EMACovariance:
        """The merge of the averages of all ranks of a torch.distributed group, on every rank.

        The local average stays as it was, so that what it saw is not counted again next time.
        """
        merged = self._like()
        merged._sum.copy_(self._sum)
        merged._count.copy_(self._count)
        torch.distributed.all_reduce(merged._sum, group=group)
        torch.distributed.all_reduce(merged._count, group=group)
        return merged

    def _like(self) -> EMACovariance:
        return EMACovariance(
            self.width,
            ema_decay=self.ema_decay,
            bias=self.bias,
            heads=self.heads,
            dtype=self._sum.dtype,
            device=self._sum.device,
            precision=self.precision,
        )

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values, for torch.save; a copy."""
        return {
            "sum": self._sum.tril(),
            "count": self._count.clone(),
            "ema_decay": self.ema_decay,
            "bias": self.bias,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same shape; its decay and bias must be those of this object.

        Raises:
            KeyError, ValueError: an entry is missing or does not fit; the state is as it was.
        """
        missing = {"sum", "count", "ema_decay", "bias"} - set(state)
        if missing:
            raise KeyError(f"state lacks {', '.join(sorted(missing))}")
        for name in ("ema_decay", "bias"):
            if state[name] != getattr(self, name):
                raise ValueError(f"state has {name} {state[name]}; expected {getattr(self, name)}")
        total, count = (checks.tensor(name, state[name]) for name in ("sum", "count"))
        if total.shape != self._sum.shape or count.shape != ():
            raise ValueError(
                f"state has a sum of shape {list(total.shape)}; expected {list(self._sum.shape)}"
            )
        self._sum.copy_(total)
        self._count.copy_(count)
