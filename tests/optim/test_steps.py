"""What is made of natural gradients: clipping, momentum, weight decay, and AdamW for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisherkern.optim import KFAC, KFACPreconditioner
from optim import cases
from optim.cases import Images, Tokens, differentiate, error, filled

OPTIONS: dict[str, Any] = {"damping": 0.1, "fisher_type": "type-2"}


def naturals(model: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """The natural gradients of a batch, not clipped, of a model as new as this one."""
    twin = filled(type(model)(), torch.float64)
    made = KFACPreconditioner(twin, kl_clip=None, **OPTIONS)
    differentiate(twin, seed)
    made.step()
    return cases.gradients(twin)


@pytest.mark.parametrize("bound", [1e-4, 1e3, None])
def test_kl_clip(bound: float | None) -> None:
    """Scaled by √(κ / Σ lr² ⟨natural gradient, gradient⟩), but never up."""
    model = filled(Tokens(), torch.float64)
    natural = naturals(model)
    rates = {name: 0.5 if name.startswith("head") else 2.0 for name in natural}
    made = KFACPreconditioner(model, kl_clip=bound, **OPTIONS)
    before = differentiate(model)
    by_id = {id(p): rates[name] for name, p in model.named_parameters()}
    made.step(lr=lambda p: by_id[id(p)])
    size = sum(rates[n] ** 2 * float((natural[n] * before[n]).sum()) for n in natural)
    assert 1e-4 < size < 1e3
    scale = (bound / size) ** 0.5 if bound == 1e-4 else 1.0
    after = cases.gradients(model)
    for name, value in natural.items():
        assert error(after[name], scale * value) < 1e-12, name


def test_kl_clip_takes_the_rates_of_the_groups() -> None:
    model = filled(Images(), torch.float64)
    natural = naturals(model)
    groups = [
        {"params": model.head.parameters(), "lr": 0.5},
        {"params": [*model.conv1d.parameters(), *model.conv2d.parameters()]},
    ]
    optimizer = KFAC(model, groups, lr=2.0, momentum=0.0, kl_clip=1e-4, **OPTIONS)
    before, old = differentiate(model), cases.parameters(model)
    rates = {n: 0.5 if n.startswith("head") else 2.0 for n in natural}
    size = sum(rates[n] ** 2 * float((natural[n] * before[n]).sum()) for n in natural)
    optimizer.step()
    for name, p in cases.parameters(model).items():
        change = -rates[name] * (1e-4 / size) ** 0.5 * natural[name]
        assert error(p - old[name], change) < 1e-9, name


@pytest.mark.parametrize("factor", [0.1, 1.0, 3.0])
def test_a_schedule_scales_a_step_that_is_clipped(factor: float) -> None:
    """The bound is met at the rate of the constructor, below it the step shrinks with the rate."""
    model = filled(Images(), torch.float64)
    natural = naturals(model)
    optimizer = KFAC(model, lr=2.0, momentum=0.0, kl_clip=1e-4, **OPTIONS)
    for group in optimizer.param_groups:
        group["lr"] = 2.0 * factor
    before, old = differentiate(model), cases.parameters(model)
    size = 4.0 * sum(float((natural[n] * before[n]).sum()) for n in natural)
    assert size > 1e-4
    optimizer.step()
    for name, p in cases.parameters(model).items():
        change = -2.0 * min(factor, 1.0) * (1e-4 / size) ** 0.5 * natural[name]
        assert error(p - old[name], change) < 1e-9, name


def test_momentum_and_decoupled_weight_decay() -> None:
    """m ← μ m + natural gradient; p ← p (1 − lr · decay) − lr m."""
    model = filled(Tokens(), torch.float64)
    lr, mu, decay = 0.1, 0.7, 0.3
    optimizer = KFAC(model, lr=lr, momentum=mu, weight_decay=decay, **OPTIONS)
    expected = cases.parameters(model)
    momentum = {name: torch.zeros_like(p) for name, p in expected.items()}
    for seed in range(3):
        differentiate(model, seed)
        optimizer.step()
        natural = cases.gradients(model)  # which are left in place of the gradients
        for name, p in model.named_parameters():
            momentum[name] = mu * momentum[name] + natural[name]
            expected[name] = expected[name] * (1 - lr * decay) - lr * momentum[name]
            assert error(p.detach(), expected[name]) < 1e-12, name
    assert not optimizer.fallback()


class Scaled(nn.Module):
    """A parameter of its own, and a batch norm, beside a layer that has a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.norm = nn.BatchNorm1d(6)
        self.embedding = nn.Embedding(7, 6)
        self.head = nn.Linear(6, cases.V)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(self.norm((self.scale * x).mT).mT.tanh())


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_steps_what_has_no_factor(decay: float) -> None:
    """With the bits of torch.optim.AdamW for the same gradients; fallback() names them."""
    model = filled(Scaled())
    optimizer = KFAC(
        model, adam_lr=3e-3, adam_betas=(0.8, 0.95), weight_decay=decay, adam_eps=1e-6, **OPTIONS
    )
    reasons = optimizer.fallback()
    assert set(reasons) == {"scale", "norm.weight", "norm.bias"}
    assert reasons["norm.bias"] == "no rule for modules of type BatchNorm1d"
    rest = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    rest = {name: rest[name] for name in reasons}
    adamw = torch.optim.AdamW(
        rest.values(), lr=3e-3, betas=(0.8, 0.95), eps=1e-6, weight_decay=decay
    )
    for seed in range(4):
        given = differentiate(model, seed)
        optimizer.step()
        for name, p in rest.items():
            p.grad = given[name]
        adamw.step()
        for name, p in rest.items():
            assert torch.equal(p, model.get_parameter(name)), (seed, name)


def test_a_scheduler_scales_both_rates() -> None:
    model = filled(Scaled())
    optimizer = KFAC(model, lr=0.2, adam_lr=1e-2, adam_eps=1e-30, momentum=0.0, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step in range(3):
        before = cases.parameters(model)
        differentiate(model, seed=0)
        optimizer.step()
        scheduler.step()
        after, natural = cases.parameters(model), cases.gradients(model)
        change = after["head.weight"] - before["head.weight"]
        assert error(change, -0.2 * 0.5**step * natural["head.weight"].double()) < 1e-4
        if step == 0:  # the first of AdamW is the sign of the gradient
            change = (after["scale"] - before["scale"]).abs()
            torch.testing.assert_close(change, torch.full_like(change, 1e-2))
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2 * 0.5**3)
    # with the same gradient each time the steps of AdamW are as long as its rate
    twin = filled(Scaled())
    optimizer = KFAC(twin, lr=0.2, adam_lr=1e-2, adam_eps=1e-30, **OPTIONS)
    optimizer.param_groups[0]["lr"] = 0.05
    differentiate(twin)
    before = cases.parameters(twin)
    optimizer.step()
    change = (twin.scale.detach() - before["scale"]).abs()
    torch.testing.assert_close(change, torch.full_like(change, 1e-2 / 4), rtol=1e-4, atol=0)


def test_a_group_that_is_added_has_its_own_rate_to_scale_from() -> None:
    model = filled(Scaled())
    optimizer = KFAC(
        model, model.head.parameters(), lr=0.2, adam_lr=1e-2, adam_eps=1e-30, **OPTIONS
    )
    optimizer.add_param_group({"params": [model.scale], "lr": 0.4})
    optimizer.param_groups[1]["lr"] = 0.1
    before = model.scale.detach().clone()
    differentiate(model)
    optimizer.step()
    change = (model.scale.detach() - before).abs()
    torch.testing.assert_close(change, torch.full_like(change, 1e-2 / 4), rtol=1e-4, atol=0)
    assert model.embedding.weight.grad is not None  # and is in no group: it stays
    assert torch.equal(model.embedding.weight, filled(Scaled()).embedding.weight)


def test_a_group_whose_rate_was_zero_at_first() -> None:
    """There is nothing to scale adam_lr from; it holds as soon as the rate is above zero."""
    model = filled(Scaled())
    optimizer = KFAC(model, lr=0.0, adam_lr=1e-2, adam_eps=1e-30, **OPTIONS)
    before = cases.parameters(model)
    differentiate(model)
    optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    optimizer.param_groups[0]["lr"] = 0.1
    differentiate(model)
    optimizer.step()
    change = (model.scale.detach() - before["scale"]).abs()
    torch.testing.assert_close(change, torch.full_like(change, 1e-2), rtol=1e-4, atol=0)


def test_groups_with_and_without_weight_decay() -> None:
    model = filled(Tokens(), torch.float64)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors}]
    optimizer = KFAC(model, groups, lr=0.1, momentum=0.0, **OPTIONS)
    before = cases.parameters(model)
    differentiate(model)
    optimizer.step()
    natural = cases.gradients(model)
    for name, p in model.named_parameters():
        shrunk = before[name] * (0.95 if p.ndim > 1 else 1.0)
        assert error(p.detach(), shrunk - 0.1 * natural[name]) < 1e-12, name


def test_a_closure_is_evaluated_with_gradients() -> None:
    model, twin = filled(Tokens()), filled(Tokens())
    x, y = cases.batch_of(model)
    optimizer = KFAC(model, **OPTIONS)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = cases.loss_of(model, x, y)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    with torch.no_grad():
        assert loss == cases.loss_of(twin, x, y)
    cases.train(twin, KFAC(twin, **OPTIONS), range(1))
    cases.assert_close(model, twin)


def test_frozen_parameters_stay_and_a_step_without_gradients_is_none() -> None:
    model = filled(Tokens())
    model.lower.requires_grad_(False)
    optimizer = KFAC(model, **OPTIONS)
    assert not optimizer.fallback()  # they are in no group
    assert set(optimizer.preconditioner.uncovered()) == {"lower.weight", "lower.bias"}
    before = cases.parameters(model)
    optimizer.step()
    assert optimizer.preconditioner.steps == 0
    cases.train(model, optimizer, range(2))
    after = cases.parameters(model)
    for name, p in before.items():
        assert torch.equal(p, after[name]) == name.startswith("lower"), name


def test_evaluation_and_no_grad_are_not_captured() -> None:
    model = filled(Tokens())
    optimizer = KFAC(model, **OPTIONS)
    x, y = cases.batch_of(model)
    with torch.no_grad():
        model(x)
    model.eval()
    cases.loss_of(model, x, y).backward()
    assert cases.curvature(optimizer, "head").G.count == 0
    model.train()
    cases.train(model, optimizer, range(1))
    assert cases.curvature(optimizer, "head").G.count > 0


def test_periods() -> None:
    """Captured at every fourth step and inverted at every sixth; at first at powers of two too."""
    model = filled(Tokens())
    optimizer = KFAC(model, factor_update_period=4, inverse_update_period=6, **OPTIONS)
    preconditioner = optimizer.preconditioner
    captured, inverted = set(), set()
    for step in range(14):
        count = cases.curvature(optimizer, "head").G.count
        solver = preconditioner._solvers.get("head")
        cases.train(model, optimizer, range(step, step + 1))
        if cases.curvature(optimizer, "head").G.count != count:
            captured.add(step)
        if preconditioner._solvers["head"] is not solver:
            inverted.add(step)
    assert captured == {0, 1, 2, 4, 8, 12}
    assert inverted == {0, 1, 2, 4, 6, 12}


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_a_pass_without_gradients_before_the_backward_pass(fisher_type: str) -> None:
    """Does not end the batch whose backward pass is still to come."""
    model, twin = filled(Tokens()), filled(Tokens())
    options = {**OPTIONS, "fisher_type": fisher_type}
    optimizer, other = KFAC(model, **options), KFAC(twin, **options)
    for seed in range(2):
        optimizer.zero_grad()
        loss = cases.loss_of(model, *cases.batch_of(model, seed))
        with torch.no_grad():
            model(cases.batch_of(model, 9)[0])
        loss.backward()
        optimizer.step()
        cases.train(twin, other, range(seed, seed + 1))
    cases.assert_close(model, twin)
