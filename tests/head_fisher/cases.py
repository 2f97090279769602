"""The head ops under one roof: a new op joins every contract by one entry in OPS."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import conftest
import fisherkern as fk
from fisherkern import reference
from softmax_fisher import cases as softmax
from softmax_fisher.cases import DTYPES, EPSILON, SLACK, error, generator, require, tensors

__all__ = ["DTYPES", "EPSILON", "SLACK", "error", "generator", "require", "tensors"]

F32 = torch.float32
# of results that should be the same but for the order of sums
TOLERANCE = {torch.float64: 1e-12, F32: 4e-6}
# GPU back ends multiply on tensor cores: what a product with W is made of is in the dtype of W
CPU_BACKENDS = ("cpp", "reference")


@dataclass(frozen=True)
class Inputs:
    """Hidden states [..., d], a head, and vectors u [..., d] for the op that takes them."""

    hidden: Tensor
    weight: Tensor
    u: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def replace(self, **changes: Any) -> Inputs:
        return dataclasses.replace(self, **changes)

    def tokens(self, index: Any) -> Inputs:
        """Those of some tokens."""
        return self.replace(hidden=self.hidden[index], u=self.u[index])

    def to(self, dtype: torch.dtype) -> Inputs:
        bias = None if self.bias is None else self.bias.to(dtype)
        return Inputs(
            self.hidden.to(dtype), self.weight.to(dtype), self.u.to(dtype), bias, self.softcap
        )


def softcaps(cap: float) -> pytest.MarkDecorator:
    """Without a soft-cap and with one, which has the steps of both: it alone where time is dear."""
    values = [pytest.param(None, id="linear"), pytest.param(cap, id="capped")]
    return pytest.mark.parametrize("softcap", values[1:] if conftest.SLOW else values)


def make(
    lead: tuple[int, ...] | int,
    V: int,
    d: int,
    dtype: torch.dtype = F32,
    *,
    bias: bool = True,
    softcap: float | None = None,
    scale: float = 2.0,
    seed: int = 0,
) -> Inputs:
    """Random inputs; `scale` is that of the logits."""
    lead = (lead,) if isinstance(lead, int) else lead
    g = generator(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(shape, generator=g, dtype=torch.float64) * scale
        return x.to(dtype).to(conftest.DEVICE)

    h, u = random(*lead, d), random(*lead, d)
    W, b = random(V, d, scale=scale / d**0.5), random(V)
    return Inputs(h, W, u, b if bias else None, softcap)


@dataclass(frozen=True)
class Op:
    """`kind`: "token" (each gives its own result), "sum" (over tokens), "gram" ([T, T])."""

    name: str
    kind: str
    # keyword arguments that make the variant of the op
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def short(self) -> str:
        return self.name.removeprefix("head_fisher_")

    @property
    def id(self) -> str:
        return self.short + "".join(f"-{v}" for _, v in self.options if isinstance(v, str))

    @property
    def reduction(self) -> str:
        return dict(self.options).get("reduction", "none")

    @property
    def sloped(self) -> bool:
        """Whether ∂z / ∂(W h + b) of a soft-cap is in the result."""
        return self.short not in ("stats", "mean_probs", "gram")

    @property
    def matrices(self) -> bool:
        """Whether a token gives a matrix: at any size slow, by definition and plainly too."""
        return self.kind == "token" and "pullback" in self.short

    def call(self, x: Inputs, **arguments: Any) -> Any:
        """The result; of a root R, which is unique but for signs, R Rᵀ."""
        result = self.raw(x, **arguments)
        return result @ result.mT if self.short == "pullback_root" else result

    def raw(self, x: Inputs, *, seed: int = 0, **arguments: Any) -> Any:
        """The result as it is returned."""
        operands: list[Any] = [x.hidden, x.weight]
        if self.short == "matvec":
            operands.append(x.u)
        if self.short == "sample":
            operands.append(torch.Generator(conftest.DEVICE).manual_seed(seed))
        given = {"bias": x.bias, "softcap": x.softcap, **dict(self.options), **arguments}
        return getattr(fk, self.name)(*operands, **given)

    def truth(self, x: Inputs, **arguments: Any) -> tuple[Tensor, ...]:
        """In float64, from the reference; not of samples, which depend on rounding."""
        x = x.to(torch.float64)
        arguments = {k: v.double() if k == "weights" else v for k, v in arguments.items()}
        given = {"bias": x.bias, "softcap": x.softcap, **dict(self.options), **arguments}
        for only_how in ("accuracy", "precision", "expected_embedding"):
            given.pop(only_how, None)
        function = getattr(reference, self.name.removesuffix("_root"))
        result = function(x.hidden, x.weight, *([x.u] if self.short == "matvec" else []), **given)
        return (*result[0], result[1]) if self.short == "stats" else tensors(result)


def _variants(name: str, *rows: str, kind: str = "sum", **options: Any) -> list[Op]:
    """A row: the reduction, and after a space the accuracy."""
    ops = []
    for row in rows:
        given = {**dict(zip(("reduction", "accuracy"), row.split(), strict=False)), **options}
        own = "token" if given["reduction"] == "none" else kind
        ops.append(Op(f"head_fisher_{name}", own, tuple(given.items())))
    return ops


_SINGLE = [
    Op("head_fisher_stats", "token", (("expected_embedding", True),)),
    Op("head_fisher_matvec", "token"),
    Op("head_fisher_sample", "token"),
]
if conftest.SLOW:
    # variants have their kernels in common: the main run has them all
    OPS = [
        *_SINGLE,
        *_variants("pullback", "sum standard", "mean high", "none high"),
        *_variants("pullback_root", "mean"),
        *_variants("mean_probs", "sum"),
        *_variants("gram", "mean", kind="gram", damping=0.01),
        *_variants("weight_diagonal", "sum"),
    ]
else:
    OPS = [
        *_SINGLE,
        *_variants("pullback", "sum standard", "mean standard", "none standard"),
        *_variants("pullback", "sum high", "mean high", "none high"),
        *_variants("pullback_root", "sum", "mean", "none"),
        *_variants("mean_probs", "sum", "mean"),
        *_variants("gram", "sum", "mean", kind="gram", damping=0.01),
        *_variants("weight_diagonal", "sum", "mean"),
    ]
# the label of a token depends on its place among the tokens
PLACELESS = [op for op in OPS if op.short != "sample"]
PER_TOKEN = [op for op in OPS if op.kind == "token"]
SUMS = [op for op in OPS if op.kind == "sum" and op.reduction == "sum"]
MEANS = [op for op in OPS if op.reduction == "mean"]
# each op in one variant, for what concerns arguments and how they are passed
ONE_EACH = list({op.short: op for op in reversed(OPS)}.values())
IDS: dict[str, Any] = {"ids": lambda value: value.id if isinstance(value, Op) else None}


# ---- comparisons --------------------------------------------------------------------------------


def close(result: Any, expected: Any, slack: float = 16.0) -> None:
    """To rounding; integers the same."""
    for a, b in zip(tensors(result), tensors(expected), strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        if a.is_floating_point():
            assert error(a, b) <= slack * EPSILON[a.dtype]
        else:
            assert torch.equal(a, b)


def equal(result: Any, expected: Any) -> None:
    """The same bits; NaN equals NaN."""
    for a, b in zip(tensors(result), tensors(expected), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25))


def _sizes(op: Op, x: Inputs, temperature: float, weights: Tensor | None) -> tuple[float, float]:
    """What rounding is relative to: the largest logit, and where a result is E J Jᵀ − μ μᵀ, or
    that times u, the first of these terms."""
    wide = x.to(torch.float64)
    z, slope = reference.head_logits(wide.hidden, wide.weight, wide.bias, wide.softcap)
    logit = z.nan_to_num(0.0, 0.0, 0.0).abs().amax().item() / temperature if len(z) else 0.0
    if op.short != "matvec" and not op.short.startswith("pullback"):
        return logit, 0.0
    w = z.new_ones(len(z)) if weights is None else weights.double()
    if op.reduction == "mean" and w.any():
        w = w / w.sum()
    rows = w[:, None] * torch.softmax(z / temperature, -1) * slope**2 / temperature**2
    if op.short == "matvec":
        return logit, ((rows * (wide.u @ wide.weight.mT)) @ wide.weight).norm().item()
    return logit, (rows @ wide.weight.square()).sum().item()


def check(
    backend: str,
    op: Op,
    x: Inputs,
    *,
    temperature: float = 1.0,
    exact_logits: bool = False,
    **arguments: Any,
) -> tuple[Tensor, ...]:
    """Assert that every result of x [T, d] is within twice the error of plain PyTorch."""
    weights = arguments.get("weights", arguments.get("mask"))
    results = tensors(op.call(x, temperature=temperature, **arguments))
    known = {k: v for k, v in arguments.items() if k in ("mask", "weights")}
    truths = op.truth(x, temperature=temperature, **known)
    ordinary = plain(backend, op, x, temperature=temperature, weights=weights)
    logit, terms = _sizes(op, x, temperature, weights)
    # one rounding of a logit is a relative error of p, which a single token may be spared
    inherited = 0.0 if exact_logits else logit * EPSILON[torch.promote_types(x.hidden.dtype, F32)]
    for result, other, truth in zip(results, ordinary, truths, strict=True):
        assert result.shape == truth.shape
        size = truth.norm().item()
        rounding = SLACK[result.dtype] * EPSILON[result.dtype] + inherited
        reached, plainly = (error(y, truth) * (size or 1.0) for y in (result, other.to(result)))
        assert reached <= 2 * plainly + rounding * max(size, terms)
    return results


# ---- what a user would write --------------------------------------------------------------------


@dataclass(frozen=True)
class _Plain:
    """What the formulas below share, in the accumulation dtype."""

    h: Tensor
    W: Tensor
    u: Tensor
    z: Tensor
    slope: Tensor
    weights: Tensor
    tau: float
    pull: Callable[[Tensor], Tensor]
    damping: float
    each: bool

    @property
    def p(self) -> Tensor:
        return torch.softmax(self.z / self.tau, -1)

    def softmax(self, name: str, *operands: Tensor) -> tuple[Tensor, ...]:
        """Of the logits, without weights."""
        found = next(op for op in softmax.OPS if op.name == f"softmax_fisher_{name}")
        return softmax.plain(found, self.z, *operands, temperature=self.tau)


def plain(
    backend: str, op: Op, x: Inputs, *, temperature: float = 1.0, weights: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The op in unfused PyTorch, the logits stored, in the accumulation dtype; x: [T, d]."""
    dtype = reference.accumulation_dtype(x.hidden.dtype)
    wide = x.to(dtype)
    z = wide.hidden @ wide.weight.mT
    if wide.bias is not None:
        z = z + wide.bias
    slope = torch.ones_like(z)
    if x.softcap is not None:
        z = x.softcap * torch.tanh(z / x.softcap)
        slope = 1 - (z / x.softcap) ** 2
    w = z.new_ones(len(z)) if weights is None else weights.to(dtype)
    if op.reduction == "mean" and w.any():
        w = w / w.sum()

    def pull(rows: Tensor) -> Tensor:
        if backend not in CPU_BACKENDS:
            rows = rows.to(x.weight.dtype).to(dtype)
        return rows @ wide.weight

    damping = dict(op.options).get("damping", 0.0)
    each = op.reduction == "none"
    given = _Plain(wide.hidden, wide.weight, wide.u, z, slope, w, temperature, pull, damping, each)
    return tensors(_PLAIN[op.short](given))


def _stats(x: _Plain) -> tuple[Tensor, ...]:
    fields = [*x.softmax("stats"), x.pull(x.p)]
    return tuple(value * (x.weights[:, None] if value.ndim == 2 else x.weights) for value in fields)


def _matvec(x: _Plain) -> Tensor:
    (fv,) = x.softmax("matvec", x.slope * (x.u @ x.W.mT))
    return x.pull(x.weights[:, None] * x.slope * fv)


def _pullback(x: _Plain) -> Tensor:
    means = x.pull(x.p * x.slope)
    squares = x.weights[:, None] * x.p * x.slope**2

    def difference(t: slice) -> Tensor:
        first = x.W.mT @ (squares[t].sum(0)[:, None] * x.W)
        return (first - (x.weights[t, None] * means[t]).mT @ means[t]) / x.tau**2

    if not x.each:
        return difference(slice(None))
    d = x.W.shape[1]
    matrices = [difference(slice(t, t + 1)) for t in range(len(x.h))]
    return torch.stack(matrices) if matrices else x.W.new_zeros(0, d, d)


def _gram(x: _Plain) -> Tensor:
    U = x.weights.sqrt()[:, None] * x.p / x.tau
    return (U / (x.weights @ x.p / x.tau**2 + x.damping)) @ U.mT


def _weight_diagonal(x: _Plain) -> tuple[Tensor, ...]:
    (diagonal,) = x.softmax("diagonal")
    rows = x.weights[:, None] * x.slope**2 * diagonal
    return rows.mT @ x.h**2, rows.sum(0)


_PLAIN: dict[str, Callable[[_Plain], Any]] = {
    "stats": _stats,
    "matvec": _matvec,
    "pullback": _pullback,
    "pullback_root": _pullback,
    "mean_probs": lambda x: x.weights @ x.p,
    "gram": _gram,
    "weight_diagonal": _weight_diagonal,
}
