"""The same results as from stored logits, by the softmax_fisher ops."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import fisherkern as fk
from conftest import DEVICE, SLOW
from head_fisher import cases

T, V, d = (5, 70, 9) if SLOW else (40, 517, 33)
TAU = 1.3


class Setting(NamedTuple):
    """Inputs of both paths: W h + b and ∂z / ∂(W h + b) are made by hand."""

    x: cases.Inputs
    given: dict
    z: Tensor
    slope: Tensor
    weights: Tensor
    tolerance: float

    def close(self, a: Tensor, b: Tensor) -> None:
        assert a.dtype == b.dtype
        assert cases.error(a, b) <= self.tolerance

    def softmax(self, **arguments: object) -> dict:
        return {"temperature": TAU, "weights": self.weights, **arguments}


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest, backend: str) -> torch.dtype:
    cases.require(backend, request.param)
    return request.param


@pytest.fixture(params=[None, 4.0], ids=["linear", "capped"])
def setting(request: pytest.FixtureRequest, dtype: torch.dtype) -> Setting:
    softcap = request.param
    x = cases.make(T, V, d, dtype, softcap=softcap)
    z = x.hidden @ x.weight.mT + x.bias
    slope = torch.ones_like(z)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
        slope = 1 - (z / softcap) ** 2
    w = torch.rand(T, generator=cases.generator(3), dtype=dtype).to(DEVICE)
    w[1] = 0
    given = {"bias": x.bias, "softcap": softcap, "temperature": TAU, "weights": w}
    return Setting(x, given, z, slope, w, cases.TOLERANCE[dtype])


def test_stats(backend: str, setting: Setting) -> None:
    x, z, w = setting.x, setting.z, setting.weights
    found = fk.head_fisher_stats(x.hidden, x.weight, expected_embedding=True, **setting.given)
    expected = fk.softmax_fisher_stats(z, **setting.softmax())
    for a, b in zip(found, expected, strict=False):
        setting.close(a, b)
    setting.close(found.expected_embedding, w[:, None] * (torch.softmax(z / TAU, -1) @ x.weight))


def test_matvec(backend: str, setting: Setting) -> None:
    x, slope = setting.x, setting.slope
    found = fk.head_fisher_matvec(x.hidden, x.weight, x.u, **setting.given)
    v = slope * (x.u @ x.weight.mT)
    fv = fk.softmax_fisher_matvec(setting.z, v, **setting.softmax())
    setting.close(found, (slope * fv) @ x.weight)
    quadratic = fk.softmax_fisher_quadratic(setting.z, v, **setting.softmax())
    setting.close((x.u * found).sum(-1), quadratic)


@pytest.mark.parametrize("accuracy", ["standard", "high"])
def test_pullback(backend: str, setting: Setting, accuracy: str) -> None:
    x = setting.x
    J = setting.slope[:, None] * x.weight.mT
    z = setting.z[:, None].expand(J.shape)
    w = setting.weights[:, None].expand(J.shape[:-1])
    fj = fk.softmax_fisher_matvec(z, J, temperature=TAU, weights=w)
    each = fj @ J.mT
    for reduction, expected in {"none": each, "sum": each.sum(0)}.items():
        found = fk.head_fisher_pullback(
            x.hidden, x.weight, reduction=reduction, accuracy=accuracy, **setting.given
        )
        setting.close(found, expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_mean_probs(backend: str, setting: Setting, reduction: str) -> None:
    x, how = setting.x, {"reduction": reduction}
    found = fk.head_fisher_mean_probs(x.hidden, x.weight, **how, **setting.given)
    setting.close(found, fk.softmax_fisher_mean_probs(setting.z, **setting.softmax(**how)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weight_diagonal(backend: str, setting: Setting, reduction: str) -> None:
    x, how = setting.x, {"reduction": reduction}
    found = fk.head_fisher_weight_diagonal(x.hidden, x.weight, **how, **setting.given)
    per_token = fk.softmax_fisher_diagonal(setting.z, **setting.softmax())
    rows = setting.slope**2 * per_token
    count = setting.weights.sum() if reduction == "mean" else 1.0
    setting.close(found.weight, rows.mT @ x.hidden**2 / count)
    setting.close(found.bias, rows.sum(0) / count)
    if x.softcap is None:
        setting.close(found.bias, fk.softmax_fisher_diagonal(setting.z, **setting.softmax(**how)))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gram(backend: str, setting: Setting, reduction: str) -> None:
    x, z, w = setting.x, setting.z, setting.weights
    lam = 0.02
    found = fk.head_fisher_gram(x.hidden, x.weight, lam, reduction=reduction, **setting.given)
    shares = w / w.sum() if reduction == "mean" else w
    p = torch.softmax(z / TAU, -1)
    D = fk.softmax_fisher_mean_probs(z, temperature=TAU, weights=shares, reduction="sum")
    _, lower = fk.softmax_fisher_project(
        z,
        z.amax(-1),
        shares.sqrt() * p.amax(-1) / TAU,
        z.new_zeros(V, 0),
        temperature=TAU,
        scale=1 / (D / TAU**2 + lam),
        gram=True,
    )
    assert torch.equal(found, found.mT)
    setting.close(found.tril(), lower)


def test_sample(backend: str, setting: Setting) -> None:
    x, w = setting.x, setting.weights
    g = torch.Generator(DEVICE).manual_seed(5)
    found = fk.head_fisher_sample(x.hidden, x.weight, g, **setting.given)
    g.manual_seed(5)
    expected = fk.softmax_fisher_sample(setting.z, g, **setting.softmax())
    assert torch.equal(found.labels, expected.labels)
    assert (found.labels[w == 0] == -100).all()
    setting.close(found.gradients, (setting.slope * expected.gradients) @ x.weight)
