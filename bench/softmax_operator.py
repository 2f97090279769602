"""Cases of the mean softmax Fisher as an operator: one damped solve, and the passes it is made of.

The operator is made anew in each call of `solve`; `apply` and `gram` have statistics at hand.

Logits z [T, V] in the dtype of the case, Y [V, k] and the result float32, whatever that dtype is:
errors are judged in float32. The multiplications that any formulation has are those of S, which is
symmetric (T² V FLOPs), and two of U with k columns (2 T V k each).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from fisherkern.bench import accuracy, woodbury
from fisherkern.bench.registry import (
    DTYPES,
    Allowance,
    Bar,
    Case,
    Family,
    Op,
    Shape,
    Share,
    Tensors,
    register,
)
from fisherkern.operators import SoftmaxFisher
from fisherkern.ops.softmax_fisher import softmax_fisher_expand, softmax_fisher_project

DAMPING = 1e-4

# ---- inputs -----------------------------------------------------------------------------------


def language_logits(
    tokens: int, classes: int, generator: torch.Generator, device: str = "cpu"
) -> Tensor:
    """float32 logits [T, V] that resemble those of a language model.

    Classes have frequencies of rank^-0.8. Each token has up to 128 likely classes, frequent ones
    more often, and one of them is its favourite; how much they stand out differs over tokens. At
    (512, 49152): mean entropy 2.6 nats, mean tr F 0.70, 75 % of the probabilities below 6e-8, a
    token in 27 with p > 0.99, 349 different arg-maxes. SmolLM2-135M on WikiText-2: 2.9, 0.66, 72 %.
    """
    on = {"device": device, "generator": generator}
    frequency = -0.8 * torch.arange(1, classes + 1, device=device).log()
    z = torch.empty(tokens, classes, device=device).normal_(0, 2.2, generator=generator)
    z += frequency
    count = min(128, classes)
    likely = (classes ** torch.rand(tokens, count, **on)).long().sub_(1).clamp_(0, classes - 1)
    height = torch.empty(tokens, count, device=device).normal_(0, 2.0, generator=generator)
    height += 7.0 * torch.rand(tokens, 1, **on)
    height[:, 0] += 10.0 * torch.rand(tokens, **on)
    # the largest of several: a sum would make the most frequent classes certain
    return z.scatter_reduce_(1, likely, height, "amax")


def _inputs(case: Case, generator: torch.Generator) -> Tensors:
    tokens, classes, columns = case.shape
    z = language_logits(tokens, classes, generator, case.device).to(case.dtype)
    y = torch.empty(classes, columns, device=case.device).normal_(generator=generator)
    return z, y.to(case.accuracy_dtype)


def _factor(case: Case, generator: torch.Generator) -> Tensors:
    """Logits, what makes U of them, and 1 / D."""
    tokens, classes, _ = case.shape
    z = language_logits(tokens, classes, generator, case.device).to(case.dtype)
    p = torch.softmax(z.double(), -1)
    unit = (p.amax(-1) / tokens**0.5).to(case.accuracy_dtype)
    inverse = (1 / (p.mean(0) + DAMPING)).to(case.accuracy_dtype)
    return z, z.amax(-1).to(case.accuracy_dtype), unit, inverse


def _factor_and_blocks(case: Case, generator: torch.Generator) -> Tensors:
    tokens, classes, columns = case.shape
    how = {"device": case.device, "dtype": case.accuracy_dtype}
    y = torch.empty(classes, columns, **how).normal_(generator=generator)
    c = torch.empty(tokens, columns, **how).normal_(generator=generator)
    return *_factor(case, generator), y, c


# ---- who computes it --------------------------------------------------------------------------


def solve(z: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """This package: the operator is new in each call, so nothing is left of an earlier one."""
    return SoftmaxFisher(z).solve(y, DAMPING, out=out)


def apply(z: Tensor, r: Tensor, u: Tensor, d: Tensor, y: Tensor, c: Tensor) -> Tensor:
    """This package: one pass over the logits, statistics at hand."""
    return softmax_fisher_expand(z, r, u, c, scale=d, y=y, y_scale=d)


def gram(z: Tensor, r: Tensor, u: Tensor, d: Tensor) -> Tensor:
    """This package, the same."""
    return softmax_fisher_project(z, r, u, d.new_empty(len(d), 0), scale=d, gram=True)[1]


def products(case: Case, *, anew: bool = False) -> Callable[[], None]:
    """The products that nobody avoids, alone: on ready float32 operands.

    Into ready results, or `anew` into memory that the system has to hand out, like any result that
    has no `out`. S by half: T/2 of its rows, all columns, are the T² V FLOPs of its lower triangle.
    """
    tokens, classes, columns = case.shape
    dtype = case.accuracy_dtype
    # normal values: tiny ones could be denormal, which some CPUs multiply more slowly
    u = torch.randn(tokens, classes, dtype=dtype, device=case.device)
    y = torch.randn(classes, columns, dtype=dtype, device=case.device)
    c = torch.randn(tokens, columns, dtype=dtype, device=case.device)
    s, b, x = u.new_empty(tokens // 2, tokens), torch.empty_like(c), torch.empty_like(y)

    def run() -> None:
        torch.mm(u[: tokens // 2], u.mT, out=None if anew else s)
        torch.mm(u, y, out=None if anew else b)
        torch.mm(u.mT, c, out=None if anew else x)

    return run


# ---- the family -------------------------------------------------------------------------------


def _floor(case: Case) -> int:
    tokens, classes, columns = case.shape
    return tokens * classes * case.dtype.itemsize + 2 * 4 * classes * columns


def _flops(case: Case) -> float:
    tokens, classes, columns = case.shape
    return float(classes * (tokens * (tokens + 1) + 4 * tokens * columns))


def _apply_flops(case: Case) -> float:
    tokens, classes, columns = case.shape
    return float(2 * tokens * classes * columns)


def _gram_floor(case: Case) -> int:
    tokens, classes, _ = case.shape
    return tokens * classes * case.dtype.itemsize + 4 * tokens * tokens


def _gram_flops(case: Case) -> float:
    tokens, classes, _ = case.shape
    return float(classes * tokens * (tokens + 1))


def _warm_up(shape: Shape) -> Shape:
    tokens, classes, columns = shape
    return min(tokens, 64), min(classes, 2048), min(columns, 16)


FAMILY = register(
    Family(
        name="softmax_operator",
        dimensions=("T", "V", "k"),
        ops=(
            Op(
                "solve",
                _inputs,
                partial(woodbury.sketch, damping=DAMPING),
                accuracy.matrix(partial(woodbury.exact, damping=DAMPING), accuracy.worst_column),
                _floor,
                _flops,
                fused=solve,
                out=lambda inputs: torch.empty_like(inputs[1]),
                yardsticks={"gemms": products, "gemms anew": partial(products, anew=True)},
                plain_synchronizes=True,
                synchronizes=True,
                widens=True,
                ceiling="gemm",
            ),
            Op(
                "apply",
                _factor_and_blocks,
                woodbury.apply,
                accuracy.matrix(woodbury.exact_apply, accuracy.worst_column),
                _floor,
                _apply_flops,
                fused=apply,
                widens=True,
                target=0.75,
                shapes={
                    "cpu": ((512, 49152, 64),),
                    "cuda": ((8192, 49152, 16), (8192, 49152, 64), (8192, 49152, 128)),
                },
            ),
            Op(
                "gram",
                _factor,
                woodbury.gram,
                accuracy.matrix(woodbury.exact_gram, accuracy.worst_column),
                _gram_floor,
                _gram_flops,
                fused=gram,
                widens=True,
                ceiling="gemm",
                target=0.55,
                shapes={"cpu": ((512, 49152, 0),), "cuda": ((4096, 49152, 0), (8192, 49152, 0))},
            ),
        ),
        headline=("solve", "apply", "gram"),
        # the vocabulary and the width of SmolLM2-135M
        shapes={
            "cpu": ((512, 49152, 576),),
            "cuda": ((512, 49152, 576), (8192, 49152, 64)),
        },
        smoke=(48, 513, 8),
        bars=(
            Bar("eager", "least", 1.3),
            Bar("eager", "least", 3.0, ops=("solve",), dtypes=("bfloat16",)),
            # at most 1.15 times as long as the products alone, into results that are as ready
            Bar("gemms", "least", 1 / 1.15, dtypes=("float32",), uses_out=True),
            Bar("gemms anew", "least", 1 / 1.15, dtypes=("float32",), uses_out=False),
        ),
        shares=(Share("extra_bytes", "eager", 0.5), Share("max_error", "eager", 1.0)),
        # what 8192 tokens may take; eager's half is the bar of the shapes that are run by default
        memory=Allowance("2 GiB", lambda shape, threads: 2 << 30),
        warm_up=_warm_up,
        sweeps=((128, 49152, 64), (512, 49152, 64), (2048, 49152, 64)),
        written_for=tuple(DTYPES),
        # in float64, as the truth
        reference=False,
        automatic=True,
        budget=60.0,
    )
)
