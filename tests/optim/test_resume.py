"""Training goes on from a saved state with the same bits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisherkern.optim import KFAC, KFACPreconditioner
from optim import cases
from optim.cases import Tokens, assert_close, filled, saved_and_loaded, train

OPTIONS: dict[str, Any] = {"lr": 0.1, "damping": 0.05, "fisher_type": "type-2"}
# 4 and 5 are within a period of the factors, and of the inverses
PERIODS = {"factor_update_period": 2, "inverse_update_period": 3}
BEFORE, AFTER = 5, 5


@pytest.mark.parametrize(
    "options",
    [
        {},
        PERIODS,
        {"structure": "ekfac", **PERIODS},
        {"structure": "ekfac", "inverse_update_period": 3},
        {"structure": "diagonal", **PERIODS},
        {"structure": "block", **PERIODS},
        {"structure": "low-rank", "rank": 4, **PERIODS},
        {"inverse": "inverse-free", **PERIODS},
        {"inverse": "eigh", **PERIODS},
        {"damping_mode": "exact", **PERIODS},
        {"widest": 4, "stride": 2, **PERIODS},
        {"widest": 4, "stride": 2, "fisher_type": "empirical", **PERIODS},
        {"fisher_type": "empirical", **PERIODS},
        {"layers": ["lower", "rms_norm"], "weight_decay": 0.1, **PERIODS},
        {"ema_decay": None, "momentum": 0.0, **PERIODS},
    ],
    ids=str,
)
def test_the_same_bits(options: dict[str, Any]) -> None:
    options = {**OPTIONS, **options}
    through = filled(Tokens())
    optimizer = KFAC(through, **options)
    train(through, optimizer, range(BEFORE))
    optimizer.damping *= 0.9  # as adapt_damping does
    saved = saved_and_loaded(optimizer.state_dict())
    model = filled(Tokens(), seed=2)
    model.load_state_dict(saved_and_loaded(through.state_dict()))
    resumed = KFAC(model, **options)
    resumed.load_state_dict(saved)
    assert resumed.damping == optimizer.damping
    for step in range(BEFORE, BEFORE + AFTER):
        train(through, optimizer, range(step, step + 1))
        train(model, resumed, range(step, step + 1))
        assert_close(model, through)


def test_a_state_is_a_copy() -> None:
    """What is saved does not change while training goes on, nor with the one who loads it."""
    model = filled(Tokens())
    optimizer = KFAC(model, structure="ekfac", widest=5, **OPTIONS, **PERIODS)
    train(model, optimizer, range(2))
    state = optimizer.state_dict()["kfac"]
    copy = saved_and_loaded(state)
    other = filled(Tokens())
    loaded = KFACPreconditioner(
        other, structure="ekfac", widest=5, damping=1.0, **{"fisher_type": "type-2", **PERIODS}
    )
    loaded.load_state_dict(state)
    train(model, optimizer, range(2, 6))
    for seed in range(6):
        cases.differentiate(other, seed)
        loaded.step()
    assert_same(state, copy)


def test_a_refresh_within_a_step_sees_what_came_before_it() -> None:
    """And nothing that a wide head keeps afterwards, of which a saved inverse would be made."""
    model = filled(Tokens())
    made = KFACPreconditioner(model, widest=4, stride=1, fisher_type="type-2")
    cases.differentiate(model, 0)
    made.refresh()
    before = copy.deepcopy(made.state_dict()["solvers"]["head"])
    cases.differentiate(model, 1)
    assert_same(made.state_dict()["solvers"]["head"], before)
    assert len(cases.curvature(made, "head").kept.logits) == 2


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    elif isinstance(one, Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def test_sampled_labels_go_on_with_their_generator() -> None:
    """Its state is the user's to save."""
    options: dict[str, Any] = {**OPTIONS, **PERIODS, "fisher_type": "mc"}
    through, generator = filled(Tokens()), cases.generator(7)
    optimizer = KFAC(through, generator=generator, **options)
    train(through, optimizer, range(BEFORE))
    saved = saved_and_loaded({"optimizer": optimizer.state_dict(), "rng": generator.get_state()})
    bits = []
    for rng in (saved["rng"], cases.generator(8).get_state()):
        model, own = filled(Tokens()), torch.Generator()
        own.set_state(rng)
        model.load_state_dict(through.state_dict())
        resumed = KFAC(model, generator=own, **options)
        resumed.load_state_dict(saved["optimizer"])
        train(model, resumed, range(BEFORE, BEFORE + AFTER))
        bits.append(cases.parameters(model))
    train(through, optimizer, range(BEFORE, BEFORE + AFTER))
    for name, p in cases.parameters(through).items():
        assert torch.equal(p, bits[0][name]), name
    assert any(not torch.equal(p, bits[1][name]) for name, p in cases.parameters(through).items())


def test_the_preconditioner_alone() -> None:
    """With the state of whichever optimizer steps."""

    def made(model: nn.Module) -> tuple[KFACPreconditioner, torch.optim.Optimizer]:
        options = {**PERIODS, "damping": 0.05, "fisher_type": "type-2"}
        return KFACPreconditioner(model, **options), torch.optim.Adam(model.parameters(), lr=0.01)

    def step(model: nn.Module, both: Any, seed: int) -> None:
        cases.differentiate(model, seed)
        both[0].step()
        both[1].step()

    through = filled(Tokens())
    old = made(through)
    for seed in range(BEFORE):
        step(through, old, seed)
    states = [saved_and_loaded(part.state_dict()) for part in old]
    model = filled(Tokens(), seed=3)
    model.load_state_dict(through.state_dict())
    new = made(model)
    for part, state in zip(new, states, strict=True):
        part.load_state_dict(state)
    for seed in range(BEFORE, BEFORE + AFTER):
        step(through, old, seed)
        step(model, new, seed)
    assert_close(model, through)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: s.pop("kfac"), KeyError, "state_dict lacks kfac"),
        (lambda s: s["kfac"].pop("steps"), KeyError, "state lacks steps"),
        (lambda s: s["kfac"]["solvers"].update(x={}), ValueError, "an inverse of x, which is not"),
        (lambda s: s["kfac"]["capture"]["layers"].pop("head"), KeyError, "of layer head"),
        (
            lambda s: s["kfac"]["capture"]["layers"]["head"]["G"].update(sum=torch.zeros(2, 2)),
            ValueError,
            r"state has a sum of shape \[2, 2\]; expected \[5, 5\]",
        ),
        (lambda s: s["param_groups"].pop(), ValueError, "different number of parameter groups"),
        (
            lambda s: s["kfac"]["solvers"]["head"].pop("A"),
            ValueError,
            "an inverse of head of kind 'Inverses' with G, kind",
        ),
        (lambda s: s["kfac"]["solvers"]["head"].update(kind="X"), ValueError, "of kind 'X' with"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(
    change: Any, error: type[Exception], message: str
) -> None:
    source = filled(Tokens())
    first = KFAC(source, **OPTIONS)
    train(source, first, range(2))
    state = saved_and_loaded(first.state_dict())
    model, twin = filled(Tokens()), filled(Tokens())
    optimizer, other = KFAC(model, **OPTIONS), KFAC(twin, **OPTIONS)
    train(model, optimizer, range(1))
    train(twin, other, range(1))
    change(state)
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(state)
    train(model, optimizer, range(1, 3))
    train(twin, other, range(1, 3))
    assert_close(model, twin)
