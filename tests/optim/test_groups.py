"""Parameters in groups, and those in none, which are another optimizer's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fisherkern.optim import KFAC, KFACPreconditioner
from optim import cases
from optim.cases import Tokens, differentiate, error, filled

OPTIONS: dict[str, Any] = {"damping": 0.1, "fisher_type": "type-2"}
PART = "other parameters of its layer are in no group"


def natural(seed: int = 0) -> dict[str, torch.Tensor]:
    """Natural gradients of a batch, not clipped."""
    twin = filled(Tokens(), torch.float64)
    made = KFACPreconditioner(twin, kl_clip=None, **OPTIONS)
    differentiate(twin, seed)
    made.step()
    return cases.gradients(twin)


def test_gradients_of_another_optimizer_stay() -> None:
    """And do not count in what the step is clipped by."""
    model = filled(Tokens(), torch.float64)
    own = [*model.lower.parameters(), model.head.weight]
    optimizer = KFAC(model, own, lr=2.0, momentum=0.0, kl_clip=1e-4, **OPTIONS)
    before, old = differentiate(model), cases.parameters(model)
    names = {name for name, p in model.named_parameters() if any(p is q for q in own)}
    expected = natural()
    size = 4.0 * sum(float((expected[n] * before[n]).sum()) for n in names)
    assert size > 1e-4
    optimizer.step()
    after = cases.gradients(model)
    for name, p in cases.parameters(model).items():
        if name in names:
            change = -2.0 * (1e-4 / size) ** 0.5 * expected[name]
            assert error(p - old[name], change) < 1e-9, name
        else:
            assert torch.equal(after[name], before[name]), name
            assert torch.equal(p, old[name]), name
    assert not optimizer.fallback()


def test_a_layer_that_is_in_groups_in_part_is_stepped_by_adamw() -> None:
    model, twin = filled(Tokens()), filled(Tokens())
    own = [model.lower.weight, model.head.weight]
    optimizer = KFAC(model, own, adam_lr=1e-2, **OPTIONS)
    assert optimizer.fallback() == {"lower.weight": PART}
    adamw = torch.optim.AdamW([twin.lower.weight], lr=1e-2, weight_decay=0.0)
    for seed in range(2):
        given = differentiate(model, seed)
        twin.lower.weight.grad = given["lower.weight"].clone()
        optimizer.step()
        adamw.step()
        assert torch.equal(model.lower.bias.grad, given["lower.bias"])
    assert torch.equal(model.lower.weight, twin.lower.weight)
    optimizer.add_param_group({"params": model.lower.bias})
    assert not optimizer.fallback()


def test_the_gradients_that_a_preconditioner_may_replace() -> None:
    model = filled(Tokens(), torch.float64)
    made = KFACPreconditioner(model, kl_clip=None, **OPTIONS)
    before = differentiate(model)
    replaced = made.step(params=model.head.parameters())
    assert replaced == {id(model.head.weight)}
    after = cases.gradients(model)
    assert error(after.pop("head.weight"), natural()["head.weight"]) < 1e-12
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert made.uncovered(model.lower.parameters()) == {}
    assert made.uncovered([model.lower.bias]) == {"lower.bias": PART}


def test_a_frozen_parameter_of_a_group_is_stepped_once_it_is_thawed() -> None:
    """By AdamW, for its layer has no factors; without groups it is in none."""
    model = filled(Tokens())
    model.lower.requires_grad_(False)
    groups = [{"params": model.lower.parameters()}, {"params": model.head.parameters()}]
    optimizer = KFAC(model, groups, **OPTIONS)
    assert set(optimizer.fallback()) == {"lower.weight", "lower.bias"}
    before = cases.parameters(model)
    cases.train(model, optimizer, range(1))
    assert torch.equal(model.lower.weight, before["lower.weight"])
    model.lower.requires_grad_(True)
    cases.train(model, optimizer, range(1, 2))
    assert not torch.equal(model.lower.weight, before["lower.weight"])
    assert set(optimizer.state[model.lower.weight]) == {"step", "exp_avg", "exp_avg_sq"}


def test_a_group_has_values_of_adamw_of_its_own() -> None:
    """By the names of the constructor."""
    model, twin = filled(Tokens()), filled(Tokens())
    values = {"adam_lr": 0.02, "adam_betas": (0.5, 0.6), "adam_eps": 1e-2}
    optimizer = KFAC(model, [{"params": model.lower.weight, **values}], **OPTIONS)
    adamw = torch.optim.AdamW(
        [twin.lower.weight], lr=0.02, betas=(0.5, 0.6), eps=1e-2, weight_decay=0.0
    )
    for seed in range(3):
        twin.lower.weight.grad = differentiate(model, seed)["lower.weight"]
        optimizer.step()
        adamw.step()
    assert torch.equal(model.lower.weight, twin.lower.weight)


@pytest.mark.parametrize(
    ("group", "kind", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr is -1.0; allowed are"),
        ({"momentum": 1.0}, ValueError, r"momentum is 1; allowed are numbers in \[0, 1\)"),
        ({"adam_betas": 0.9}, ValueError, "adam_betas is 0.9; expected two numbers"),
        (
            {"params": [nn.Parameter(torch.ones(3))]},
            ValueError,
            r"params holds a tensor of shape \[3\], which is no parameter of the model",
        ),
        ({"params": ["x"]}, TypeError, "params holds a str; expected parameters of the model"),
    ],
)
def test_a_group_that_is_refused(group: dict[str, Any], kind: Any, message: str) -> None:
    """By the constructor and when it is added, which leaves the groups as they were."""
    model = filled(Tokens())
    group = {"params": model.lower.parameters(), **group}
    optimizer = KFAC(model, model.head.parameters(), **OPTIONS)
    with pytest.raises(kind, match=message):
        optimizer.add_param_group(dict(group))
    assert len(optimizer.param_groups) == 1
    with pytest.raises(kind, match=message):
        KFAC(model, [group], **OPTIONS)
