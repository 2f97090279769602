"""The ops of the family under one roof: a new op joins every contract by one entry in OPS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import conftest
import fisherkern as fk
from fisherkern import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Rounding of a result that plain PyTorch happens to hit exactly, in units of eps. The float64 truth
# of a float64 result is no better than the result: exp(x) for x = -30 is good to 30 eps in both.
SLACK = {torch.float64: 64, torch.float32: 4, torch.float16: 4, torch.bfloat16: 4}
EPSILON = {
    torch.float64: 2**-52,
    torch.float32: 2**-23,
    torch.float16: 2**-10,
    torch.bfloat16: 2**-7,
}


@dataclass(frozen=True)
class Op:
    """`kind`: what one token gives: "row" [V], "scalar" [], "token sum" (all tokens give [V])."""

    name: str
    kind: str
    operands: tuple[str, ...] = ()
    # how the result scales with a weight w of its token
    power: float = 1.0
    # keyword arguments that make the variant of the op
    options: tuple[tuple[str, Any], ...] = ()
    takes_out: bool = False

    @property
    def id(self) -> str:
        suffix = "".join(f"-{value}" for _, value in self.options)
        return self.name.removeprefix("softmax_fisher_") + suffix

    def call(self, z: Tensor, *operands: Tensor, **arguments: Any) -> Any:
        return getattr(fk, self.name)(z, *operands, **dict(self.options), **arguments)

    def truth(self, z: Tensor, *operands: Tensor, **arguments: Any) -> Any:
        """In float64, from the reference."""
        arguments = {key: _double(value) for key, value in arguments.items()}
        function = getattr(reference, self.name)
        return function(_double(z), *map(_double, operands), **dict(self.options), **arguments)

    def make(self, z: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Operands for these logits."""
        V, lead = z.shape[-1], z.shape[:-1]
        made = []
        for operand in self.operands:
            if operand == "labels":
                labels = torch.randint(V, lead, generator=generator)
                made.append(labels.to(z.device))
            else:
                shape = (*lead, 3, V) if operand == "directions" else z.shape
                x = torch.randn(shape, generator=generator, dtype=torch.float64)
                made.append(x.to(z.dtype).to(z.device))
        return made


OPS = [
    Op("softmax_fisher_matvec", "row", ("v",), takes_out=True),
    Op("softmax_fisher_sqrt_matvec", "row", ("v",), power=0.5, takes_out=True),
    Op("softmax_fisher_sqrt_rmatvec", "row", ("v",), power=0.5, takes_out=True),
    Op("softmax_fisher_quadratic", "scalar", ("v",)),
    Op("softmax_fisher_quadratic", "scalar", ("directions",), options=(("reduction", "mean"),)),
    Op("softmax_fisher_diagonal", "row", takes_out=True),
    Op("softmax_fisher_diagonal", "token sum", options=(("reduction", "sum"),), takes_out=True),
    Op("softmax_fisher_diagonal", "token sum", options=(("reduction", "mean"),), takes_out=True),
    Op("softmax_fisher_mean_probs", "token sum", options=(("reduction", "sum"),), takes_out=True),
    Op("softmax_fisher_mean_probs", "token sum", options=(("reduction", "mean"),), takes_out=True),
    Op("softmax_fisher_trace", "scalar"),
    Op("softmax_fisher_trace", "scalar", options=(("reduction", "mean"),)),
    Op("softmax_fisher_stats", "scalar"),
    Op("softmax_fisher_gradient", "row", ("labels",), takes_out=True),
]
MEANS = [op for op in OPS if ("reduction", "mean") in op.options]
SUMS = [op for op in OPS if op.kind == "token sum" and op not in MEANS]
PER_TOKEN = [op for op in OPS if op.kind != "token sum" and op not in MEANS]
IDS = {"ids": lambda value: value.id if isinstance(value, Op) else None}


def _double(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def logits(shape: tuple[int, ...], dtype: torch.dtype, scale: float = 2.0, seed: int = 0) -> Tensor:
    z = torch.randn(shape, generator=generator(seed), dtype=torch.float64) * scale
    return z.to(dtype).to(conftest.DEVICE)


def require(backend: str, dtype: torch.dtype) -> None:
    """Skip where a back end has no kernels: float64 is for the CPU and the reference."""
    if dtype == torch.float64 and backend not in ("cpp", "reference"):
        pytest.skip(f"{backend} has no float64 kernels (that it says so is tested)")


def error(result: Tensor, truth: Tensor) -> float:
    """Relative error in the Euclidean norm; infinite where one is NaN and the other is not."""
    result, truth = result.double(), truth.double()
    if not torch.equal(result.isnan(), truth.isnan()):
        return float("inf")
    result, truth = result.nan_to_num(), truth.nan_to_num()
    scale = truth.norm().item()
    distance = (result - truth).norm().item()
    return distance / scale if scale else distance


def agree(backend: str, a: Any, b: Any) -> bool:
    """The same bits; on a GPU, where vector loads start at 16-byte lines, the same to rounding."""
    pairs = zip(tensors(a), tensors(b), strict=True)
    if backend in ("cpp", "reference"):
        return all(torch.equal(x.nan_to_num(7.25), y.nan_to_num(7.25)) for x, y in pairs)
    return all(error(x, y) <= 8 * EPSILON[x.dtype] for x, y in pairs)


def budget(result: Tensor, plain: Tensor, truth: Tensor) -> float:
    """Twice plain PyTorch's error and SLACK roundings of the result's dtype."""
    return 2 * error(plain, truth) + SLACK[result.dtype] * EPSILON[result.dtype]


def tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


# ---- what a user would write, in the dtype it is given -----------------------------------------


def plain(op: Op, z: Tensor, *operands: Tensor, temperature: float = 1.0) -> tuple[Tensor, ...]:
    """The op in unfused PyTorch without weights."""
    function: Callable[..., Any] = _PLAIN[op.name.removeprefix("softmax_fisher_")]
    values = tensors(function(z / temperature, temperature, *operands))
    options = dict(op.options)
    reduction = options.get("reduction", "none")
    if reduction == "none":
        return values
    values = tuple(x.flatten(0, z.ndim - 2).sum(0) for x in values)
    count = z.shape[:-1].numel()
    return tuple(x / count for x in values) if reduction == "mean" else values


def _plain_matvec(x: Tensor, tau: float, v: Tensor) -> Tensor:
    p = torch.softmax(x, -1)
    return (p * v - p * (p * v).sum(-1, keepdim=True)) / tau**2


def _plain_sqrt_matvec(x: Tensor, tau: float, v: Tensor) -> Tensor:
    p = torch.softmax(x, -1)
    return (p.sqrt() * v - p * (p.sqrt() * v).sum(-1, keepdim=True)) / tau


def _plain_sqrt_rmatvec(x: Tensor, tau: float, v: Tensor) -> Tensor:
    p = torch.softmax(x, -1)
    return (p.sqrt() * v - p.sqrt() * (p * v).sum(-1, keepdim=True)) / tau


def _plain_quadratic(x: Tensor, tau: float, v: Tensor) -> Tensor:
    if v.ndim == x.ndim:
        return _plain_quadratic(x, tau, v.unsqueeze(-2))[..., 0, 0]
    p = torch.softmax(x, -1)
    mean = (v @ p.unsqueeze(-1)).squeeze(-1)
    second = (v * p.unsqueeze(-2)) @ v.mT
    return (second - mean.unsqueeze(-1) * mean.unsqueeze(-2)) / tau**2


def _plain_stats(x: Tensor, tau: float) -> tuple[Tensor, ...]:
    log_p = torch.log_softmax(x, -1)
    p = log_p.exp()
    s2 = (p * p).sum(-1)
    return (
        torch.logsumexp(x, -1),
        -(p * log_p).sum(-1),
        (1 - s2) / tau**2,
        (s2 - 2 * (p * p * p).sum(-1) + s2 * s2) / tau**4,
        p.amax(-1),
    )


def _plain_gradient(x: Tensor, tau: float, labels: Tensor) -> Tensor:
    one_hot = torch.nn.functional.one_hot(labels, x.shape[-1])
    return (torch.softmax(x, -1) - one_hot.to(x.dtype)) / tau


def _plain_diagonal(x: Tensor, tau: float) -> Tensor:
    p = torch.softmax(x, -1)
    return p * (1 - p) / tau**2


_PLAIN: dict[str, Callable[..., Any]] = {
    "matvec": _plain_matvec,
    "sqrt_matvec": _plain_sqrt_matvec,
    "sqrt_rmatvec": _plain_sqrt_rmatvec,
    "quadratic": _plain_quadratic,
    "diagonal": _plain_diagonal,
    "mean_probs": lambda x, tau: torch.softmax(x, -1),
    "trace": lambda x, tau: _plain_diagonal(x, tau).sum(-1),
    "stats": _plain_stats,
    "gradient": _plain_gradient,
}
