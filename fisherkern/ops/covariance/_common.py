"""What the covariance ops share: token arguments and the coefficients of an update."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._values import checked_weights
from fisherkern.reference import accumulation_dtype

PRECISIONS = ("tf32x3", "bf16x6", "tf32", "ieee")


class Tokens(NamedTuple):
    """Which tokens count, and how much; never both a mask and weights."""

    mask: Tensor | None
    weights: Tensor | None
    """In the accumulation dtype of x, values checked."""

    @property
    def either(self) -> Tensor | None:
        """The one that was given."""
        return self.mask if self.weights is None else self.weights


def check_tokens(mask: object, weights: object, x: Tensor, lead: int) -> Tokens:
    """Check a mask or weights over the first `lead` dimensions of x."""
    m, w = checks.mask_or_weights(mask, weights, x, "x", lead)
    return Tokens(m, None if w is None else checked_weights(w, accumulation_dtype(x.dtype)))


class Update(NamedTuple):
    """factor ← beta · factor + alpha · Σ."""

    alpha: Tensor
    """[1] in the dtype of the factor, on its device: N is known there alone."""
    beta: float


def check_update(
    factor: Tensor,
    count: Tensor | int,
    *,
    ema_decay: float | None,
    scale: float,
    reduction: str,
) -> Update:
    """The coefficients of a moving average (accumulation where `ema_decay` is None)."""
    coefficient = scale if ema_decay is None else (1.0 - ema_decay) * scale
    if reduction == "sum":
        alpha = torch.full((1,), coefficient, dtype=factor.dtype, device=factor.device)
    elif isinstance(count, int):
        value = coefficient / count if count else 0.0
        alpha = torch.full((1,), value, dtype=factor.dtype, device=factor.device)
    else:  # a tensor, or the symbol of a compiler
        total = count * torch.ones((), dtype=torch.float64, device=factor.device)
        alpha = torch.where(total == 0, 0.0, coefficient / total).to(factor.dtype).reshape(1)
    return Update(alpha, 1.0 if ema_decay is None else ema_decay)


def token_count(x: Tensor, tokens: Tokens, lead: int) -> Tensor | int:
    """N = Σ w, a tensor where it depends on values."""
    if tokens.either is None:
        return math.prod(x.shape[:lead])  # torch.Size.numel would fix it under torch.export
    return tokens.either.sum(dtype=torch.float64)


def check_options(ema_decay: object, scale: object, reduction: object, precision: object) -> None:
    """Check the arguments that every update has in common."""
    if ema_decay is not None:
        checks.number("ema_decay", ema_decay, 0.0, 1.0)
    checks.number("scale", scale, -math.inf, math.inf)
    checks.reduction(reduction, ("mean", "sum"))
    checks.choice("precision", precision, PRECISIONS)


def coordinates(width: int, bias: object) -> int:
    """Of a row of that width, the homogeneous one of a bias among them."""
    # of a symbolic size and a bool torch 2.11 can trace no sum
    return width + int(bool(bias))


def new_factor(x: Tensor, *shape: int) -> Tensor:
    """An uninitialised factor in the accumulation dtype of x."""
    return torch.empty(shape, dtype=accumulation_dtype(x.dtype), device=x.device)
