"""The natural gradient of the head of a model, by the true and by the empirical Fisher."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fisherkern
from fisherkern.demo.measure import peak_extra_bytes
from fisherkern.operators import Kronecker

DAMPING = 1e-3


@dataclass(frozen=True)
class Direction:
    """(G ⊗ A + damping)⁻¹ ∇ for one kind of G, and what it took."""

    name: str
    seconds: float
    extra_bytes: int
    residual: float
    along_gradient: float
    """Cosine between it and the gradient."""


@dataclass(frozen=True)
class NaturalGradients:
    """Both directions for a head of `classes` × `width`."""

    classes: int
    width: int
    tokens: int
    directions: list[Direction]
    cosine: float
    """Between the two."""


def cosine(a: Tensor, b: Tensor) -> float:
    """Of two matrices as vectors."""
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


def head_inputs(model: Any, tokens: Tensor) -> tuple[Tensor, Tensor] | None:
    """Inputs [T, d] and logits [T, V] of the linear head of a model over tokens [T], or None."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    seen: list[Tensor] = []
    hook = head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        logits = model(tokens[None], use_cache=False).logits
    finally:
        hook.remove()
    if not seen or seen[-1].shape[:-1] != logits.shape[:-1]:
        return None
    return seen[-1][0].float(), logits[0].float()


def solve(h: Tensor, z: Tensor, labels: Tensor) -> NaturalGradients:
    """The directions for inputs h [T, d], logits z [T, V] and labels [T]."""
    T = len(labels)
    gradient = fisherkern.softmax_fisher_gradient(z, labels).mT @ h / T
    A = fisherkern.covariance(h)
    kinds: dict[str, Callable[[], Kronecker]] = {
        "true Fisher": lambda: Kronecker(fisherkern.SoftmaxFisher(z), A),
        "empirical Fisher": lambda: Kronecker(fisherkern.EmpiricalFisher(z, labels), A),
    }
    found, directions = [], []
    for name, make in kinds.items():

        def call(make: Callable[[], Kronecker] = make) -> Tensor:
            return make().solve(gradient, DAMPING)

        memory = peak_extra_bytes(call)
        began = time.perf_counter()
        direction = call()
        seconds = time.perf_counter() - began
        residual = make().residual(direction, gradient, DAMPING).item()
        along = cosine(direction, gradient)
        directions.append(Direction(name, seconds, memory, residual, along))
        found.append(direction)
    return NaturalGradients(z.shape[1], h.shape[1], T, directions, cosine(*found))


@torch.no_grad()
def measure(model: Any, tokens: Tensor) -> NaturalGradients | None:
    """Of the next tokens of a window [T]; None where the model has no linear head."""
    inputs = head_inputs(model, tokens)
    if inputs is None or len(tokens) < 2:
        return None
    h, z = inputs
    return solve(h[:-1], z[:-1], tokens[1:])
