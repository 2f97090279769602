"""Every op of the demo beside the PyTorch a user would write for it, and the float64 truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import fisherkern
from fisherkern import reference
from fisherkern.demo.measure import median_seconds, peak_extra_bytes

# The error is measured on every eighth token: its float64 truth takes eight times the memory.
ERROR_STRIDE = 8

Labels = Tensor | None
Operation = Callable[[Tensor, Tensor], tuple[Tensor, Labels]]


@dataclass(frozen=True)
class Comparison:
    """One quantity: ours, plain PyTorch's, and its definition in float64.

    The two implementations take (logits, v) and return (result, the labels they drew or None); the
    truth also takes those labels, as the result of a draw is right only for its own labels.
    """

    name: str
    ours: Operation
    plain: Operation
    truth: Callable[[Tensor, Tensor, Labels], Tensor]


@dataclass(frozen=True)
class Side:
    """What was measured of one implementation."""

    seconds: float
    extra_bytes: int
    relative_error: float
    largest_error: float


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    ours: Side
    plain: Side


# ---- plain PyTorch, as short and quick as a user would write it ---------------------------------


def plain_trace(z: Tensor) -> Tensor:
    """1 − Σ p²."""
    return 1 - z.softmax(-1).square().sum(-1)


def plain_entropy(z: Tensor) -> Tensor:
    """−Σ p log p."""
    log_p = z.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def plain_mean_probs(z: Tensor) -> Tensor:
    """The mean of softmax over tokens."""
    return z.softmax(-1).flatten(0, -2).mean(0)


def plain_matvec(z: Tensor, v: Tensor) -> Tensor:
    """F v = p ⊙ (v − ⟨p, v⟩)."""
    p = z.softmax(-1)
    return p * (v - (p * v).sum(-1, keepdim=True))


def plain_sample(z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient p − e_y with y ~ p, in the memory of p, and y."""
    p = z.softmax(-1)
    y = torch.multinomial(p.flatten(0, -2), 1).view(*z.shape[:-1], 1)
    return p.scatter_add_(-1, y, torch.full_like(y, -1, dtype=p.dtype)), y[..., 0]


# ---- ours ---------------------------------------------------------------------------------------


def _sample(z: Tensor) -> tuple[Tensor, Tensor]:
    drawn = fisherkern.softmax_fisher_sample(z)
    return drawn.gradients, drawn.labels


def _sampled_truth(z: Tensor, y: Labels) -> Tensor:
    assert y is not None
    return reference.softmax_fisher_gradient(z, y)


COMPARISONS = (
    Comparison(
        "trace",
        lambda z, v: (fisherkern.softmax_fisher_trace(z), None),
        lambda z, v: (plain_trace(z), None),
        lambda z, v, y: reference.softmax_fisher_trace(z),
    ),
    Comparison(
        "entropy",
        lambda z, v: (fisherkern.softmax_fisher_stats(z).entropy, None),
        lambda z, v: (plain_entropy(z), None),
        lambda z, v, y: reference.softmax_fisher_stats(z).entropy,
    ),
    Comparison(
        "mean probabilities",
        lambda z, v: (fisherkern.softmax_fisher_mean_probs(z), None),
        lambda z, v: (plain_mean_probs(z), None),
        lambda z, v, y: reference.softmax_fisher_mean_probs(z),
    ),
    Comparison(
        "matvec F v",
        lambda z, v: (fisherkern.softmax_fisher_matvec(z, v), None),
        lambda z, v: (plain_matvec(z, v), None),
        lambda z, v, y: reference.softmax_fisher_matvec(z, v),
    ),
    Comparison(
        "sampled gradient",
        lambda z, v: _sample(z),
        lambda z, v: plain_sample(z),
        lambda z, v, y: _sampled_truth(z, y),
    ),
)


def errors(operation: Operation, comparison: Comparison, z: Tensor, v: Tensor) -> tuple[float, ...]:
    """‖result − truth‖ / ‖truth‖ and the largest absolute difference."""
    result, labels = operation(z, v)
    truth = comparison.truth(z.double(), v.double(), labels)
    difference = result.double() - truth
    return (difference.norm() / truth.norm()).item(), difference.abs().max().item()


@torch.no_grad()
def compare(comparison: Comparison, z: Tensor, v: Tensor) -> Row:
    """Measure both implementations of one quantity on logits [T, V] and vectors v [T, V]."""
    both = (comparison.ours, comparison.plain)
    calls = [partial(f, z, v) for f in both]
    seconds = median_seconds(calls)
    memory = [peak_extra_bytes(call) for call in calls]
    few = z[::ERROR_STRIDE].contiguous(), v[::ERROR_STRIDE].contiguous()
    accuracy = [errors(f, comparison, *few) for f in both]
    ours, plain = (Side(s, m, *a) for s, m, a in zip(seconds, memory, accuracy, strict=True))
    return Row(comparison.name, ours, plain)
