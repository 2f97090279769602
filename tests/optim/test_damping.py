"""The quadratic model of a step, and the damping that follows from how well it predicts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisherkern.optim import KFAC
from optim import cases
from optim.cases import Images, Tokens, batch_of, curvature, filled

OPTIONS: dict[str, Any] = {
    "lr": 0.05,
    "damping": 0.05,
    "fisher_type": "type-2",
    "kl_clip": None,
    "damping_period": 1,
}


def stepped(model: nn.Module, optimizer: KFAC, seed: int = 0) -> tuple[float, float]:
    """The loss before and after a step."""
    x, y = batch_of(model, seed)
    optimizer.zero_grad()
    before = cases.loss_of(model, x, y)
    before.backward()
    optimizer.step()
    with torch.no_grad():
        return float(before), float(cases.loss_of(model, x, y))


def quadratic(layer: Any, change: Tensor, damping: float) -> float:
    """δᵀ (G ⊗ A + λ) δ written down."""
    G, A = layer.factors()
    A = A.diag() if A.ndim == 1 else A
    F = torch.kron(G, A) + damping * torch.eye(change.numel()).to(G)
    return float(change.reshape(-1) @ F @ change.reshape(-1))


def test_the_predicted_change() -> None:
    """⟨∇, δ⟩ + δᵀ (F + λ) δ / 2, of what has no factor the slope alone."""
    model = filled(Tokens(), torch.float64)
    layers = ["embedding", "lower", "head"]
    options = {**OPTIONS, "momentum": 0.5, "weight_decay": 0.1, "layers": layers}
    optimizer = KFAC(model, **options)
    for seed in range(2):  # of the second the momentum is part of δ
        gradients = cases.differentiate(model, seed)
        old = cases.parameters(model)
        optimizer.step()
    changes = {name: p - old[name] for name, p in cases.parameters(model).items()}
    assert float(changes["rms_norm.weight"].norm()) > 0
    expected = sum(float((gradients[name] * change).sum()) for name, change in changes.items())
    lower = torch.cat([changes["lower.weight"], changes["lower.bias"][:, None]], 1)
    matrices = {
        "embedding": changes["embedding.weight"].mT,
        "lower": lower,
        "head": changes["head.weight"],
    }
    for name, change in matrices.items():
        expected += quadratic(curvature(optimizer, name), change, OPTIONS["damping"]) / 2
    assert optimizer.adapt_damping(1.0, 0.9) == pytest.approx(-0.1 / expected, rel=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"structure": "ekfac"},
        {"structure": "diagonal"},
        {"structure": "block"},
        {"fisher_type": "empirical"},
        {"layers": ["head"], "adam_lr": 1e-6, "adam_eps": 1e-4},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [Tokens, Images])
def test_the_ratio_of_a_short_step_is_one(kind: type[nn.Module], options: dict[str, Any]) -> None:
    """Then only the slope counts; the error is of the order of the learning rate."""
    for rate in (1e-4, 1e-5):
        model = filled(kind(), torch.float64)
        optimizer = KFAC(model, **{**OPTIONS, "lr": rate, **options})
        ratio = optimizer.adapt_damping(*stepped(model, optimizer))
        assert abs(ratio - 1) < 10 * rate + 1e-6
        assert optimizer.damping == pytest.approx(0.05 * 19 / 20)


@pytest.mark.parametrize(
    ("ratio", "power"),
    [(2.0, 1), (0.76, 1), (0.74, 0), (0.26, 0), (0.24, -1), (-1.0, -1), (math.nan, -1)],
)
@pytest.mark.parametrize("period", [1, 3])
def test_the_rule_of_levenberg_and_marquardt(ratio: float, power: int, period: int) -> None:
    model = filled(Tokens(), torch.float64)
    optimizer = KFAC(model, **{**OPTIONS, "damping_period": period})
    before, _ = stepped(model, optimizer)
    assert optimizer._predicted is not None
    after = before + ratio * optimizer._predicted
    found = optimizer.adapt_damping(before, after)
    assert found == pytest.approx(ratio, rel=1e-6, nan_ok=True)
    assert optimizer.damping == pytest.approx(0.05 * (19 / 20) ** (period * power))


def test_a_prediction_of_no_descent_raises_the_damping() -> None:
    """As of a step that momentum carries uphill."""
    model = filled(Tokens(), torch.float64)
    optimizer = KFAC(model, **{**OPTIONS, "momentum": 0.9})
    stepped(model, optimizer)
    with torch.no_grad():
        for p in model.parameters():
            optimizer.state[p]["momentum_buffer"].mul_(-100)
    before, after = stepped(model, optimizer)
    assert after > before
    assert optimizer.adapt_damping(before, after) == -math.inf
    assert optimizer.damping == pytest.approx(0.05 * 20 / 19)


def test_steps_that_are_judged() -> None:
    """One in a period, and once."""
    model = filled(Tokens(), torch.float64)
    optimizer = KFAC(model, **{**OPTIONS, "damping_period": 3})
    assert not optimizer.wants_loss
    for step in range(7):
        before, after = stepped(model, optimizer, step)
        assert optimizer.wants_loss == (step % 3 == 0)
        if optimizer.wants_loss:
            optimizer.adapt_damping(before, after)
        with pytest.raises(ValueError, match="damping_period is 3: the change of the last step"):
            optimizer.adapt_damping(before, after)


def test_without_a_period_nothing_is_predicted() -> None:
    model = filled(Tokens())
    optimizer = KFAC(model, **{**OPTIONS, "damping_period": None})
    before, after = stepped(model, optimizer)
    assert not optimizer.wants_loss
    with pytest.raises(ValueError, match="damping_period is None: the change"):
        optimizer.adapt_damping(before, after)


def test_the_damping_is_that_of_the_next_refresh() -> None:
    model, twin = filled(Tokens()), filled(Tokens())
    options = {**OPTIONS, "inverse_update_period": 5, "damping_period": None}
    optimizer, other = KFAC(model, **options), KFAC(twin, **options)
    cases.train(model, optimizer, range(3))
    cases.train(twin, other, range(3))
    optimizer.damping = 1.0
    cases.train(model, optimizer, range(3, 4))
    cases.train(twin, other, range(3, 4))
    cases.assert_close(model, twin)
    cases.train(model, optimizer, range(4, 5))
    cases.train(twin, other, range(4, 5))
    assert not torch.equal(model.head.weight, twin.head.weight)
