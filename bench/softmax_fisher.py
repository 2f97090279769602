"""Cases of the softmax Fisher: the public op, its naive PyTorch twin, its error and its floor.

The twins are what a user writes, in the dtype of the logits. Two of them take softmax in float32
for half-precision logits: the mean probabilities, which are float32 by contract, and the
statistics, whose tr F² = Σp² − 2Σp³ + (Σp²)² is wrong by 10 % on confident tokens in bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

# ---- inputs -----------------------------------------------------------------------------------


def _logits(case: Case, generator: torch.Generator) -> Tensor:
    # spread 3: a few likely classes and a long tail, as in language models
    z = torch.empty(case.shape, device=case.device).normal_(0, 3, generator=generator)
    return z.to(case.dtype)


def _alone(case: Case, generator: torch.Generator) -> Tensors:
    return (_logits(case, generator),)


def _with_vector(case: Case, generator: torch.Generator) -> Tensors:
    z = _logits(case, generator)
    v = torch.empty(case.shape, device=case.device).normal_(generator=generator)
    return z, v.to(case.dtype)


def _with_labels(case: Case, generator: torch.Generator) -> Tensors:
    tokens, classes = case.shape
    z = _logits(case, generator)
    return z, torch.randint(classes, (tokens,), device=case.device, generator=generator)


# ---- naive PyTorch ----------------------------------------------------------------------------


def plain_matvec(z: Tensor, v: Tensor) -> Tensor:
    """F v = p ⊙ v − p ⟨p, v⟩."""
    p = torch.softmax(z, -1)
    return p * v - p * (p * v).sum(-1, keepdim=True)


def plain_sqrt_matvec(z: Tensor, v: Tensor) -> Tensor:
    """L v = √p ⊙ v − p ⟨√p, v⟩."""
    p = torch.softmax(z, -1)
    root = p.sqrt()
    return root * v - p * (root * v).sum(-1, keepdim=True)


def plain_sqrt_rmatvec(z: Tensor, v: Tensor) -> Tensor:
    """Lᵀ v = √p ⊙ (v − ⟨p, v⟩)."""
    p = torch.softmax(z, -1)
    return p.sqrt() * (v - (p * v).sum(-1, keepdim=True))


def plain_quadratic(z: Tensor, v: Tensor) -> Tensor:
    """Variance of v under p."""
    p = torch.softmax(z, -1)
    return (p * (v - (p * v).sum(-1, keepdim=True)) ** 2).sum(-1)


def plain_diagonal(z: Tensor) -> Tensor:
    """P (1 − p)."""
    p = torch.softmax(z, -1)
    return p * (1 - p)


def plain_mean_probs(z: Tensor) -> Tensor:
    """Mean of p over tokens, in float32."""
    return torch.softmax(z, -1, dtype=torch.float32).mean(0)


def plain_trace(z: Tensor) -> Tensor:
    """Σ p (1 − p)."""
    p = torch.softmax(z, -1)
    return (p * (1 - p)).sum(-1)


def plain_stats(z: Tensor) -> Tensors:
    """Logsumexp, entropy, tr F, tr F² and max p, in float32."""
    log_p = torch.log_softmax(z, -1, dtype=torch.float32)
    p = log_p.exp()
    s2, s3 = (p * p).sum(-1), (p * p * p).sum(-1)
    return (
        torch.logsumexp(z, -1),
        -(p * log_p).sum(-1),
        (p * (1 - p)).sum(-1),
        s2 - 2 * s3 + s2 * s2,
        p.amax(-1),
    )


def plain_gradient(z: Tensor, labels: Tensor) -> Tensor:
    """P − e_label."""
    p = torch.softmax(z, -1)
    return p.scatter_add_(-1, labels[:, None], torch.full_like(p[:, :1], -1.0))


def plain_sample(z: Tensor) -> Tensors:
    """Y ~ p and p − e_y."""
    p = torch.softmax(z, -1)
    labels = torch.multinomial(p, 1)
    return labels[:, 0], p.scatter_add(-1, labels, torch.full_like(p[:, :1], -1.0))


def plain_softmax(z: Tensor) -> Tensor:
    """P alone: one read, one write."""
    return torch.softmax(z, -1)


# ---- errors -----------------------------------------------------------------------------------


def _exact_mean_probs(z: Tensor) -> Tensor:
    return reference.softmax_fisher_mean_probs(z, reduction="sum")


def sample_error(inputs: Tensors, outputs: Tensors) -> float:
    """Error of the gradients at their own labels; ValueError for labels that p did not draw."""
    (z,) = inputs
    labels, gradients = outputs
    accuracy.checked("labels", labels, z.shape[:1])
    accuracy.checked("gradients", gradients, tuple(z.shape))
    if bool((labels < 0).any()) or bool((labels >= z.shape[1]).any()):
        raise ValueError("a label is no class")
    worst, surprise, spread = 0.0, 0.0, 0.0
    for part in accuracy.chunks(*z.shape):
        # finite where p = 0, so that p log p is 0 there
        log_p = torch.log_softmax(z[part].double(), -1).clamp_min(-1e4)
        p = log_p.exp()
        drawn = log_p.gather(-1, labels[part, None])[:, 0]
        if not bool((drawn.exp() > 0).all()):
            raise ValueError("a label of probability zero was drawn")
        entropy = -(p * log_p).sum(-1)
        surprise += float((-drawn - entropy).sum())
        spread += float(((p * log_p**2).sum(-1) - entropy**2).sum())
        exact = reference.softmax_fisher_gradient(z[part].double(), labels[part])
        worst = max(worst, accuracy.worst_row(gradients[part], exact))
    # −log p(y) averages to the entropy; eight standard deviations are no accident
    if z.shape[0] >= 32 and abs(surprise) > 8 * math.sqrt(spread):
        raise ValueError("labels do not follow p: their mean surprise is not the entropy")
    return worst


# ---- ops --------------------------------------------------------------------------------------


def _floor(row_operands: int, per_token: int = 0, per_class: int = 0) -> Callable[[Case], int]:
    """Bytes: [T, V] operands in the dtype of the case, results per token and class in float32."""

    def floor(case: Case) -> int:
        tokens, classes = case.shape
        rows = row_operands * tokens * classes * case.dtype.itemsize
        return rows + per_token * tokens + per_class * classes

    return floor


def _flops(per_logit: float) -> Callable[[Case], float]:
    return lambda case: per_logit * math.prod(case.shape)


def _like(inputs: Tensors) -> Tensor:
    return torch.empty_like(inputs[0])


def _per_class(inputs: Tensors) -> Tensor:
    return torch.empty(inputs[0].shape[1], dtype=torch.float32, device=inputs[0].device)


def _liger() -> Callable[..., Any]:
    from liger_kernel.ops.softmax import LigerSoftmaxFunction

    return LigerSoftmaxFunction.apply


def _quack() -> Callable[..., Any]:
    from quack.softmax import softmax

    return softmax


def _op(
    name: str, inputs: Any, plain: Any, error: Any, floor: Any, flops: float, **rest: Any
) -> Op:
    fused = getattr(fisherkern, f"softmax_fisher_{name}", None)
    return Op(name, inputs, plain, error, floor, _flops(flops), fused=fused, **rest)


def _rows(name: str) -> Callable[[Tensors, Tensors], float]:
    return accuracy.rows(getattr(reference, f"softmax_fisher_{name}"))


OPS = (
    _op("matvec", _with_vector, plain_matvec, _rows("matvec"), _floor(3), 8, out=_like,
        target=0.65),
    _op("sample", _alone, plain_sample, sample_error, _floor(2, 8), 6, out=_like, target=0.65,
        plain_synchronizes=True),
    _op("stats", _alone, plain_stats, _rows("stats"), _floor(1, 20), 10, target=0.80),
    _op("trace", _alone, plain_trace, _rows("trace"), _floor(1, 4), 6, target=0.80),
    _op("mean_probs", _alone, plain_mean_probs, accuracy.token_mean(_exact_mean_probs),
        _floor(1, 0, 4), 6, out=_per_class, target=0.70),
    _op("quadratic", _with_vector, plain_quadratic, _rows("quadratic"), _floor(2, 4), 8,
        target=0.80),
    _op("diagonal", _alone, plain_diagonal, _rows("diagonal"), _floor(2), 6, out=_like,
        target=0.65),
    _op("sqrt_matvec", _with_vector, plain_sqrt_matvec, _rows("sqrt_matvec"), _floor(3), 9,
        out=_like, target=0.65),
    _op("sqrt_rmatvec", _with_vector, plain_sqrt_rmatvec, _rows("sqrt_rmatvec"), _floor(3), 9,
        out=_like, target=0.65),
    _op("gradient", _with_labels, plain_gradient, _rows("gradient"), _floor(2, 8), 5, out=_like,
        target=0.65),
    # no op of this package: what others reach with the same traffic as "diagonal"
    _op("softmax", _alone, plain_softmax, accuracy.rows(plain_softmax), _floor(2), 4,
        peers={"liger": _liger, "quack": _quack}),
)  # fmt: skip


def _allowed_bytes(shape: Shape, threads: int) -> int:
    # a few numbers per token and class and thread, and 2 MiB that the measurement itself may see
    # (stacks, pages of code)
    return (2 << 20) + 16 * max(4, threads) * sum(shape)


def _warm_up(shape: Shape) -> Shape:
    tokens, classes = shape
    rows = min(tokens, 8)
    return rows, min(classes, (1 << 16) // rows)


FAMILY = register(
    Family(
        name="softmax_fisher",
        dimensions=("T", "V"),
        ops=OPS,
        headline=("matvec", "sample", "stats", "trace", "mean_probs"),
        # vocabularies of GPT-2, Llama-3, Qwen and Gemma
        shapes={
            "cpu": ((256, 50257), (64, 128256)),
            "cuda": ((8192, 50257), (4096, 128256), (4096, 151936), (2048, 262144)),
        },
        smoke=(4, 257),
        bars=(
            Bar("eager", "least", 3.0),
            Bar("compile", "geometric mean", 1.5),
            Bar("compile", "least", 1.0),
        ),
        memory=Allowance("O(T + V) allowance", _allowed_bytes),
        warm_up=_warm_up,
        sweeps=((16, 50257), (64, 50257), (256, 50257), (64, 8192), (64, 32768), (64, 131072)),
    )
)
