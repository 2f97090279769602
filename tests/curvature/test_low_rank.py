"""A diagonal and leading directions: exact while the rank lasts, and within its bound after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from curvature import cases
from fisherkern.curvature import Capture, LowRankCurvature, capture
from fisherkern.curvature.low_rank import SketchedAverage


def model() -> nn.Module:
    layers = nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3, bias=False)
    return cases.filled(nn.Sequential(*layers))


def captured(network: nn.Module, x: torch.Tensor, **options: Any) -> Capture:
    return cases.captured(network, x, **options)


@pytest.mark.parametrize("name", ["0", "1", "3"])
def test_with_rank_enough_it_is_the_block(name: str) -> None:
    network, x = model(), cases.drawn(4, 3)
    layer = captured(network, x, structure="low-rank", rank=12).layers[name]
    assert isinstance(layer, LowRankCurvature)
    block = captured(network, x, structure="block", kfac_approx="reduce").layers[name].matrix()
    assert cases.error(layer.operator().to_dense(), block) < cases.EXACT
    D, _ = layer.parts()
    assert (D >= 0).all()
    assert D.max() < cases.EXACT * block.diagonal().max()
    y = cases.drawn(*layer.layer.matrix(layer.diagonal()).shape, seed=3)
    product = (block @ y.flatten()).view(y.shape)
    assert cases.error(layer.product(y), product) < cases.EXACT


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_with_less_the_diagonal_is_exact_and_the_rest_below(rank: int) -> None:
    network, x = model(), cases.drawn(30, 3)
    layer = captured(network, x, structure="low-rank", rank=rank).layers["0"]
    block = captured(network, x, structure="block").layers["0"].matrix()
    D, B = layer.parts()
    diagonal = layer.layer.matrix(layer.diagonal()).flatten()
    assert cases.error(diagonal, block.diagonal()) < cases.EXACT
    assert cases.error(D + B.square().sum(1), block.diagonal()) < cases.EXACT
    missing = torch.linalg.eigvalsh(block - B @ B.mT)
    size = torch.linalg.eigvalsh(block)
    assert missing[0] > -1e-12 * size[-1]
    # Frequent Directions of rank r leave out no more than the tail of rank r / 2 does
    assert missing[-1] <= size[: -max(rank // 2, 1)].sum() / max(rank - rank // 2, 1)
    assert missing[-1] < size[-1]


def test_batches_merges_and_states() -> None:
    network, x = model(), cases.drawn(4, 3)
    whole = captured(network, x, structure="low-rank", rank=12)
    parts = [captured(network, x[n : n + 2], structure="low-rank", rank=12) for n in (0, 2)]
    joint = parts[0].merge_(parts[1])
    other = Capture(network, fisher_type="type-2", structure="low-rank", rank=12)
    other.load_state_dict(whole.state_dict())
    for name, layer in whole.layers.items():
        dense = layer.operator().to_dense()
        assert cases.error(joint.layers[name].operator().to_dense(), dense) < cases.EXACT
        assert torch.equal(other.layers[name].operator().to_dense(), dense)


def test_the_sketch_decays_with_the_squares() -> None:
    network = cases.filled(nn.Linear(3, 2))
    options: dict[str, Any] = {"fisher_type": "type-2", "ema_decay": 0.6}
    fishers = [
        Capture(network, structure=structure, rank=40, **options)
        for structure in ("low-rank", "block")
    ]
    for fisher in fishers:
        with fisher:
            for step in (0, 1, 2):
                with fisher.batch():
                    fisher.add(network(cases.drawn(3, 3, seed=step)))
                for layer in fisher.layers.values():
                    layer.begin_step()  # and a step without any tokens
    sketched, block = (fisher.layers[""] for fisher in fishers)
    assert cases.error(sketched.operator().to_dense(), block.matrix()) < cases.EXACT


def test_states_that_do_not_fit_change_nothing() -> None:
    network, x = model(), cases.drawn(4, 3)
    fisher = captured(network, x, structure="low-rank", rank=2)
    before = fisher.state_dict()
    for columns, message in (
        (torch.zeros(3, 1), r"columns of shape \[3, 1\]; expected \[16, up to 4\]"),
        (torch.zeros(16, 5), r"columns of shape \[16, 5\]"),
    ):
        state = fisher.state_dict()
        state["layers"]["0"]["squares"]["columns"] = columns
        with pytest.raises(ValueError, match=message):
            fisher.load_state_dict(state)
    state = fisher.state_dict()
    del state["layers"]["0"]["squares"]["columns"]
    with pytest.raises(KeyError, match="state lacks columns"):
        fisher.load_state_dict(state)
    after = fisher.state_dict()
    for name, layer in before["layers"].items():
        columns = after["layers"][name]["squares"]["columns"]
        assert torch.equal(columns, layer["squares"]["columns"])
    other = captured(network, x, structure="low-rank", rank=3)
    with pytest.raises(ValueError, match="other does not keep layer 0 as this capture does"):
        fisher.merge_(other)


def test_layers_that_are_too_large_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from fisherkern.curvature import kinds

    monkeypatch.setattr(kinds, "_LARGEST_SKETCH", 13)
    with capture(model(), structure="low-rank") as fisher:
        reasons = fisher.uncovered()
    assert reasons["0.weight"] == "16 parameters, more than the 13 of a sketch"
    assert set(fisher.layers) == {"1", "3"}
    with pytest.raises(ValueError, match="rank is 0; allowed are ints >= 1"):
        Capture(model(), structure="low-rank", rank=0)


def test_reading_does_not_change_what_is_kept() -> None:
    fisher = captured(model(), cases.drawn(30, 3), structure="low-rank", rank=3)
    layer = fisher.layers["0"]
    assert isinstance(layer, LowRankCurvature)
    before = layer.squares.columns.clone()
    layer.operator()
    assert torch.equal(layer.squares.columns, before)


def test_averages_say_what_they_are() -> None:
    one = SketchedAverage((2, 3), 4, ema_decay=None)
    assert repr(one).endswith("and a sketch of rank 4")
