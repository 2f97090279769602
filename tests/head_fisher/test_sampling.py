"""Labels y ~ p and gradients in the hidden states: the definition, the distribution, the seed."""

from __future__ import annotations

import pytest
import torch

import fisherkern as fk
from conftest import DEVICE, SLOW
from fisherkern import reference
from head_fisher import cases

SHAPES = [(5, 1, 1), (5, 70, 9)] if SLOW else [(37, 1, 1), (37, 7, 64), (37, 1031, 65)]

MANY = 12 if SLOW else 64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def key(seed: int) -> torch.Tensor:
    """What an op draws from this generator."""
    return torch.randint(2**63 - 1, (1,), device=DEVICE, generator=seeded(seed))


@cases.softcaps(5.0)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_labels_and_gradients_are_those_of_the_definition(
    backend: str, dtype: torch.dtype, softcap: float | None
) -> None:
    cases.require(backend, dtype)
    tau = 1.3
    accumulation = reference.accumulation_dtype(dtype)
    for T, V, d in SHAPES:
        x = cases.make(T, V, d, dtype, softcap=softcap, seed=V)
        w = torch.rand(T, generator=cases.generator(1), dtype=torch.float64).to(DEVICE)
        w[1] = 0
        w = w.to(accumulation)
        given = {"bias": x.bias, "softcap": softcap, "temperature": tau, "weights": w}
        labels, gradients = fk.head_fisher_sample(x.hidden, x.weight, seeded(V), **given)
        assert (labels.dtype, gradients.dtype) == (torch.int64, dtype)
        assert (labels == -100).tolist() == (w == 0).tolist()

        wide = x.to(torch.float64)
        z, slope = reference.head_logits(wide.hidden, wide.weight, wide.bias, softcap)
        counts = w != 0
        y = labels.clamp(min=0)[:, None]
        # inversion: u lies in the interval of the label, whose ends are rounded as the logits are
        u = reference.philox_uniform(key(V), torch.arange(T, device=DEVICE))
        ends = torch.softmax(z / tau, -1).cumsum(-1)
        upper = ends.gather(1, y)[:, 0]
        lower = upper - torch.softmax(z / tau, -1).gather(1, y)[:, 0]
        slack = 4 * z.abs().max().item() / tau * cases.EPSILON[accumulation]
        assert ((lower - slack <= u) & (u <= upper + slack))[counts].all()

        def pulled(rows: torch.Tensor, head: cases.Inputs = x) -> torch.Tensor:
            if backend not in cases.CPU_BACKENDS:
                rows = rows.to(dtype).to(rows.dtype)
            return rows @ head.weight.to(rows.dtype)

        (hot,) = (torch.nn.functional.one_hot(labels.clamp(min=0), V),)
        p = torch.softmax(z / tau, -1)
        truth = (w[:, None] * slope * (p - hot) / tau) @ wide.weight
        p, slope = torch.softmax(z.to(accumulation) / tau, -1), slope.to(accumulation)
        plain = pulled(w[:, None] * slope * (p - hot) / tau).to(dtype)
        rounding = cases.SLACK[dtype] * cases.EPSILON[dtype]
        assert cases.error(gradients, truth) <= 2 * cases.error(plain, truth) + rounding


@cases.softcaps(2.0)
def test_outer_product_of_gradients_is_the_pullback(backend: str, softcap: float | None) -> None:
    """E g = 0 and E g gᵀ = w² M, to five standard errors of T draws."""
    T = 100 if SLOW else 40_000
    x = cases.make(1, 6, 3, softcap=softcap, scale=1.0)
    weights = torch.full((T,), 2.0, device=DEVICE)
    given = {"bias": x.bias, "softcap": softcap, "temperature": 0.8}
    g = fk.head_fisher_sample(
        x.hidden.expand(T, -1), x.weight, seeded(1), weights=weights, **given
    ).gradients.double()
    M = 4 * reference.head_fisher_pullback(x.hidden.double(), x.weight.double(), **given)
    outer = g[:, :, None] * g[:, None, :]
    for values, mean in ((g, torch.zeros(3, device=DEVICE)), (outer, M)):
        assert ((values.mean(0) - mean).abs() <= 5 * values.std(0) / T**0.5).all()


def test_masked_and_nan_rows_have_no_label(backend: str) -> None:
    x = cases.make(4, 33, 5)
    x.hidden[1:3] = torch.nan
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    sample = fk.head_fisher_sample(x.hidden, x.weight, seeded(4), mask=mask)
    assert (sample.labels == -100).tolist() == [False, True, True, False]
    assert (sample.gradients[1] == 0).all()
    assert sample.gradients[2].isnan().all()
    assert sample.gradients[[0, 3]].isfinite().all()


def test_impossible_classes_are_never_drawn(backend: str) -> None:
    T, V = (20, 65) if SLOW else (2000, 517)
    x = cases.make(T, V, 4, scale=0.1)
    bias = torch.full((V,), -torch.inf, device=DEVICE)
    bias[[7, V - 2]] = 0
    labels = fk.head_fisher_sample(x.hidden, x.weight, seeded(3), bias=bias).labels
    assert set(labels.tolist()) == {7, V - 2}


def test_seed_gives_the_same_bits_and_another_seed_others(backend: str) -> None:
    x = cases.make(MANY, 16, 4, scale=0.1)
    first, again, other = (fk.head_fisher_sample(x.hidden, x.weight, seeded(s)) for s in (7, 7, 8))
    cases.equal(first, again)
    assert not torch.equal(first.labels, other.labels)


def test_default_generator_follows_the_global_seed(backend: str) -> None:
    x = cases.make(MANY, 16, 4, scale=0.1)
    torch.manual_seed(3)
    first = fk.head_fisher_sample(x.hidden, x.weight).labels
    second = fk.head_fisher_sample(x.hidden, x.weight).labels
    torch.manual_seed(3)
    assert torch.equal(fk.head_fisher_sample(x.hidden, x.weight).labels, first)
    assert not torch.equal(second, first)
