"""Small models of every kind of layer, and what tests of training have in common."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from conftest import DEVICE
from fisherkern.optim import KFAC, KFACPreconditioner

V = 5


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def filled(model: nn.Module, dtype: torch.dtype = torch.float32, seed: int = 1) -> Any:
    """The model with weights of its own, whose logits are far from uniform."""
    g = generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / max(p.shape[-1], 1) ** 0.5)
    return model.to(DEVICE, dtype)


def error(found: Tensor, truth: Tensor) -> float:
    """Relative, in the Euclidean norm; infinite where something is not finite."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    if not bool(found.isfinite().all()):
        return math.inf
    distance, scale = float((found.double() - truth).norm()), float(truth.norm())
    return distance / scale if scale else distance


class Tokens(nn.Module):
    """[B, S] tokens to logits [B, S, V]; positions see those before them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.layer_norm = nn.LayerNorm(4)
        self.lower = nn.Linear(4, 6)
        self.rms_norm = nn.RMSNorm(6)
        self.head = nn.Linear(6, V, bias=False)

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.layer_norm(self.embedding(tokens))
        x = self.lower(x + x.cumsum(1) / x.shape[1])
        return self.head(self.rms_norm(x.tanh()))


class Images(nn.Module):
    """[B, 2, 5, 5] images to logits [B, V], by convolutions of either kind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(2, 3, 3, stride=2, padding=1)
        self.conv1d = nn.Conv1d(3, 2, 3)
        self.head = nn.Linear(14, V)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2d(x).tanh().flatten(2)
        return self.head(self.conv1d(x).tanh().flatten(1))


def batch_of(model: nn.Module, seed: int = 0, size: int = 6) -> tuple[Tensor, Tensor]:
    """Inputs of the model and labels of its outputs."""
    g = generator(100 + seed)
    if isinstance(model, Images):
        p = next(model.parameters())
        x = torch.randn(size, 2, 5, 5, generator=g).to(p)
        return x, torch.randint(V, (size,), generator=g).to(DEVICE)
    tokens = torch.randint(7, (size, 8), generator=g)
    return tokens.to(DEVICE), torch.randint(V, (size, 8), generator=g).to(DEVICE)


def loss_of(model: nn.Module, x: Tensor, y: Tensor, **arguments: Any) -> Tensor:
    return functional.cross_entropy(model(x, **arguments).flatten(0, -2), y.flatten())


def differentiate(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Give the parameters the gradients of a batch; copies, by name."""
    model.zero_grad()
    loss_of(model, *batch_of(model, seed)).backward()
    return gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train(
    model: nn.Module,
    optimizer: KFAC,
    steps: range,
    step: Callable[[nn.Module, int], Any] | None = None,
) -> None:
    """Take steps on batches of their own."""
    for seed in steps:
        optimizer.zero_grad()
        (step or differentiate)(model, seed)
        optimizer.step()


def assert_close(model: nn.Module, other: nn.Module, tolerance: float = 0.0) -> None:
    """The same parameters: bit by bit, or but for rounding, each relative to its own size."""
    theirs = parameters(other)
    for name, value in parameters(model).items():
        if tolerance:
            assert error(value, theirs[name]) < tolerance, (name, error(value, theirs[name]))
        else:
            assert torch.equal(value, theirs[name]), name


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a checkpoint does."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def curvature(optimizer: KFAC | KFACPreconditioner, name: str) -> Any:
    owner = optimizer.preconditioner if isinstance(optimizer, KFAC) else optimizer
    return owner.capture.layers[name]
