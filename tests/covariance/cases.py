"""The covariance ops under one roof: a new op joins every contract by one entry in OPS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import fisherkern as fk
from conftest import DEVICE
from fisherkern import reference
from softmax_fisher.cases import DTYPES, EPSILON, SLACK, agree, error, generator, require

__all__ = ["DTYPES", "EPSILON", "SLACK", "agree", "error", "generator", "require"]


@dataclass(frozen=True)
class Op:
    """An update of a factor, its definition, and the inputs of one batch.

    `shapes` are those of the inputs, x first; the first `lead` dimensions of x are its tokens.
    """

    id: str
    shapes: tuple[tuple[int, ...], ...]
    lead: int
    update: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    # the new term is linear in the weights, and in the tokens
    linear: bool = True
    symmetric: bool = True

    def make(self, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        g = generator(seed)
        drawn = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in self.shapes]
        return [x.to(dtype).to(DEVICE) for x in drawn]

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.shapes[0][: self.lead]

    def truth(self, *inputs: Tensor, **arguments: Any) -> Tensor:
        """The new term in float64."""
        doubles = {k: v.double() if k == "weights" else v for k, v in arguments.items()}
        return self.definition(*(x.double() for x in inputs), **self.options, **doubles)

    def new(self, *inputs: Tensor, **arguments: Any) -> Tensor:
        """The new term alone, over whatever an uninitialised factor holds."""
        dtype = reference.accumulation_dtype(inputs[0].dtype)
        shape = self.truth(*inputs).shape
        factor = torch.full(shape, torch.nan, dtype=dtype, device=inputs[0].device)
        return self.update(factor, *inputs, ema_decay=0.0, **self.options, **arguments)


def _convolution(factor: Tensor, x: Tensor, **arguments: Any) -> Tensor:
    kernel = arguments.pop("kernel_size")
    return fk.convolution_covariance_update_(factor, x, kernel, workspace=3000, **arguments)


def _convolution_reference(x: Tensor, **arguments: Any) -> Tensor:
    return reference.convolution_covariance(x, arguments.pop("kernel_size"), **arguments)


_CONVOLUTION = {"kernel_size": (2, 3), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}
_COVARIANCE = (fk.covariance_update_, reference.covariance)
_SQUARES = (fk.squared_gradient_update_, reference.squared_gradient)


def _cross(factor: Tensor, x: Tensor, g: Tensor, *, ema_decay: float, **arguments: Any) -> Tensor:
    assert ema_decay == 0
    return fk.cross_covariance(g, x, **arguments)


def _cross_reference(x: Tensor, g: Tensor, **arguments: Any) -> Tensor:
    return reference.cross_covariance(g, x, **arguments)


OPS = [
    Op("covariance", ((3, 11, 40),), 2, *_COVARIANCE),
    Op("covariance-bias", ((3, 11, 40),), 2, *_COVARIANCE, {"bias": True}),
    Op(
        "covariance-heads",
        ((3, 11, 2, 5),),
        2,
        fk.covariance_update_,
        lambda x, **arguments: reference.covariance(x, heads=True, **arguments),
        {"bias": True},
    ),
    Op("convolution", ((4, 6, 5, 8),), 1, _convolution, _convolution_reference, _CONVOLUTION),
    Op(
        "convolution-groups",
        ((4, 6, 5, 8),),
        1,
        _convolution,
        _convolution_reference,
        {**_CONVOLUTION, "groups": 3, "bias": True},
    ),
    Op("cross", ((33, 40), (33, 7)), 1, _cross, _cross_reference, {"bias": True}, symmetric=False),
    Op("squares", ((33, 40), (33, 7)), 1, *_SQUARES, {"bias": True}, symmetric=False),
    Op(
        "squares-per-sample",
        ((4, 11, 40), (4, 11, 7)),
        2,
        *_SQUARES,
        {"per_sample": True},
        linear=False,
        symmetric=False,
    ),
]
IDS: dict[str, Any] = {"ids": lambda value: value.id if isinstance(value, Op) else None}
# those that update a factor: cross_covariance only makes one
UPDATES = [op for op in OPS if op.id != "cross"]
SYMMETRIC = [op for op in OPS if op.symmetric]


def some_tokens(op: Op, seed: int = 1) -> Tensor:
    """A mask that leaves about two thirds of the tokens, the first one out."""
    mask = torch.rand(op.tokens, generator=generator(seed)) > 0.35
    mask.view(-1)[0] = False
    mask.view(-1)[-1] = True
    return mask.to(DEVICE)


def some_weights(op: Op, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Weights in (0, 2), zero where `some_tokens` is False."""
    w = 2 * torch.rand(op.tokens, generator=generator(seed + 10), dtype=torch.float64)
    w = w.to(DEVICE) * some_tokens(op, seed)
    return w.to(reference.accumulation_dtype(dtype))


def bound(truth: Tensor, count: int, dtype: torch.dtype) -> float:
    """Relative error allowed: a few roundings, and a tenth of the walk of `count` random ones."""
    epsilon = EPSILON[reference.accumulation_dtype(dtype)]
    return epsilon * (4 + 0.1 * count**0.5)
