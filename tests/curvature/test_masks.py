"""Masks: what they leave out contributes exactly zero, and N counts what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import cases
from curvature.cases import EXACT, LINEAR, Net
from fisherkern.curvature import Capture

GARBAGE = (torch.nan, torch.inf, 3.0)


def padding(samples: int = 3, positions: int = 5) -> Tensor:
    """Lengths 5, 2, 4, 0."""
    return torch.arange(positions) < torch.tensor([positions, 2, 4, 0])[:samples, None]


def spoilt(x: Tensor, mask: Tensor, value: float) -> Tensor:
    return torch.where(mask.reshape(*mask.shape, *(1,) * (x.ndim - mask.ndim)), x, value)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("fisher_type", cases.TYPES)
@pytest.mark.parametrize("case", [LINEAR[1], LINEAR[3], LINEAR[4]], ids=lambda case: case.id)
def test_linear_layers(case: cases.Case, fisher_type: str, approx: str) -> None:
    model, mask = cases.filled(Net(case.make())), padding(4)
    x = case.inputs(4)
    options: dict[str, Any] = {"mask": mask, "over": mask[:, 0], "kfac_approx": approx}
    results = [
        cases.captured(model, spoilt(x, mask, value), fisher_type, arguments=(mask,), **options)
        for value in GARBAGE
    ]
    layer = results[0].layers["layer"]
    expected_A = cases.averaged(x, mask, approx, getattr(model.layer, "bias", None) is not None)
    expected_G = cases.output_factor(
        model,
        x,
        fisher_type,
        lambda g: cases.summed(g, mask, approx),
        over=mask[:, 0],
        arguments=(mask,),
    )
    assert cases.error(layer.A.factor(), expected_A) < EXACT
    assert cases.error(layer.G.factor(), expected_G) < EXACT
    for result in results[1:]:
        cases.assert_same(results[0], result, bits=True)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block"])
@pytest.mark.parametrize("fisher_type", cases.TYPES)
def test_what_is_left_out_is_as_if_it_were_not_there(fisher_type: str, structure: str) -> None:
    """A batch with padding, and the same samples one by one, each cut to its length."""
    model, mask, x = cases.filled(Net(nn.Linear(3, 4))), padding(), cases.drawn(3, 5, 3)
    options: dict[str, Any] = {"structure": structure, "kfac_approx": "reduce"}
    whole = cases.captured(
        model,
        spoilt(x, mask, torch.nan),
        fisher_type,
        mask=mask,
        over=mask[:, 0],
        arguments=(mask,),
        **options,
    )

    class Cut(nn.Module):
        """The net on samples without padding, whose readout is that of longer ones."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = model.layer

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x).tanh().flatten(1)
            return h @ cases.drawn(20, cases.V, seed=7)[: h.shape[1]]

    parts = []
    for b, length in enumerate(mask.sum(1).tolist()):
        y = cases.labels(3)[b : b + 1]
        kind, _, reduction = fisher_type.partition("-")
        empirical = kind == "empirical"
        part = Capture(
            Cut(),
            fisher_type=kind if empirical else fisher_type,
            loss_reduction=reduction if empirical else "mean",
            **options,
        )
        with part, part.batch(terms=1 if empirical else None):
            logits = part._model(x[b : b + 1, :length])
            if empirical:
                nn.functional.cross_entropy(logits, y, reduction=reduction).backward()
            else:
                part.add(logits)
        parts.append(part)
    joint = parts[0].merge_(parts[1]).merge_(parts[2])
    cases.assert_same(whole, joint)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms(norm: str, approx: str) -> None:
    make, normalise, _ = cases.NORMS[norm]
    model, mask, x = cases.filled(Net(make())), padding(), cases.drawn(3, 5, 4)
    results = [
        cases.captured(
            model,
            spoilt(x, mask, value),
            mask=mask,
            over=mask[:, 0],
            arguments=(mask,),
            kfac_approx=approx,
        )
        for value in GARBAGE
    ]

    def rows(g: Tensor) -> Tensor:
        return cases.summed(cases.scores(model, normalise(x), g), mask, approx)

    truth = cases.output_factor(model, x, "type-2", rows, arguments=(mask,))
    assert cases.error(results[0].layers["layer"].matrix(), truth) < EXACT
    for result in results[1:]:
        cases.assert_same(results[0], result, bits=True)


def test_embedding() -> None:
    model, mask = cases.filled(Net(nn.Embedding(6, 3))), padding()
    x = torch.randint(6, (3, 5), generator=cases.generator(3))
    results = [
        cases.captured(
            model, torch.where(mask, x, index), mask=mask, over=mask[:, 0], arguments=(mask,)
        )
        for index in (0, 5)
    ]
    truth = cases.output_factor(
        model, x, "type-2", lambda g: cases.summed(g, mask, "expand"), arguments=(mask,)
    )
    G, A = results[0].layers["layer"].factors()
    assert cases.error(A, torch.bincount(x[mask], minlength=6).double() / mask.sum()) < EXACT
    assert cases.error(G, truth) < EXACT
    cases.assert_same(*results, bits=True)


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block"])
@pytest.mark.parametrize("case", cases.CONVOLUTIONS, ids=lambda case: case.id)
def test_images(case: cases.Case, structure: str) -> None:
    """A mask [B] leaves whole images out, of strided convolutions too."""
    model, x, mask = (
        cases.filled(Net(case.make())),
        case.inputs(),
        torch.tensor([True, False, True]),
    )
    results = [
        cases.captured(model, spoilt(x, mask, value), mask=mask, structure=structure)
        for value in GARBAGE
    ]
    cases.assert_same(results[0], results[1], bits=True)
    cases.assert_same(results[0], results[2], bits=True)
    alone = cases.captured(model, x[mask], structure=structure)
    cases.assert_same(results[0], alone)


@pytest.mark.parametrize("fisher_type", cases.TYPES)
def test_convolution_over_a_sequence_with_padding(fisher_type: str) -> None:
    """A mask [B, S] over a convolution that keeps S; patches may reach into the padding."""
    case = cases.CONVOLUTIONS[2]
    model, mask, x = cases.filled(Net(case.make())), padding(), case.inputs()

    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = model.layer

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = torch.where(mask[:, None], self.layer(x), 0.0).tanh().flatten(1)
            return h @ cases.drawn(h.shape[1], cases.V, seed=7)

    net, options = Channels(), {"mask": mask, "over": mask[:, 0], "arguments": (mask,)}
    layer = cases.captured(net, x, fisher_type, **options).layers["layer"]
    truth = cases.output_factor(
        net,
        x,
        fisher_type,
        lambda g: cases.summed(cases.channels_last(g), mask, "expand"),
        arguments=(mask,),
    )
    assert cases.error(layer.G.factor(), truth) < EXACT
    rows = case.rows(model.layer, x)
    assert cases.error(layer.A.factor(), cases.averaged(rows, mask, "expand", True)) < EXACT


# ---- masks and layers of other shapes -----------------------------------------------------------


class Pooled(nn.Module):
    """Tokens, their mean over those that count, and a layer on samples."""

    def __init__(self, keepdim: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.keepdim = nn.Linear(3, 4), nn.Linear(4, cases.V), keepdim

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = torch.where(mask[..., None], self.body(x), 0.0)
        h = h.sum(1, keepdim=True) / mask.sum(1)[:, None, None].clamp(min=1)
        return self.head(h if self.keepdim else h.squeeze(1)).reshape(len(x), -1)


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("structure", ["kfac", "diagonal", "block"])
def test_pooled_head(structure: str, keepdim: bool) -> None:
    """A sample counts where any of its tokens does, in layers and in N."""
    model, mask, x = cases.filled(Pooled(keepdim)), padding(), cases.drawn(3, 5, 3)
    mask[1] = False
    kept = mask.any(1)
    fisher = cases.captured(
        model, spoilt(x, mask, torch.nan), mask=mask, arguments=(mask,), structure=structure
    )
    alone = cases.captured(
        model, x[kept], mask=mask[kept], arguments=(mask[kept],), structure=structure
    )
    cases.assert_same(fisher, alone)
    if structure == "kfac":
        assert fisher.layers["head"].G.count == 2
        assert fisher.layers["head"].A.count == 2
        assert fisher.layers["body"].A.count == mask.sum()


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
def test_mask_of_samples_over_terms_at_every_position(fisher_type: str) -> None:
    model, x = cases.filled(cases.TokenNet(nn.Linear(3, 4))), cases.drawn(3, 5, 3)
    mask = torch.tensor([True, False, True])
    layer = cases.captured(model, spoilt(x, mask, torch.nan), fisher_type, mask=mask).layers[
        "layer"
    ]
    assert layer.G.count == layer.A.count == 10
    if fisher_type == "type-2":
        alone = cases.captured(model, x[mask]).layers["layer"]
        assert cases.error(layer.G.factor(), alone.G.factor()) < EXACT


class Flattened(nn.Module):
    """A layer that is given [B S, d]."""

    def __init__(self, layer: nn.Module, cut: bool = True) -> None:
        super().__init__()
        self.layer, self.cut = layer, cut

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x.flatten(0, 1) if self.cut else x).reshape(*mask.shape, -1)
        return torch.where(mask[..., None], y, 0.0).tanh().sum(1)


@pytest.mark.parametrize("structure", ["kfac", "diagonal", "block"])
@pytest.mark.parametrize(
    "layer", [lambda: nn.Linear(3, cases.V), lambda: nn.LayerNorm(4), lambda: nn.Embedding(6, 4)]
)
def test_tokens_that_the_model_flattened(layer: Any, structure: str) -> None:
    """A mask [B, S] tells which sample each of the [B S] rows belongs to."""
    module, mask = cases.filled(layer()), padding()
    if isinstance(module, nn.Embedding):
        x = torch.randint(6, (3, 5), generator=cases.generator(3))
    else:
        x = cases.drawn(3, 5, *module.weight.shape[-1:])
    options: dict[str, Any] = {"structure": structure, "kfac_approx": "reduce"}
    flat, whole = (
        cases.captured(
            Flattened(module, cut), x, mask=mask, over=mask[:, 0], arguments=(mask,), **options
        )
        for cut in (True, False)
    )
    cases.assert_same(flat, whole, bits=True)


@pytest.mark.parametrize("heads_first", [False, True])
def test_norm_of_attention_heads(heads_first: bool) -> None:
    """Queries [B, S, heads, d] or [B, heads, S, d] under a mask [B, S]."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LayerNorm(4)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            x = x.transpose(1, 2) if heads_first else x
            y = self.layer(x)
            y = y.transpose(1, 2) if heads_first else y
            y = torch.where(mask[..., None, None], y, 0.0)
            return y.tanh().flatten(1) @ cases.drawn(40, cases.V, seed=7)

    model, mask, x = cases.filled(Heads()), padding(), cases.drawn(3, 5, 2, 4)
    layer = cases.captured(
        model, spoilt(x, mask, torch.nan), mask=mask, over=mask[:, 0], arguments=(mask,)
    ).layers["layer"]

    def rows(g: Tensor) -> Tensor:
        g = g.transpose(1, 2) if heads_first else g
        return cases.scores(model, cases.centred(x), g)[mask].flatten(0, 1)

    truth = cases.output_factor(model, x, "type-2", rows, arguments=(mask,))
    assert cases.error(layer.matrix(), truth) < EXACT


# ---- what all samples share ---------------------------------------------------------------------


class Positions(nn.Module):
    """Embeddings of positions that are made once and broadcast over samples."""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(6, 3), nn.Embedding(5, 3)
        self.batched = batched

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1])
        h = self.token(x) + self.position(index[None] if self.batched else index)
        return h.tanh() @ cases.drawn(3, cases.V, seed=7)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("fisher_type", "masked"), [("type-2", False), ("type-2", True), ("empirical-mean", True)]
)
def test_a_layer_without_samples_is_left_out(fisher_type: str, masked: bool, batched: bool) -> None:
    """The squares of its gradients would be those of sums over samples."""
    model, x = cases.filled(Positions(batched)), torch.randint(6, (3, 5))
    mask = padding() if masked else None
    with pytest.warns(RuntimeWarning, match="position: called on tokens of shape") as caught:
        fisher = cases.captured(model, x, fisher_type, mask=mask, over=mask)
    assert len(caught) == 1
    assert fisher.layers["position"].G.count == 0
    assert fisher.layers["token"].G.count == (15 if mask is None else mask.sum())
    assert list(fisher.uncovered()) == ["position.weight"]
    assert "cannot be told apart" in fisher.uncovered()["position.weight"]


def test_one_sample_of_which_logits_are_flattened_has_all_layers() -> None:
    class Flat(cases.TokenNet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flatten(0, 1)

    layer, x = cases.filled(nn.Linear(3, 4)), cases.drawn(1, 5, 3)
    flat = cases.captured(Flat(layer), x)
    cases.assert_same(flat, cases.captured(cases.TokenNet(layer), x))
    assert flat.uncovered() == {}


@pytest.mark.parametrize("batched", [False, True])
def test_a_layer_without_samples_is_averaged_over_draws(batched: bool) -> None:
    """Of sampled labels the products of different samples cancel on average."""
    model, mask = cases.filled(Positions(batched)), padding()
    x = torch.randint(6, (3, 5), generator=cases.generator(3))
    groups, draws, generator, found = 30, 30, cases.generator(0), []
    for _ in range(groups):
        fisher = cases.captured(
            model,
            x,
            "mc",
            mask=mask,
            mc_samples=draws,
            generator=generator,
            layers=["position"],
        )
        found.append(fisher.layers["position"].G.factor())
    spread = torch.stack(found).std(0) / groups**0.5
    with cases.watched(model.position) as outputs:
        logits = model(x)
    rows = lambda g: g.reshape(5, 3)[mask.any(0)]  # noqa: E731
    truth = cases.type_2(logits, outputs[0], rows, mask)
    # five standard errors, for a fixed seed
    assert ((torch.stack(found).mean(0) - truth).abs() <= 5 * spread).all()
    assert spread.norm() < 0.1 * truth.norm()
    assert list(fisher.uncovered()) == ["token.weight"]
