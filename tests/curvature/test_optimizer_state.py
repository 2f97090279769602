"""Curvature from the second moments of optimizers, against what they averaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import cases
from fisherkern.curvature import (
    diagonal_from_adam,
    kronecker_from_adafactor,
    kronecker_from_shampoo,
)


def stepped(make: Any, steps: int = 3) -> tuple[nn.Module, Any, list[Tensor]]:
    """A layer, its optimizer after some steps, and the gradients of its weight."""
    model = cases.filled(nn.Linear(4, 3)).float()
    optimizer, gradients = make(model.parameters()), []
    for step in range(steps):
        optimizer.zero_grad()
        model(cases.drawn(5, 4, seed=step).float()).square().mean().backward()
        gradients.append(model.weight.grad.clone())
        optimizer.step()
    return model, optimizer, gradients


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam(kind: Any) -> None:
    model, optimizer, gradients = stepped(lambda p: kind(p, lr=1e-2, betas=(0.9, 0.8)))
    found = diagonal_from_adam(optimizer, model, terms=5)
    weights = torch.tensor([0.2 * 0.8**k for k in (2, 1, 0)])
    squares = torch.stack([g.square() for g in gradients])
    expected = 5 * torch.einsum("k,kij->ij", weights, squares) / weights.sum()
    assert set(found) == {"weight", "bias"}
    assert torch.allclose(found["weight"], expected, rtol=1e-5)


def test_adafactor() -> None:
    model, optimizer, _ = stepped(torch.optim.Adafactor)
    found = kronecker_from_adafactor(optimizer, model, terms=5)
    assert set(found) == {"weight"}
    state = optimizer.state[model.weight]
    rows, columns = state["row_var"].flatten(), state["col_var"].flatten()
    expected = 5 * torch.outer(rows, columns) / rows.mean()
    assert torch.allclose(found["weight"] @ torch.ones(3, 4), expected, rtol=1e-5)


def test_adafactor_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    model, optimizer, _ = stepped(transformers.Adafactor)
    found = kronecker_from_adafactor(optimizer, model)["weight"]
    state = optimizer.state[model.weight]
    rows, columns = state["exp_avg_sq_row"], state["exp_avg_sq_col"]
    expected = torch.outer(rows, columns) / rows.mean()
    assert torch.allclose(found @ torch.ones(3, 4), expected, rtol=1e-5)


def test_shampoo_of_a_kronecker_fisher_is_that_fisher() -> None:
    """Of gradients with E[vec ∇ vec ∇ᵀ] = G ⊗ A: L = tr(A) G and R = tr(G) A."""
    G, A = (x @ x.mT for x in (cases.drawn(3, 3), cases.drawn(4, 4, seed=1)))
    found = kronecker_from_shampoo(A.trace() * G, G.trace() * A, terms=2)
    x = cases.drawn(3, 4, seed=2)
    assert cases.error(found @ x, 2 * G @ x @ A) < cases.EXACT


def test_bad_input() -> None:
    model = nn.Linear(2, 2)
    fresh = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="optimizer is a AdamW whose state has no exp_avg_sq"):
        diagonal_from_adam(fresh, model)
    with pytest.raises(ValueError, match="optimizer is a AdamW without factored moments"):
        kronecker_from_adafactor(fresh, model)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, not int"):
        diagonal_from_adam(3, model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="terms is 0; allowed are finite numbers > 0"):
        diagonal_from_adam(fresh, model, terms=0)
    with pytest.raises(ValueError, match=r"left has shape \[2, 3\]; expected \[m, m\]"):
        kronecker_from_shampoo(torch.zeros(2, 3), torch.zeros(3, 3))
