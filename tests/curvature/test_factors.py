"""A and G of each kind of layer, against rows and gradients by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import cases
from curvature.cases import CONVOLUTIONS, EXACT, LINEAR, Case, Net, TokenNet
from fisherkern.curvature import BlockCurvature, KroneckerCurvature

IDS: dict[str, Any] = {"ids": lambda value: value.id if isinstance(value, Case) else None}


def gradient_rows(case: Case) -> Any:
    return cases.channels_last if case in CONVOLUTIONS else cases.tokens


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", cases.TYPES)
@pytest.mark.parametrize("case", [*LINEAR, *CONVOLUTIONS], **IDS)
def test_of_layers_with_a_weight(case: Case, fisher_type: str, approx: str) -> None:
    model, x = cases.filled(Net(case.make())), case.inputs()
    layer = cases.captured(model, x, fisher_type, kfac_approx=approx).layers["layer"]
    assert isinstance(layer, KroneckerCurvature)
    G, A = layer.factors()
    bias = getattr(model.layer, "bias", None) is not None
    rows = gradient_rows(case)
    expected_A = cases.averaged(case.rows(model.layer, x), None, approx, bias)
    expected_G = cases.output_factor(
        model, x, fisher_type, lambda g: cases.summed(rows(g), None, approx)
    )
    assert cases.error(A, expected_A) < EXACT
    assert cases.error(G, expected_G) < EXACT


@pytest.mark.parametrize("case", [*LINEAR, *CONVOLUTIONS], **IDS)
def test_rows_give_the_gradient_of_the_weight(case: Case) -> None:
    """Which is what makes the rows by hand of these tests those of the layer."""
    model, x = cases.filled(Net(case.make())), case.inputs()
    with cases.watched(model.layer) as outputs:
        loss = model(x).square().sum()
    named = dict(model.layer.named_parameters())
    g, *gradients = torch.autograd.grad(loss, [outputs[0], *named.values()])
    rows = case.rows(model.layer, x).flatten(0, 1)
    if "bias" in named:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
    product = gradient_rows(case)(g).flatten(0, 1).T @ rows
    whole = cases.matrix(model.layer, dict(zip(named, gradients, strict=True)))
    assert cases.error(product, whole) < EXACT


@pytest.mark.parametrize("fisher_type", cases.TYPES)
@pytest.mark.parametrize("case", [LINEAR[1], LINEAR[2], LINEAR[4]], **IDS)
def test_with_a_term_at_every_position(case: Case, fisher_type: str) -> None:
    """Rows are those of tokens, whose gradients are those of one term each."""
    model, x = cases.filled(TokenNet(case.make())), case.inputs()
    layer = cases.captured(model, x, fisher_type).layers["layer"]
    rows = lambda g: cases.summed(cases.tokens(g), None, "expand")  # noqa: E731
    assert cases.error(layer.G.factor(), cases.output_factor(model, x, fisher_type, rows)) < EXACT
    assert layer.G.count == x.shape[:-1].numel()


# ---- embeddings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", cases.TYPES)
@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_embedding(dtype: torch.dtype, padding: int | None, fisher_type: str, approx: str) -> None:
    """A is the share of each index; the padding index gets no gradient and is no token."""
    model = cases.filled(Net(nn.Embedding(6, 3, padding_idx=padding)))
    x = torch.randint(6, (4, 5), generator=cases.generator(3)).to(dtype)
    x[0, 1] = 2
    used = x != (-1 if padding is None else padding)
    G, A = cases.captured(model, x, fisher_type, kfac_approx=approx).layers["layer"].factors()
    expected = torch.bincount(x[used], minlength=6).double() / used.sum()
    assert cases.error(A, expected) < EXACT
    truth = cases.output_factor(model, x, fisher_type, lambda g: cases.summed(g, used, "expand"))
    assert cases.error(G, truth) < EXACT


# ---- norms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", cases.TYPES)
@pytest.mark.parametrize("shape", [(4,), (5, 4)])
@pytest.mark.parametrize("norm", cases.NORMS)
def test_norm(norm: str, shape: tuple[int, ...], fisher_type: str, approx: str) -> None:
    make, normalise, tolerance = cases.NORMS[norm]
    model, x = cases.filled(Net(make())), cases.drawn(3, *shape)
    layer = cases.captured(model, x, fisher_type, kfac_approx=approx).layers["layer"]
    assert isinstance(layer, BlockCurvature)
    normalised = cases.tokens(normalise(x))

    def rows(g: Tensor) -> Tensor:
        return cases.summed(cases.scores(model, normalised, cases.tokens(g)), None, approx)

    assert cases.error(layer.matrix(), cases.output_factor(model, x, fisher_type, rows)) < tolerance


def test_norm_over_two_dimensions() -> None:
    model, x = cases.filled(Net(nn.LayerNorm((2, 3)))), cases.drawn(3, 5, 2, 3)
    layer = cases.captured(model, x).layers["layer"]
    normalised = cases.centred(x.flatten(2))

    def rows(g: Tensor) -> Tensor:
        return cases.scores(model, normalised, g.flatten(2)).flatten(0, 1)

    assert cases.error(layer.matrix(), cases.output_factor(model, x, "type-2", rows)) < EXACT


def test_bias_of_a_norm_whose_weight_is_frozen() -> None:
    model, x = cases.filled(Net(nn.LayerNorm(4))), cases.drawn(3, 5, 4)
    model.layer.weight.requires_grad_(False)
    layer = cases.captured(model, x).layers["layer"]
    truth = cases.output_factor(model, x, "type-2", lambda g: g.flatten(0, 1))
    assert cases.error(layer.matrix(), truth) < EXACT


# ---- the numbers a layer is given ---------------------------------------------------------------


def test_float32_on_every_back_end(backend: str, device: str) -> None:
    model, x = cases.filled(Net(nn.Linear(3, 4))), cases.drawn(3, 5, 3)
    truth = cases.captured(model, x).layers["layer"].factors()
    # a readout in float64, so that what is compared is the capture alone
    narrow = TokenNet(nn.Linear(3, 4)).to(device)
    narrow.load_state_dict(model.state_dict())

    class Widened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = narrow.layer

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x).tanh().flatten(1)
            return h @ cases.drawn(h.shape[1], cases.V, seed=7).to(h)

    found = cases.captured(Widened(), x.float().to(device)).layers["layer"].factors()
    for factor, expected in zip(found, truth, strict=True):
        assert factor.dtype == torch.float32
        # weights, inputs, two products, tanh and a softmax, each rounded once
        assert cases.error(factor.double().cpu(), expected) < 10 * 2**-23


class Flat(nn.Module):
    """Logits [V] of one sample, or [B, V]."""

    def __init__(self, layer: nn.Module, lead: int) -> None:
        super().__init__()
        self.layer, self.lead = layer, lead

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).tanh()
        h = h.flatten(self.lead)
        return h @ cases.drawn(h.shape[-1], cases.V, seed=7)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block"])
@pytest.mark.parametrize("case", [LINEAR[0], CONVOLUTIONS[0], CONVOLUTIONS[3]], **IDS)
def test_a_sample_without_a_batch_dimension(case: Case, structure: str) -> None:
    layer, x = cases.filled(case.make()), case.inputs(1)
    alone = cases.captured(Flat(layer, 0), x[0], structure=structure)
    cases.assert_same(alone, cases.captured(Flat(layer, 1), x, structure=structure))
    assert alone.uncovered() == {}


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block"])
def test_a_batch_without_samples(structure: str) -> None:
    body = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh())
    model = cases.filled(Net(body))
    whole = cases.captured(model, cases.drawn(3, 3), structure=structure)
    before = cases.averages(whole)
    with whole, whole.batch():
        whole.add(model(cases.drawn(0, 3)))
    after = cases.averages(whole)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert any(value.any() for value in after.values())
