"""GradScaler and autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from conftest import DEVICE
from fisherkern.optim import KFAC
from optim import cases
from optim.cases import Tokens, batch_of, filled

OPTIONS: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "inverse_update_period": 2}


def scaled_step(
    model: nn.Module, optimizer: KFAC, scaler: torch.amp.GradScaler, seed: int, dtype: Any = None
) -> float:
    """As the documentation of GradScaler has it, with clipping."""
    x, y = batch_of(model, seed)
    optimizer.zero_grad()
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
        logits = model(x)
        loss = functional.cross_entropy(logits.flatten(0, -2), y.flatten())
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 100.0)
    scaler.step(optimizer)
    scaler.update()
    return loss.item()


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_a_scale_changes_nothing(fisher_type: str) -> None:
    """A power of two rounds nothing: the bits are those without it."""
    model, twin = filled(Tokens()), filled(Tokens())
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**12, growth_interval=2)
    options = {**OPTIONS, "fisher_type": fisher_type}
    told = {"loss_scale": scaler.get_scale} if fisher_type == "empirical" else {}
    optimizer, other = KFAC(model, **options, **told), KFAC(twin, **options)
    for seed in range(5):
        scaled_step(model, optimizer, scaler, seed)
        cases.train(twin, other, range(seed, seed + 1))
    assert scaler.get_scale() == 2.0**14
    cases.assert_close(model, twin)


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_a_step_that_overflows_is_skipped(fisher_type: str) -> None:
    """By the scaler, which does not call the optimizer; the curvature stays finite."""
    model = filled(Tokens())
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**15)
    optimizer = KFAC(model, fisher_type=fisher_type, loss_scale=scaler.get_scale, **OPTIONS)
    scaled_step(model, optimizer, scaler, 0)
    before = cases.parameters(model)

    # of every pass backward, that of the curvature included
    handle = model.lower.register_full_backward_hook(lambda m, i, o: (i[0] * torch.inf,))
    with pytest.warns(RuntimeWarning, match="hold NaN or infinity; this batch is left out"):
        scaled_step(model, optimizer, scaler, 1)
    handle.remove()
    assert scaler.get_scale() == 2.0**14
    assert optimizer.preconditioner.steps == 1
    for name, p in cases.parameters(model).items():
        assert torch.equal(p, before[name]), name
    for layer in optimizer.preconditioner.capture.layers.values():
        assert all(average._sum.isfinite().all() for average in layer.averages.values())
    for seed in range(2, 5):
        scaled_step(model, optimizer, scaler, seed)
    assert optimizer.preconditioner.steps == 4
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"structure": "ekfac"}, {"widest": 4, "stride": 1}])
@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
@pytest.mark.parametrize("whole", [False, True])
def test_bfloat16(whole: bool, fisher_type: str, options: dict[str, Any]) -> None:
    """Under autocast, or of a whole model: near the step of float32, and training goes on."""
    model, twin = filled(Tokens(), torch.bfloat16 if whole else torch.float32), filled(Tokens())
    scaler = torch.amp.GradScaler(DEVICE, enabled=False)
    options = {**OPTIONS, "momentum": 0.0, "fisher_type": fisher_type, **options}
    optimizer, other = KFAC(model, **options), KFAC(twin, **options)
    torch.manual_seed(0)
    scaled_step(model, optimizer, scaler, 0, None if whole else torch.bfloat16)
    torch.manual_seed(0)
    scaled_step(twin, other, scaler, 0)
    theirs = cases.gradients(twin)
    for name, natural in cases.gradients(model).items():
        mine = natural.flatten().float()
        aligned = functional.cosine_similarity(mine, theirs[name].flatten(), dim=0)
        # labels that are drawn at a probability that was rounded can be others
        assert aligned > (0.9 if fisher_type == "mc" else 0.99), name
    losses = [
        scaled_step(model, optimizer, scaler, 0, None if whole else torch.bfloat16)
        for _ in range(6)
    ]
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in model.parameters())
