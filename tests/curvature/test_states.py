"""A saved state is of a capture alike, and knows which layers were met."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import cases
from fisherkern.curvature import Capture, estimate_fisher


class Two(nn.Module):
    """Of whose layers one is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(3, cases.V), nn.Linear(3, cases.V)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def captured(**options: Any) -> Capture:
    return cases.captured(
        cases.filled(Two()), cases.drawn(4, 3), **{"fisher_type": "type-2", **options}
    )


def saved(fisher: Capture) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(fisher.state_dict(), file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize(
    ("option", "mine", "theirs"),
    [
        ("fisher_type", "type-2", "mc"),
        ("fisher_type", "mc", "empirical"),
        ("kfac_approx", "expand", "reduce"),
        ("structure", "kfac", "ekfac"),
        ("structure", "ekfac", "kfac"),
        ("structure", "diagonal", "low-rank"),
    ],
)
def test_a_state_of_another_option_is_refused(option: str, mine: str, theirs: str) -> None:
    """Before anything is written, though its averages may have the same shapes."""
    state = saved(Capture(Two(), **{option: theirs}))
    for layer in state["layers"].values():
        for part in layer.values():
            if "sum" in part:
                part["sum"].fill_(1.0)
    fisher = Capture(Two(), **{option: mine})
    with pytest.raises(ValueError) as caught:
        fisher.load_state_dict(state)
    assert str(caught.value) == f"state has {option} {theirs!r}; expected {mine!r}"
    assert not any(value.any() for value in cases.averages(fisher).values())


def test_a_checkpoint_of_another_fisher_is_refused(tmp_path: Any) -> None:
    model, batch = cases.filled(Two()), (cases.drawn(4, 3), cases.labels(4))
    options: dict[str, Any] = {
        "checkpoint": tmp_path / "fisher.pt",
        "checkpoint_period": 1,
        "progress": False,
    }
    estimate_fisher(model, [batch], fisher_type="empirical", **options)
    with pytest.raises(ValueError, match="state has fisher_type 'empirical'; expected 'type-2'"):
        estimate_fisher(model, [batch], fisher_type="type-2", **options)


UNUSED = {f"unused.{role}": "its module was never called" for role in ("weight", "bias")}


def test_what_was_never_called_is_in_the_state() -> None:
    fisher = captured()
    assert fisher.uncovered() == UNUSED
    loaded = Capture(Two().double(), fisher_type="type-2")
    assert loaded.uncovered() == {}
    loaded.load_state_dict(saved(fisher))
    assert loaded.uncovered() == UNUSED
    loaded.load_state_dict(saved(Capture(Two().double(), fisher_type="type-2")))
    assert loaded.uncovered() == {}


def test_what_one_of_two_captures_met_is_met() -> None:
    merged = Capture(Two().double(), fisher_type="type-2")
    assert merged.merge_(captured()).uncovered() == UNUSED
    fisher = captured()
    fisher.merge_(Capture(Two().double(), fisher_type="type-2"))
    assert fisher.uncovered() == UNUSED


class Positions(nn.Module):
    """Whose first layer is called once for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Embedding(3, 4), nn.Linear(4, cases.V)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.unsqueeze(-1) + self.positions(torch.arange(3)))


def test_why_a_layer_was_left_out_is_in_the_state() -> None:
    model, x = cases.filled(Positions()), cases.drawn(5, 3)
    with pytest.warns(RuntimeWarning, match="for all samples of a batch at once"):
        fisher = cases.captured(model, x, fisher_type="type-2")
    reasons = fisher.uncovered()
    assert "for all samples of a batch at once" in reasons["positions.weight"]
    loaded = Capture(model, fisher_type="type-2")
    loaded.load_state_dict(saved(fisher))
    assert loaded.uncovered() == reasons


def test_a_state_that_does_not_say_what_is_missing() -> None:
    fisher = captured()
    state = fisher.state_dict()
    del state["missing"]["used"]
    with pytest.raises(KeyError, match="state lacks missing of layer used"):
        fisher.load_state_dict(state)
