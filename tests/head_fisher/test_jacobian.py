"""The pullback is Σ p g gᵀ of the gradients g of log p in the input of a real head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fisherkern as fk
from conftest import DEVICE, SLOW
from head_fisher import cases

T, V, d = (3, 30, 4) if SLOW else (6, 61, 13)
TAU = 1.4


class Capped(nn.Module):
    """The head of Gemma 2: a linear layer without a bias, and a soft-cap."""

    def __init__(self, softcap: float) -> None:
        super().__init__()
        self.linear, self.softcap = nn.Linear(d, V, bias=False), softcap

    def forward(self, h: Tensor) -> Tensor:
        return self.softcap * torch.tanh(self.linear(h) / self.softcap)


def heads() -> dict[str, tuple[Callable[[Tensor], Tensor], nn.Linear, float | None]]:
    torch.manual_seed(0)
    plain, capped = nn.Linear(d, V), Capped(3.0)
    for layer in (plain, capped.linear):
        nn.init.normal_(layer.weight, std=2 / d**0.5)
    return {"linear": (plain, plain, None), "capped": (capped, capped.linear, capped.softcap)}


def by_autograd(head: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """M of every token [T, d, d]."""

    def log_probabilities(row: Tensor) -> Tensor:
        return torch.log_softmax(head(row) / TAU, -1)

    matrices = []
    for row in h:
        g = torch.func.jacrev(log_probabilities)(row)
        matrices.append(g.mT @ (log_probabilities(row).exp()[:, None] * g))
    return torch.stack(matrices).detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("accuracy", ["standard", "high"])
@pytest.mark.parametrize("name", ["linear", "capped"])
def test_pullback_is_that_of_a_real_head(
    backend: str, name: str, accuracy: str, dtype: torch.dtype
) -> None:
    cases.require(backend, dtype)
    head, layer, softcap = heads()[name]
    h = torch.randn(T, d, generator=cases.generator(1)).to(dtype)
    W, b = (None if x is None else x.detach().to(dtype) for x in (layer.weight, layer.bias))
    layer.double()
    each = by_autograd(head, h.double())
    w = torch.tensor([0.5, 0.0, 2.0, 1.0, 1.0, 0.25][:T], dtype=dtype)

    def found(reduction: str, weights: Tensor | None = None) -> Tensor:
        return fk.head_fisher_pullback(
            h.to(DEVICE),
            W.to(DEVICE),
            bias=None if b is None else b.to(DEVICE),
            softcap=softcap,
            temperature=TAU,
            weights=None if weights is None else weights.to(DEVICE),
            reduction=reduction,
            accuracy=accuracy,
        ).cpu()

    assert cases.error(found("none"), each) <= cases.TOLERANCE[dtype]
    assert cases.error(found("sum"), each.sum(0)) <= cases.TOLERANCE[dtype]
    assert cases.error(found("mean"), each.mean(0)) <= cases.TOLERANCE[dtype]
    weighted = w[:, None, None].double() * each
    assert cases.error(found("none", w), weighted) <= cases.TOLERANCE[dtype]
    mean = weighted.sum(0) / w.double().sum()
    assert cases.error(found("mean", w), mean) <= cases.TOLERANCE[dtype]
