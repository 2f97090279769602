"""Labels y ~ p: the distribution, the seed, the tail, and the gradient that comes with them."""

from __future__ import annotations

import pytest
import torch

import fisherkern as fk
from conftest import BACKENDS, DEVICE, SLOW, serving
from fisherkern import reference
from softmax_fisher import cases

V = 65 if SLOW else 4099


def seeded(seed: int) -> torch.Generator:
    return torch.Generator(device=DEVICE).manual_seed(seed)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("seed", range(4))
def test_labels_are_those_of_the_reference(backend: str, seed: int, dtype: torch.dtype) -> None:
    cases.require(backend, dtype)
    z = cases.logits((2, 5, V), dtype, 3.0, seed)
    sample = fk.softmax_fisher_sample(z, seeded(seed), temperature=1.3)
    with serving("reference"):
        expected = fk.softmax_fisher_sample(z, seeded(seed), temperature=1.3)
    assert torch.equal(sample.labels, expected.labels)
    truth = reference.softmax_fisher_gradient(z.double(), sample.labels, temperature=1.3)
    assert cases.error(sample.gradients, truth) <= 4 * cases.SLACK[dtype] * cases.EPSILON[dtype]


def test_frequencies_are_the_probabilities(backend: str) -> None:
    """Chi-square of 24 classes, some rare, at the 1e-6 level of a fixed seed."""
    T = 200 if SLOW else 40_000
    row = cases.logits((24,), torch.float32, 1.0)
    sample = fk.softmax_fisher_sample(row.expand(T, 24), seeded(0))
    counts = torch.bincount(sample.labels.cpu(), minlength=24).double()
    expected = torch.softmax(row.double().cpu(), -1) * T
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert chi_square < 80  # 23 degrees of freedom


def test_outer_product_of_gradients_is_the_fisher(backend: str) -> None:
    T = 400 if SLOW else 40_000
    row = cases.logits((6,), torch.float32, 1.0)
    g = fk.softmax_fisher_sample(row.expand(T, 6), seeded(1)).gradients.double()
    p = torch.softmax(row.double(), -1)
    fisher = p.diag() - p.outer(p)
    assert (g.T @ g / T - fisher).abs().max() < 3 / T**0.5 * 0.5


def test_classes_below_the_resolution_of_float32_are_drawn_in_proportion(backend: str) -> None:
    """p = 2⁻²⁶ each for half the mass: float32 uniforms could only hit a quarter of them."""
    p = torch.cat([torch.full((1,), 0.5), torch.full((2048,), 0.5 / 2048)])
    T = 30 if SLOW else 2000
    z = p.log().to(DEVICE).expand(T, 2049)
    labels = fk.softmax_fisher_sample(z, seeded(2)).labels
    rare = (labels > 0).double().mean().item()
    assert abs(rare - 0.5) < 4 * (0.25 / T) ** 0.5


def test_impossible_classes_are_never_drawn(backend: str) -> None:
    T = 50 if SLOW else 3000
    z = torch.full((T, V), -torch.inf, device=DEVICE)
    z[:, 7] = 0.0
    z[:, V - 2] = 0.0
    labels = fk.softmax_fisher_sample(z, seeded(3)).labels
    assert set(labels.tolist()) == {7, V - 2}


def test_masked_and_nan_rows_have_no_label(backend: str) -> None:
    z = cases.logits((4, V), torch.float32)
    z[1] = torch.nan
    z[2] = torch.nan
    mask = torch.tensor([True, False, True, True], device=DEVICE)
    sample = fk.softmax_fisher_sample(z, seeded(4), mask=mask)
    assert (sample.labels == -100).tolist() == [False, True, True, False]
    assert (sample.gradients[1] == 0).all()
    assert sample.gradients[2].isnan().all()


def test_weights_multiply_the_gradient_and_leave_the_label(backend: str) -> None:
    z = cases.logits((4, V), torch.float32)
    w = torch.tensor([2.0, 0.5, 4.0, 1.0], device=DEVICE)
    plain = fk.softmax_fisher_sample(z, seeded(5))
    weighted = fk.softmax_fisher_sample(z, seeded(5), weights=w)
    assert torch.equal(plain.labels, weighted.labels)
    assert torch.equal(plain.gradients * w[:, None], weighted.gradients)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_over_the_logits_and_into_out(backend: str, dtype: torch.dtype) -> None:
    z = cases.logits((3, V), dtype)
    expected = fk.softmax_fisher_sample(z, seeded(6))
    out = torch.empty_like(z)
    into = fk.softmax_fisher_sample(z, seeded(6), out=out)
    assert into.gradients is out
    over = fk.softmax_fisher_sample_(z, seeded(6))
    assert over.gradients is z
    for sample in (into, over):
        assert torch.equal(sample.labels, expected.labels)
        assert torch.equal(sample.gradients, expected.gradients)


def test_seed_gives_the_same_bits_and_another_seed_others(backend: str) -> None:
    z = cases.logits((64, 16), torch.float32, 0.1)
    first, again, other = (fk.softmax_fisher_sample(z, seeded(s)) for s in (7, 7, 8))
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.gradients, again.gradients)
    assert not torch.equal(first.labels, other.labels)


def test_default_generator_follows_the_global_seed(backend: str) -> None:
    z = cases.logits((64, 16), torch.float32, 0.1)
    torch.manual_seed(3)
    first = fk.softmax_fisher_sample(z).labels
    second = fk.softmax_fisher_sample(z).labels
    torch.manual_seed(3)
    assert torch.equal(fk.softmax_fisher_sample(z).labels, first)
    assert not torch.equal(second, first)


def test_logits_that_require_grad_give_detached_results(backend: str) -> None:
    z = cases.logits((2, 5), torch.float32).requires_grad_()
    sample = fk.softmax_fisher_sample(z, seeded(0))
    assert not sample.gradients.requires_grad


def test_philox_is_the_published_generator() -> None:
    """Known answers of Random123 for Philox-4x32-10, key and counter zero."""
    u = reference.philox_uniform(torch.tensor(0), torch.tensor([0]))
    words = 0x6627E8D5, 0xE169C58D
    assert u.item() == ((words[0] >> 5) * 2**26 + (words[1] >> 6)) / 2**53


def test_philox_numbers_are_uniform_and_distinct() -> None:
    u = reference.philox_uniform(torch.tensor(12345678901), torch.arange(200_000))
    assert u.unique().numel() == u.numel()
    histogram = torch.histc(u.float(), 64, 0, 1)
    assert ((histogram - 3125).square() / 3125).sum() < 140  # chi-square, 63 degrees
    assert BACKENDS
