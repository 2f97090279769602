"""Diagonal, block, EKFAC and K-FAC against the dense Fisher, where they are the Fisher."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import cases
from curvature.cases import EXACT
from fisherkern.curvature import (
    BlockCurvature,
    Capture,
    EigenCurvature,
    KroneckerCurvature,
)
from fisherkern.curvature.layers import NormLayer
from fisherkern.curvature.recognition import layer_of


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mT


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class Attention(nn.Module):
    """One head, in which positions mix."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        # so soft that gradients come to q and k: with weights of one it looks at one position
        return functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), scale=0.05)


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, cases.V)
    )


def convolutions() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 2, 2, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(2, 2, (1, 2), dilation=(1, 2), bias=False),
        nn.Tanh(),
        nn.Flatten(2),
        nn.Conv1d(2, 3, 3, padding="same"),
        nn.Flatten(),
        nn.Linear(9, cases.V),
    )


def sequences() -> nn.Sequential:
    return nn.Sequential(
        nn.Embedding(6, 3, padding_idx=0),
        nn.LayerNorm(3),
        Attention(),
        cases.conv1d_of_transformers(3, 2),
        nn.RMSNorm(2),
        Mean(),
        nn.Linear(2, cases.V),
    )


def several_terms() -> nn.Sequential:
    return nn.Sequential(
        nn.Embedding(6, 3), Attention(), nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, cases.V)
    )


def frozen_bias() -> nn.Sequential:
    model = mlp()
    model[0].bias.requires_grad_(False)
    return model


INDICES = torch.tensor([[1, 1, 0, 5], [2, 0, 3, 2], [4, 1, 1, 1]])
NETS: dict[str, tuple[Callable[[], nn.Sequential], Tensor]] = {
    "mlp": (mlp, cases.drawn(3, 3)),
    "frozen-bias": (frozen_bias, cases.drawn(3, 3)),
    "convolutions": (convolutions, cases.drawn(3, 1, 4, 5)),
    "sequences": (sequences, INDICES),
    "several-terms": (several_terms, INDICES),
}


def made(net: str) -> tuple[nn.Module, Tensor]:
    make, x = NETS[net]
    return cases.filled(make()), x


def captured(model: nn.Module, x: Tensor, structure: str) -> Capture:
    return cases.captured(model, x, structure=structure, kfac_approx="reduce", exact_positions=True)


def truths(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The dense Fisher of each layer, from the gradients of its trained parameters."""
    logits = model(x)
    return {
        name: cases.block(model, module, logits)
        for name, module in model.named_modules()
        if any(p.requires_grad for p in module.parameters(recurse=False))
    }


@pytest.mark.parametrize("net", NETS)
def test_blocks(net: str) -> None:
    model, x = made(net)
    fisher, truth = captured(model, x, "block"), truths(model, x)
    assert fisher.layers.keys() == truth.keys()
    for name, layer in fisher.layers.items():
        assert isinstance(layer, BlockCurvature)
        assert cases.error(layer.matrix(), truth[name]) < EXACT, name


@pytest.mark.parametrize("structure", ["diagonal", "block"])
@pytest.mark.parametrize("net", NETS)
def test_diagonals(net: str, structure: str) -> None:
    model, x = made(net)
    fisher, truth = captured(model, x, structure), truths(model, x)
    assert fisher.layers.keys() == truth.keys()
    for name, layer in fisher.layers.items():
        expected, module = truth[name].diagonal(), model.get_submodule(name)
        diagonal = layer.diagonal()
        assert cases.error(cases.matrix(module, diagonal).flatten(), expected) < EXACT, name
        for role, value in diagonal.items():
            assert value.shape == getattr(module, role).shape


@pytest.mark.parametrize("net", NETS)
def test_moments_of_ekfac(net: str) -> None:
    """Λ is the diagonal of the Fisher in the eigenbasis of G ⊗ A."""
    model, x = made(net)
    fisher, truth = captured(model, x, "ekfac"), truths(model, x)
    eigen = {name: c for name, c in fisher.layers.items() if isinstance(c, EigenCurvature)}
    kinds = (nn.Embedding, nn.LayerNorm, nn.RMSNorm)
    assert len(eigen) == sum(not isinstance(model.get_submodule(name), kinds) for name in truth)
    for layer in eigen.values():
        layer.refresh()
    with fisher, fisher.batch():
        fisher.add(model(x))
    for name, layer in eigen.items():
        assert layer.bases is not None
        Q = torch.kron(*layer.bases)
        expected = (Q.T @ truth[name] @ Q).diagonal()
        assert cases.error(layer.eigenvalues().flatten(), expected) < EXACT, name
        dense = Q @ expected.diag() @ Q.T
        diagonal = cases.matrix(model.get_submodule(name), layer.diagonal()).flatten()
        assert cases.error(diagonal, dense.diagonal()) < EXACT, name


def test_ekfac_is_kfac_until_moments_are_there() -> None:
    model, x = made("mlp")
    fisher, plain = captured(model, x, "ekfac"), captured(model, x, "kfac")
    for refreshed in (False, True):
        for name, layer in fisher.layers.items():
            assert isinstance(layer, EigenCurvature)
            if refreshed:
                layer.refresh()
            expected = plain.layers[name].diagonal()
            for role, value in layer.diagonal().items():
                assert cases.error(value, expected[role]) < EXACT


def test_a_refresh_forgets_moments_in_the_old_basis() -> None:
    model, x = made("mlp")
    fisher = captured(model, x, "ekfac")
    layer = fisher.layers["0"]
    assert isinstance(layer, EigenCurvature)
    with fisher:
        for scale in (1.0, 3.0):
            layer.refresh()
            with fisher.batch():
                fisher.add(model(scale * x))
    assert layer.bases is not None
    Q, truth = torch.kron(*layer.bases), truths(model, 3 * x)["0"]
    assert cases.error(layer.eigenvalues().flatten(), (Q.T @ truth @ Q).diagonal()) < EXACT


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_kfac_of_a_single_datum(structure: str) -> None:
    """All gradients of a layer have the same input: the Fisher is G ⊗ A."""
    model = cases.filled(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, cases.V)))
    x = cases.drawn(1, 3)
    fisher, truth = captured(model, x, structure), truths(model, x)
    for name, layer in fisher.layers.items():
        assert isinstance(layer, KroneckerCurvature)
        assert cases.error(torch.kron(*layer.factors()), truth[name]) < EXACT
        X = cases.drawn(layer.layer.d_out, layer.layer.d_in + 1)
        expected = (truth[name] @ X.flatten()).reshape(X.shape)
        assert cases.error(layer.operator() @ X, expected) < EXACT


def test_operator_and_diagonal_are_those_of_the_factors() -> None:
    """Of an embedding without a matrix [V, V]."""
    model, x = made("sequences")
    for layer in captured(model, x, "kfac").layers.values():
        if not isinstance(layer, KroneckerCurvature):
            continue
        G, A = layer.factors()
        A = A.diag() if A.ndim == 1 else A
        dense = torch.kron(G, A)
        X = cases.drawn(len(G), len(A))
        assert cases.error((layer.operator() @ X).flatten(), dense @ X.flatten()) < EXACT
        solved = layer.operator().solve(X, damping=0.5, pi=1.0)
        damped = [f + 0.5**0.5 * torch.eye(len(f), dtype=f.dtype) for f in (G, A)]
        assert cases.error(damped[0] @ solved @ damped[1], X) < EXACT
        whole = cases.matrix(layer.layer.module, layer.diagonal()).flatten()
        assert cases.error(whole, dense.diagonal()) < EXACT


# ---- matrices of parameters ---------------------------------------------------------------------

MODULES: dict[str, Callable[[], nn.Module]] = {
    **{case.id: case.make for case in (*cases.LINEAR, *cases.CONVOLUTIONS)},
    "embedding": lambda: nn.Embedding(6, 3),
    **{name: make for name, (make, _, _) in cases.NORMS.items()},
    "norm-of-two-dimensions": lambda: nn.LayerNorm((2, 3)),
}


@pytest.mark.parametrize("frozen", [None, "weight", "bias"])
@pytest.mark.parametrize("kind", MODULES)
def test_matrix_and_split_are_inverse(kind: str, frozen: str | None) -> None:
    module = MODULES[kind]()
    for role, p in module.named_parameters():
        p.requires_grad_(role != frozen)
    layer = layer_of("", module)
    norm = kind in cases.NORMS or kind.startswith("norm")
    if frozen == "weight" and not (norm and getattr(module, "bias", None) is not None):
        assert isinstance(layer, str)
        return
    assert layer is not None
    assert not isinstance(layer, str)
    values = {role: torch.randn_like(p) for role, p in layer.parameters.items()}
    assert set(values) == {role for role, _ in module.named_parameters()} - {frozen}
    whole = layer.matrix(values)
    assert torch.equal(whole, cases.matrix(module, values))
    assert whole.shape[0] == layer.d_out
    parts = layer.split(whole)
    assert parts.keys() == values.keys()
    for role, value in values.items():
        assert torch.equal(parts[role], value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rms_norm_without_eps_has_that_of_torch(dtype: torch.dtype) -> None:
    """Of the type that it computes in, which matters where inputs are small."""
    module = nn.RMSNorm(8, dtype=dtype)
    x = (1e-2 * cases.drawn(5, 8)).to(dtype)
    layer = layer_of("", module)
    assert isinstance(layer, NormLayer)
    found, truth = layer.rows(x)[:, 0].double(), module(x).detach().double()
    # what torch returns is rounded to the type of the input
    assert cases.error(found, truth) < 2 * torch.finfo(dtype).eps
