"""EMACovariance: the moving average of a covariance factor, bias-corrected and mergeable."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.curvature._average import MovingAverage, checked_count, checked_decay
from fisherkern.ops.covariance import covariance_update_, mirror_


class EMACovariance(MovingAverage):
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
        checked_decay(ema_decay)
        D = width + bool(bias)
        shape = (D, D) if heads is None else (heads, D, D)
        super().__init__(shape, ema_decay=ema_decay, dtype=dtype, device=device)
        self.width = width
        self.bias = bool(bias)
        self.heads = heads
        self.precision = precision

    def __repr__(self) -> str:
        """Configuration, without values."""
        return (
            f"EMACovariance({self.width}, ema_decay={self.ema_decay}, bias={self.bias}, "
            f"heads={self.heads}, dtype={self._sum.dtype}, device='{self._sum.device}')"
        )

    def update(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        scale: float = 1.0,
        count: Tensor | float | None = None,
        new_step: bool = True,
    ) -> None:
        """Add a batch.

        Args:
            x: [..., d], or [..., H, d] with heads; see :func:`fisherkern.covariance_update_`.
            mask: bool [...] over the tokens.
            weights: float [...] >= 0, instead of a mask.
            scale: factor of the new term, not of the count: N² makes gradients of a mean-reduced
                loss those of the sum.
            count: >= 0, of the tokens, where it is not N = Σ w; a number, or a scalar tensor, whose
                value is checked on a CPU alone, for a GPU would have to be waited for.
            new_step: False for a further micro-batch of the step before: nothing decays.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value; the
                state is as it was.
        """
        lead = 1 if self.heads is None else 2
        tokens = checks.activations("x", x, lead).shape[:-lead]
        given = mask if weights is None else weights
        if count is not None:
            count = checked_count(count, self._sum.device)

        def write(total: Tensor, decay: float | None, factor: float) -> None:
            covariance_update_(
                total,
                x,
                ema_decay=decay,
                scale=factor,
                mask=mask,
                weights=weights,
                bias=self.bias,
                reduction="sum",
                precision=self.precision,
                mirror=False,
            )

        def counted() -> Tensor | float:
            if count is not None:
                return count
            return tokens.numel() if given is None else given.sum(dtype=torch.float64)

        due = self._steps_due
        if new_step:
            self.begin_step()
        try:
            self.add(write, counted, scale)
        except Exception:
            self._steps_due = due
            raise

    def factor(self) -> Tensor:
        """A = S / n, exactly symmetric, a new tensor; zeros while no token was seen."""
        return mirror_(self.mean())

    def _like(self) -> Self:
        return type(self)(
            self.width,
            ema_decay=self.ema_decay,
            bias=self.bias,
            heads=self.heads,
            dtype=self._sum.dtype,
            device=self._sum.device,
            precision=self.precision,
        )

    def _configuration(self) -> dict[str, Any]:
        return {**super()._configuration(), "bias": self.bias}

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values, for torch.save; a copy."""
        return {**super().state_dict(), "sum": self._sum.tril()}
