"""Fisher type "mc": unbiased, with the spread that its labels have, and the same for a seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import cases
from curvature.cases import Net
from fisherkern.curvature import BlockCurvature, Capture, capture

DRAWS = 1500
# standard errors that a result may be off; the seed is fixed
MOST = 5


class Mixed(nn.Module):
    """A term at every position, which depends on all positions before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).cumsum(1).tanh() @ cases.drawn(3, cases.V, seed=7)


def sampled(model: nn.Module, x: Tensor, seed: int = 0, **options: Any) -> Capture:
    fisher = Capture(model, fisher_type="mc", generator=cases.generator(seed), **options)
    with fisher, fisher.batch():
        fisher.add(model(x))
    return fisher


@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(2, 2), lambda: nn.LayerNorm(2), lambda: nn.Conv1d(1, 2, 2)]
)
def test_block_within_its_standard_error(layer: type[nn.Module]) -> None:
    """Of one term per sample, where the spread can be said exactly."""
    model = cases.filled(Net(layer()))
    x = cases.drawn(3, 1, 4) if isinstance(model.layer, nn.Conv1d) else cases.drawn(3, 2)
    fisher = sampled(model, x, structure="block", mc_samples=DRAWS)
    curvature = fisher.layers["layer"]
    assert isinstance(curvature, BlockCurvature)
    named = dict(model.layer.named_parameters())
    mean, variance = 0.0, 0.0
    for z in model(x):
        p = z.detach().softmax(-1)
        parts = {name: cases.jacobian(z, value) for name, value in named.items()}
        J = torch.stack(
            [
                cases.matrix(model.layer, {k: v[c] for k, v in parts.items()}).flatten()
                for c in range(cases.V)
            ]
        )
        g = (p - torch.eye(cases.V, dtype=torch.float64)) @ J  # by label
        squares = g[:, :, None] * g[:, None, :]
        first = torch.einsum("c,cij->ij", p, squares)
        mean = mean + first / len(x)
        variance = variance + torch.einsum("c,cij->ij", p, (squares - first) ** 2) / len(x) ** 2
    spread = (variance / DRAWS).sqrt()
    assert ((curvature.matrix() - mean).abs() <= MOST * spread + cases.EXACT * mean.abs()).all()
    assert spread.norm() < 0.1 * mean.norm()  # so that a wrong factor would show
    assert curvature.block.count == 3 * DRAWS


def test_positions_that_mix_are_unbiased() -> None:
    """Labels of different positions are independent: products of theirs vanish on average."""
    model, x = cases.filled(Mixed()), cases.drawn(2, 3, 2)
    groups, draws = 30, 50
    generator = cases.generator(0)
    found = []
    for _ in range(groups):
        fisher = Capture(model, structure="block", mc_samples=draws, generator=generator)
        with fisher, fisher.batch():
            fisher.add(model(x))
        found.append(fisher.layers["layer"].matrix())
    every = torch.stack(found)
    spread = every.std(0) / groups**0.5
    truth = cases.block(model, model.layer, model(x))
    assert ((every.mean(0) - truth).abs() <= MOST * spread).all()
    assert spread.norm() < 0.1 * truth.norm()


def test_signs_of_type_2_are_unbiased() -> None:
    """Those of each sample are others, so that what mixes vanishes over samples."""
    model, x = cases.filled(Mixed()), cases.drawn(2, 3, 2)
    truth = cases.block(model, model.layer, model(x))
    fisher = Capture(model, fisher_type="type-2", structure="block")
    found, before = [], torch.zeros_like(truth)
    with fisher:
        for step in range(1, 401):
            with fisher.batch():
                fisher.add(model(x))
            total = fisher.layers["layer"].matrix() * step
            found.append(total - before)
            before = total
    every = torch.stack(found)
    spread = every.std(0) / len(found) ** 0.5
    assert ((every.mean(0) - truth).abs() <= MOST * spread + cases.EXACT).all()
    assert 0 < spread.norm() < 0.1 * truth.norm()


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block"])
def test_a_seed_is_a_result(structure: str) -> None:
    model, x = cases.filled(Mixed()), cases.drawn(2, 3, 2)
    one, two = (sampled(model, x, structure=structure, mc_samples=2) for _ in range(2))
    cases.assert_same(one, two, bits=True)
    other = sampled(model, x, seed=1, structure=structure, mc_samples=2)
    assert any(
        not torch.equal(value, cases.averages(other)[name])
        for name, value in cases.averages(one).items()
    )


def test_draws_are_averaged_whether_made_at_once_or_not() -> None:
    model, x = cases.filled(Mixed()), cases.drawn(2, 3, 2)
    at_once = sampled(model, x, mc_samples=3)
    with capture(model, fisher_type="mc", generator=cases.generator(0)) as fisher:
        for _ in range(3):
            with fisher.batch():
                fisher.add(model(x))
    G, A = fisher.layers["layer"].factors()
    expected_G, expected_A = at_once.layers["layer"].factors()
    assert cases.error(G, expected_G) < cases.EXACT
    assert cases.error(A, expected_A) < cases.EXACT
    assert fisher.layers["layer"].G.count == at_once.layers["layer"].G.count == 18
    assert at_once.layers["layer"].A.count == 6
