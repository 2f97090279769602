"""Cases of the head Fisher: from hidden states h [T, d] and W [V, d], against stored logits.

The twins are what a user writes who has the logits: in the dtype of h and W, but for softmax, which
is float32 as language models take it. Ours, with logits that are never rounded to half precision,
have errors of float32.

Multiplications that any formulation has: the logits (2 T V d FLOPs), and with a pullback P W (the
same) and Wᵀ diag(p̄) W (V d², symmetric); with a weight diagonal another 2 T V d.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fisherkern
from fisherkern import reference
from fisherkern.bench import accuracy
from fisherkern.bench.registry import (
    Allowance,
    Bar,
    Case,
    Family,
    Op,
    Shape,
    Tensors,
    register,
)

SOFTCAP = 30.0
# The vocabularies and widths of SmolLM2-135M and Gemma-3-270M.
_SMOL, _GEMMA = (512, 49152, 576), (512, 262144, 640)
_LLAMA = (8192, 128256, 4096)

# ---- inputs -----------------------------------------------------------------------------------


def inputs(case: Case, generator: torch.Generator) -> Tensors:
    """Logits of spread 3: a few likely classes and a long tail, as in language models."""
    tokens, classes, width = case.shape
    h = torch.empty(tokens, width, device=case.device).normal_(generator=generator)
    W = torch.empty(classes, width, device=case.device)
    return h.to(case.dtype), W.normal_(0, 3 / width**0.5, generator=generator).to(case.dtype)


# ---- naive PyTorch ----------------------------------------------------------------------------


def logits(h: Tensor, W: Tensor, softcap: float | None) -> Tensor:
    """Z [T, V], stored."""
    z = h @ W.mT
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def plain_stats(h: Tensor, W: Tensor, softcap: float | None = None) -> Tensors:
    """Logsumexp, entropy, tr F, tr F² and max p."""
    z = logits(h, W, softcap)
    log_p = torch.log_softmax(z, -1, dtype=torch.float32)
    p = log_p.exp()
    s2, s3 = (p * p).sum(-1), (p * p * p).sum(-1)
    entropy, trace = -(p * log_p).sum(-1), (p * (1 - p)).sum(-1)
    return torch.logsumexp(z.float(), -1), entropy, trace, s2 - 2 * s3 + s2 * s2, p.amax(-1)


def plain_mean_probs(h: Tensor, W: Tensor, softcap: float | None = None) -> Tensor:
    """Mean of p over tokens."""
    return torch.softmax(logits(h, W, softcap), -1, dtype=torch.float32).mean(0)


def plain_pullback(h: Tensor, W: Tensor, softcap: float | None = None) -> Tensor:
    """The mean of Jᵀ (diag p − p pᵀ) J."""
    z = logits(h, W, softcap)
    p = torch.softmax(z, -1, dtype=torch.float32)
    slope = None if softcap is None else 1 - (z / softcap).square().float()
    rows = p if slope is None else p * slope
    density = (rows if slope is None else rows * slope).mean(0)
    means = rows.to(W.dtype) @ W
    return ((W.mT * density.to(W.dtype)) @ W - means.mT @ (means / len(h))).float()


def plain_weight_diagonal(h: Tensor, W: Tensor, softcap: float | None = None) -> Tensor:
    """The mean of p (1 − p) h² (∂z / ∂(W h))²."""
    z = logits(h, W, softcap)
    p = torch.softmax(z, -1, dtype=torch.float32)
    rows = p * (1 - p)
    if softcap is not None:
        rows = rows * (1 - (z / softcap).square().float()) ** 2
    return (rows.to(h.dtype).mT @ h.square()).float() / len(h)


# ---- this package -----------------------------------------------------------------------------


def fused_stats(h: Tensor, W: Tensor, softcap: float | None = None) -> Tensors:
    """The five fields."""
    return fisherkern.head_fisher_stats(h, W, softcap=softcap)[:5]


def fused_weight_diagonal(
    h: Tensor, W: Tensor, softcap: float | None = None, out: Tensor | None = None
) -> Tensor:
    """Of W alone, as the twin."""
    return fisherkern.head_fisher_weight_diagonal(h, W, softcap=softcap, out=out).weight


def _like_weight(inputs: Tensors) -> Tensor:
    return torch.empty_like(inputs[1], dtype=torch.promote_types(inputs[1].dtype, torch.float32))


# ---- errors -----------------------------------------------------------------------------------


def _exact_chunks(
    h: Tensor, W: Tensor, softcap: float | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Tokens, their p and ∂z / ∂(W h) in float64."""
    W = W.double()
    for part in accuracy.chunks(len(h), len(W)):
        z, slope = reference.head_logits(h[part], W, None, softcap)
        yield part, z, slope


def exact_stats(h: Tensor, W: Tensor, softcap: float | None = None) -> Tensor:
    """[T, 5] in float64."""
    chunks = _exact_chunks(h, W, softcap)
    stats = [torch.stack(reference.softmax_fisher_stats(z), -1) for _, z, _ in chunks]
    return torch.cat(stats)


def exact_mean_probs(h: Tensor, W: Tensor, softcap: float | None = None) -> Tensor:
    """[V, 1] in float64."""
    total = sum(torch.softmax(z, -1).sum(0) for _, z, _ in _exact_chunks(h, W, softcap))
    return torch.as_tensor(total)[:, None] / len(h)


def exact_pullback(h: Tensor, W: Tensor, softcap: float | None = None) -> Tensor:
    """[d, d] in float64."""
    wide = W.double()
    M = wide.new_zeros(W.shape[1], W.shape[1])
    density = wide.new_zeros(len(W))
    for _, z, slope in _exact_chunks(h, W, softcap):
        rows = torch.softmax(z, -1) * slope
        means = rows @ wide
        M -= means.mT @ means
        density += (rows * slope).sum(0)
    return (M + (wide.mT * density) @ wide) / len(h)


def exact_weight_diagonal(h: Tensor, W: Tensor, softcap: float | None = None) -> Tensor:
    """[V, d] in float64."""
    total = W.new_zeros(W.shape, dtype=torch.float64)
    for part, z, slope in _exact_chunks(h, W, softcap):
        rows = reference.softmax_fisher_diagonal(z) * slope**2
        total.addmm_(rows.mT, h[part].double().square())
    return total / len(h)


def _error(exact: Callable[..., Tensor]) -> Callable[[Tensors, Tensors], float]:
    """Of columns in the 2-norm."""
    truth = functools.lru_cache(maxsize=1)(exact)

    def error(inputs: Tensors, outputs: Tensors) -> float:
        right = truth(*inputs)
        result = outputs[0] if len(outputs) == 1 else torch.stack(outputs, -1)
        result = result[:, None] if result.ndim == 1 else result
        result = accuracy.checked("output", result, tuple(right.shape))
        return accuracy.worst_column(result, right)

    return error


# ---- yardsticks -------------------------------------------------------------------------------


def products(names: tuple[str, ...], case: Case, *, anew: bool = False) -> Callable[[], None]:
    """The products that nobody avoids, alone: on ready operands, into ready results.

    In float32 on a CPU, whose half precision is slower. `anew`: what the op returns is made in
    memory that the system has to hand out, like any result that has no `out`.

    A symmetric one by half: d/2 of its rows, all columns, are the FLOPs of its lower triangle.
    """
    tokens, classes, width = case.shape
    dtype = torch.promote_types(case.dtype, torch.float32) if case.device == "cpu" else case.dtype
    how = {"dtype": dtype, "device": case.device}
    h, W = torch.randn(tokens, width, **how), torch.randn(classes, width, **how)
    p = torch.randn(tokens, classes, **how)
    work: dict[str, Callable[[], Any]] = {
        "logits": partial(torch.mm, h, W.mT, out=torch.empty_like(p)),
        "means": partial(torch.mm, p, W, out=torch.empty_like(h)),
        "symmetric": partial(torch.mm, W.mT[: width // 2], W, out=h.new_empty(width // 2, width)),
        "squares": partial(torch.mm, p.mT, h, out=None if anew else torch.empty_like(W)),
    }

    def run() -> None:
        for name in names:
            work[name]()

    return run


# ---- the family -------------------------------------------------------------------------------


def _floor(result: Callable[[Shape], int]) -> Callable[[Case], int]:
    def floor(case: Case) -> int:
        tokens, classes, width = case.shape
        return (tokens + classes) * width * case.dtype.itemsize + 4 * result(case.shape)

    return floor


def _flops(products: int, symmetric: bool) -> Callable[[Case], float]:
    def flops(case: Case) -> float:
        tokens, classes, width = case.shape
        rest = width * (width + 1) * (classes + tokens) if symmetric else 0
        return float(2 * products * tokens * classes * width + rest)

    return flops


def _ops(softcap: float | None) -> tuple[Op, ...]:
    def op(
        name: str, plain: Any, fused: Any, exact: Any, results: Any, names: tuple[str, ...]
    ) -> Op:
        yardsticks = {"gemms": partial(products, names)}
        large = "squares" in names  # as W is
        if large:
            yardsticks["gemms anew"] = partial(products, names, anew=True)
        return Op(
            name if softcap is None else f"{name}_softcap",
            inputs,
            partial(plain, softcap=softcap),
            _error(partial(exact, softcap=softcap)),
            _floor(results),
            _flops(len(set(names) - {"symmetric"}), "symmetric" in names),
            fused=partial(fused, softcap=softcap),
            out=_like_weight if large else None,
            yardsticks=yardsticks,
            ceiling="gemm",
            target=0.55,
            shapes=None if softcap is None else {"cpu": (_GEMMA,), "cuda": (_LLAMA,)},
        )

    return (
        op("stats", plain_stats, fused_stats, exact_stats, lambda s: 5 * s[0], ("logits",)),
        op(
            "mean_probs",
            plain_mean_probs,
            fisherkern.head_fisher_mean_probs,
            exact_mean_probs,
            lambda s: s[1],
            ("logits",),
        ),
        op(
            "pullback",
            plain_pullback,
            fisherkern.head_fisher_pullback,
            exact_pullback,
            lambda s: s[2] ** 2,
            ("logits", "means", "symmetric"),
        ),
        op(
            "weight_diagonal",
            plain_weight_diagonal,
            fused_weight_diagonal,
            exact_weight_diagonal,
            lambda s: s[1] * s[2],
            ("logits", "squares"),
        ),
    )


def _warm_up(shape: Shape) -> Shape:
    tokens, classes, width = shape
    return min(tokens, 64), min(classes, 2048), min(width, 64)


_PLAIN, _CAPPED = _ops(None), _ops(SOFTCAP)
_SUMS = tuple(op.name for op in (*_PLAIN, *_CAPPED) if op.name.startswith(("stats", "mean")))
_PRODUCTS = tuple(op.name for op in (*_PLAIN, *_CAPPED) if op.name not in _SUMS)
_LARGE = tuple(op.name for op in (*_PLAIN, *_CAPPED) if op.out)
_SMALL = tuple(op.name for op in (*_PLAIN, *_CAPPED) if not op.out)

FAMILY = register(
    Family(
        name="head_fisher",
        dimensions=("T", "V", "d"),
        ops=(*_PLAIN, *_CAPPED),
        headline=tuple(op.name for op in (*_PLAIN, *_CAPPED)),
        shapes={"cpu": (_SMOL, _GEMMA), "cuda": (_LLAMA,)},
        smoke=(24, 513, 32),
        bars=(
            Bar("eager", "least", 1.6, ops=_SUMS, dtypes=("float32",), uses_out=False),
            Bar("eager", "least", 1.2, ops=_PRODUCTS, dtypes=("float32",)),
            Bar("eager", "least", 3.0, dtypes=("bfloat16",)),
            # at most 1.15 times as long as the products alone, into results that are as ready
            Bar("gemms", "least", 1 / 1.15, ops=_SMALL, dtypes=("float32",), uses_out=False),
            Bar("gemms", "least", 1 / 1.15, ops=_LARGE, dtypes=("float32",), uses_out=True),
            Bar("gemms anew", "least", 1 / 1.15, dtypes=("float32",), uses_out=False),
        ),
        memory=Allowance("64 MiB", lambda shape, threads: 64 << 20),
        warm_up=_warm_up,
        sweeps=((128, 49152, 576), (512, 49152, 576), (2048, 49152, 576)),
        # in float64, as the truth
        reference=False,
        automatic=True,
        budget=45.0,
        patience=2.0,
    )
)
