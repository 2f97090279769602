"""What else a training loop does with the model of an optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherkern.curvature import capture
from fisherkern.optim import KFAC, KFACPreconditioner

X = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randint(5, (64,), generator=torch.Generator().manual_seed(1))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 5))


def factors(optimizer: KFACPreconditioner) -> list[Tensor]:
    layers = optimizer.capture.layers.values()
    return [factor for kept in layers for factor in kept.factors()]  # type: ignore[attr-defined]


def test_the_pass_of_another_capture_is_not_the_loss() -> None:
    def found(monitored: bool) -> list[Tensor]:
        model = network()
        own = KFACPreconditioner(model, fisher_type="empirical")
        other = capture(model, fisher_type="mc")
        with other, other.batch():
            z = model(X)
            if monitored:
                other.add(z)
        functional.cross_entropy(z, Y).backward()
        own.step()
        return factors(own)

    for alone, beside in zip(found(False), found(True), strict=True):
        assert torch.equal(alone, beside)


def test_gradients_of_an_earlier_call_are_not_of_the_open_batch() -> None:
    """Its mask, its number of terms and its scale are not theirs: they count with no batch."""

    def found(both: bool) -> list[Tensor]:
        model = network()
        own = KFACPreconditioner(model, fisher_type="empirical")
        first = functional.cross_entropy(model(X[:32]), Y[:32])
        with pytest.warns(RuntimeWarning, match="no gradient came to any layer"):
            second = functional.cross_entropy(model(X[32:]), Y[32:])
        (first + second if both else second).backward()
        own.step()
        return factors(own)

    for alone, both in zip(found(False), found(True), strict=True):
        torch.testing.assert_close(alone, both)


def test_averages_of_a_frozen_layer_wait() -> None:
    model = network()
    own = KFACPreconditioner(model, fisher_type="empirical", kl_clip=None)

    def step() -> None:
        model.zero_grad()
        functional.cross_entropy(model(X), Y).backward()
        own.step()

    for _ in range(3):
        step()
    before = factors(own)
    model[0].requires_grad_(False)
    for _ in range(50):
        step()
    for old, new in zip(before[:2], factors(own)[:2], strict=True):
        torch.testing.assert_close(old, new)
    model[0].requires_grad_(True)
    step()
    assert factors(own)[0].trace() > 0.5 * before[0].trace()


def test_a_step_inside_autocast_is_the_same_step() -> None:
    def natural(inside: bool, **options: Any) -> list[Tensor]:
        model = network()
        own = KFACPreconditioner(model, fisher_type="empirical", kl_clip=None, **options)
        functional.cross_entropy(model(X), Y).backward()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            own.step()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for options in ({}, {"structure": "ekfac"}, {"structure": "block"}, {"widest": 4}):
        for outside, inside in zip(
            natural(False, **options), natural(True, **options), strict=True
        ):
            assert torch.equal(outside, inside)


def test_saved_after_a_step_that_was_left_out() -> None:
    """As GradScaler leaves out a step: what came for it counts with the next one."""

    def trained(split: bool) -> list[Tensor]:
        model = network()
        own = KFAC(model, lr=0.1, fisher_type="empirical", inverse_update_period=1)
        for step in range(5):
            if split and step == 3:
                state = own.state_dict()
                own.detach()
                own = KFAC(model, lr=0.1, fisher_type="empirical", inverse_update_period=1)
                own.load_state_dict(state)
            own.zero_grad()
            functional.cross_entropy(model(X + step), Y).backward()
            if step != 2:
                own.step()
        return [p.detach() for p in model.parameters()]

    for whole, resumed in zip(trained(False), trained(True), strict=True):
        assert torch.equal(whole, resumed)


def test_a_new_damping_holds_from_the_next_refresh() -> None:
    model = network()
    own = KFACPreconditioner(
        model,
        structure="ekfac",
        damping=1e-2,
        kl_clip=None,
        fisher_type="empirical",
        ema_decay=None,
    )

    def size() -> float:
        model.zero_grad()
        functional.cross_entropy(model(X), Y).backward()
        own.step()
        assert model[0].weight.grad is not None
        return model[0].weight.grad.norm().item()

    for _ in range(11):
        before = size()
    own.damping = 1e3
    assert abs(size() / before - 1) < 0.1
    own.refresh()
    assert size() < 1e-2 * before
