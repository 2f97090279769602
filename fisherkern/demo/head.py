"""The Fisher of hidden states and of the head, from a model's own, its logits never stored."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fisherkern
from fisherkern import reference
from fisherkern.demo.comparisons import Row, Side
from fisherkern.demo.measure import median_seconds, peak_extra_bytes
from fisherkern.demo.natural import head_inputs

# Classes that a jacobian by autograd pulls back at once: V at a time would take V × V elements.
_AT_ONCE = 1024


@dataclass(frozen=True)
class Head:
    """Hidden states h [T, d] of a text, and the head W [V, d], b [V] of a model."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    softcap: float | None

    @property
    def options(self) -> dict[str, Any]:
        """What the ops are told beside h and W."""
        return {"bias": self.bias, "softcap": self.softcap}

    def logits(self, hidden: Tensor) -> Tensor:
        """Z [..., V] as the model computes it."""
        z = torch.nn.functional.linear(hidden, self.weight, self.bias)
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)


@dataclass(frozen=True)
class Jacobian:
    """The exact Fisher of one hidden state, by autograd and by ours."""

    seconds: float
    error: float
    """Against float64, relative in norm."""
    our_seconds: float
    our_error: float


@dataclass(frozen=True)
class HeadFindings:
    """What was measured of a head."""

    tokens: int
    classes: int
    width: int
    rows: list[Row]
    jacobian: Jacobian


# ---- plain PyTorch, with the logits of all tokens -----------------------------------------------


def plain_entropy(head: Head) -> Tensor:
    """−Σ p log p."""
    log_p = head.logits(head.hidden).log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def plain_mean_probs(head: Head) -> Tensor:
    """The mean of p."""
    return head.logits(head.hidden).softmax(-1).mean(0)


def _rows_and_slope(head: Head) -> tuple[Tensor, Tensor | float]:
    z = head.logits(head.hidden)
    slope = 1.0 if head.softcap is None else 1 - (z / head.softcap).square()
    return z.softmax(-1), slope


def plain_pullback(head: Head) -> Tensor:
    """The mean of Jᵀ (diag p − p pᵀ) J."""
    p, slope = _rows_and_slope(head)
    means = (p * slope) @ head.weight
    density = (p * slope * slope).mean(0)
    return (head.weight.mT * density) @ head.weight - means.mT @ means / len(means)


def plain_weight_diagonal(head: Head) -> Tensor:
    """The mean of p (1 − p) (∂z / ∂(W h))² h²."""
    p, slope = _rows_and_slope(head)
    return (p * (1 - p) * slope * slope).mT @ head.hidden.square() / len(p)


# ---- ours -------------------------------------------------------------------------------------

_Operation = Callable[[Head], Tensor]


def _entropy(head: Head) -> Tensor:
    return fisherkern.head_fisher_stats(head.hidden, head.weight, **head.options).entropy


def _mean_probs(head: Head) -> Tensor:
    return fisherkern.head_fisher_mean_probs(head.hidden, head.weight, **head.options)


def _pullback(head: Head) -> Tensor:
    return fisherkern.head_fisher_pullback(head.hidden, head.weight, **head.options)


def _weight_diagonal(head: Head) -> Tensor:
    return fisherkern.head_fisher_weight_diagonal(head.hidden, head.weight, **head.options).weight


_TRUTHS: dict[str, tuple[_Operation, _Operation, _Operation]] = {
    "entropy": (
        _entropy,
        plain_entropy,
        lambda h: reference.head_fisher_stats(h.hidden, h.weight, **h.options)[0].entropy,
    ),
    "mean probabilities": (
        _mean_probs,
        plain_mean_probs,
        lambda h: reference.head_fisher_mean_probs(h.hidden, h.weight, **h.options),
    ),
    "Fisher of h": (
        _pullback,
        plain_pullback,
        lambda h: reference.head_fisher_pullback(h.hidden, h.weight, **h.options),
    ),
    "diagonal of W": (
        _weight_diagonal,
        plain_weight_diagonal,
        lambda h: reference.head_fisher_weight_diagonal(h.hidden, h.weight, **h.options).weight,
    ),
}
# Tokens of which errors are measured: the truth of the Fisher of h takes a product with W for each.
ERROR_TOKENS = 8


def _double(head: Head) -> Head:
    bias = None if head.bias is None else head.bias.double()
    return Head(head.hidden.double(), head.weight.double(), bias, head.softcap)


def compare(head: Head) -> list[Row]:
    """Ours beside plain PyTorch, one row per quantity."""
    step = max(1, len(head.hidden) // ERROR_TOKENS)
    few = Head(head.hidden[::step], head.weight, head.bias, head.softcap)
    wide = _double(few)
    rows = []
    for name, (ours, plain, truth) in _TRUTHS.items():
        calls = [partial(f, head) for f in (ours, plain)]
        seconds = median_seconds(calls)
        memory = [peak_extra_bytes(call) for call in calls]
        right = truth(wide)
        sides = []
        for f, s, m in zip((ours, plain), seconds, memory, strict=True):
            difference = f(few).double() - right
            relative = (difference.norm() / right.norm()).item()
            sides.append(Side(s, m, relative, difference.abs().max().item()))
        rows.append(Row(name, *sides))
    return rows


def by_autograd(head: Head, hidden: Tensor) -> Tensor:
    """Σ_v p_v g_v g_vᵀ with g_v the gradient of log p_v in one hidden state [d]."""

    def log_p(x: Tensor) -> Tensor:
        return head.logits(x).log_softmax(-1)

    with torch.enable_grad():
        gradients = torch.func.jacrev(log_p, chunk_size=_AT_ONCE)(hidden).detach()
    p = log_p(hidden).exp()
    return gradients.mT @ (p[:, None] * gradients)


def jacobian(head: Head) -> Jacobian:
    """Of the hidden state in the middle."""
    hidden = head.hidden[len(head.hidden) // 2]

    def ours() -> Tensor:
        how: dict[str, Any] = {"accuracy": "high", **head.options}
        return fisherkern.head_fisher_pullback(hidden, head.weight, **how)

    began = time.perf_counter()
    matrix = by_autograd(head, hidden)
    seconds = time.perf_counter() - began
    wide = _double(head)
    truth = reference.head_fisher_pullback(hidden.double(), wide.weight, **wide.options)
    errors = [((M.double() - truth).norm() / truth.norm()).item() for M in (matrix, ours())]
    return Jacobian(seconds, errors[0], median_seconds([ours])[0], errors[1])


@torch.no_grad()
def measure(model: Any, tokens: Tensor) -> HeadFindings | None:
    """Of a window [T]; None where the logits are not those of a linear head, capped or not."""
    inputs = head_inputs(model, tokens)
    if inputs is None:
        return None
    h, z = inputs
    linear = model.get_output_embeddings()
    softcap = getattr(getattr(model, "config", None), "final_logit_softcapping", None)
    bias = None if linear.bias is None else linear.bias.float()
    head = Head(h, linear.weight.float(), bias, softcap)
    if not torch.allclose(head.logits(h[:1]), z[:1], rtol=1e-3, atol=1e-3):
        return None
    del z
    V, d = head.weight.shape
    return HeadFindings(len(h), V, d, compare(head), jacobian(head))
