"""The scaling contract: masks, weights, reductions, splits, shifts, temperature; for every op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fisherkern as fk
from conftest import SLOW
from softmax_fisher import cases
from softmax_fisher.cases import IDS, MEANS, OPS, PER_TOKEN, SUMS, Op

V = 65 if SLOW else 517
DTYPES = (torch.float32, torch.bfloat16)


def setting(op: Op, dtype: torch.dtype = torch.float32, T: int = 6) -> tuple[Tensor, list[Tensor]]:
    z = cases.logits((T, V), dtype, seed=T)
    return z, op.make(z, cases.generator(7))


def close(result: Any, expected: Any, slack: float = 8.0) -> None:
    for a, b in zip(cases.tensors(result), cases.tensors(expected), strict=True):
        assert a.dtype == b.dtype
        assert cases.error(a, b) <= slack * cases.EPSILON[a.dtype]


def equal(result: Any, expected: Any) -> None:
    for a, b in zip(cases.tensors(result), cases.tensors(expected), strict=True):
        assert torch.equal(a.nan_to_num(7.25), b.nan_to_num(7.25))


def rows_of(op: Op, operands: list[Tensor], index: Any) -> list[Tensor]:
    return [x[index] for x in operands]


def poisoned(z: Tensor, operands: list[Tensor], index: Any) -> tuple[Tensor, list[Tensor]]:
    """NaN in these rows of everything; labels out of range."""
    z, operands = z.clone(), [x.clone() for x in operands]
    z[index] = torch.nan
    for x in operands:
        if x.is_floating_point():
            x[index] = torch.nan
    return z, operands


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", PER_TOKEN, **IDS)
def test_masked_token_is_exactly_zero_and_disturbs_no_other(
    backend: str, op: Op, dtype: torch.dtype
) -> None:
    z, operands = setting(op, dtype)
    mask = torch.tensor([True, False, True, True, False, True], device=z.device)
    bad_z, bad_operands = poisoned(z, operands, ~mask)
    masked = cases.tensors(op.call(bad_z, *bad_operands, mask=mask))
    plain = cases.tensors(op.call(z, *operands))
    for a, b in zip(masked, plain, strict=True):
        assert torch.equal(a[mask], b[mask])
        assert (a[~mask] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [*SUMS, *MEANS], **IDS)
def test_masked_tokens_leave_the_sum_and_the_mean(backend: str, op: Op, dtype: torch.dtype) -> None:
    z, operands = setting(op, dtype)
    mask = torch.tensor([True, False, True, True, False, True], device=z.device)
    bad_z, bad_operands = poisoned(z, operands, ~mask)
    masked = op.call(bad_z, *bad_operands, mask=mask)
    close(masked, op.call(z[mask], *rows_of(op, operands, mask)))


@pytest.mark.parametrize("op", OPS, **IDS)
def test_mask_is_weights_of_zero_and_one(backend: str, op: Op) -> None:
    z, operands = setting(op)
    mask = torch.tensor([True, False, True, True, False, True], device=z.device)
    z, operands = poisoned(z, operands, ~mask)
    equal(
        op.call(z, *operands, mask=mask),
        op.call(z, *operands, weights=mask.to(torch.float32)),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", PER_TOKEN, **IDS)
def test_weight_multiplies_the_token(backend: str, op: Op, dtype: torch.dtype) -> None:
    z, operands = setting(op, dtype)
    w = torch.tensor([0.25, 4.0, 1.0, 16.0, 0.0, 0.0625], device=z.device)
    weighted = cases.tensors(op.call(z, *operands, weights=w))
    plain = cases.tensors(op.call(z, *operands))
    for a, b in zip(weighted, plain, strict=True):
        factor = (w**op.power).view(-1, *(1,) * (b.ndim - 1))
        close(a, (b.float() * factor).to(b.dtype), slack=1)


@pytest.mark.parametrize("op", [*SUMS, *MEANS], **IDS)
def test_weighted_sum_and_mean_are_those_of_the_truth(backend: str, op: Op) -> None:
    z, operands = setting(op)
    w = torch.tensor([0.3, 4.1, 1.0, 12.0, 0.0, 0.06], device=z.device)
    result = cases.tensors(op.call(z, *operands, weights=w))
    truth = cases.tensors(op.truth(z, *operands, weights=w))
    for a, b in zip(result, truth, strict=True):
        assert cases.error(a, b) <= 8 * cases.EPSILON[a.dtype]


@pytest.mark.parametrize("op", MEANS, **IDS)
def test_mean_is_scale_free_in_the_weights(backend: str, op: Op) -> None:
    z, operands = setting(op)
    w = torch.tensor([0.3, 4.1, 1.0, 12.0, 0.0, 0.06], device=z.device)
    close(op.call(z, *operands, weights=w), op.call(z, *operands, weights=1024 * w))


@pytest.mark.parametrize("op", OPS, **IDS)
def test_no_valid_token_gives_zeros(backend: str, op: Op) -> None:
    z, operands = setting(op)
    z, operands = poisoned(z, operands, slice(None))
    nothing = torch.zeros(6, dtype=torch.bool, device=z.device)
    for result in cases.tensors(op.call(z, *operands, mask=nothing)):
        assert (result == 0).all()


@pytest.mark.parametrize("op", SUMS, **IDS)
def test_sum_of_parts_is_the_sum_of_the_whole(backend: str, op: Op) -> None:
    z, operands = setting(op, T=7)
    whole = op.call(z, *operands)
    parts = [
        op.call(z[part], *rows_of(op, operands, part))
        for part in (slice(0, 1), slice(1, 4), slice(4, 7))
    ]
    close(parts[0] + parts[1] + parts[2], whole)


@pytest.mark.parametrize("op", PER_TOKEN, **IDS)
def test_a_token_does_not_depend_on_its_batch(backend: str, op: Op) -> None:
    z, operands = setting(op, T=7)
    whole = cases.tensors(op.call(z, *operands))
    part = cases.tensors(op.call(z[2:5], *rows_of(op, operands, slice(2, 5))))
    for a, b in zip(whole, part, strict=True):
        assert torch.equal(a[2:5], b)


@pytest.mark.parametrize("op", [op for op in OPS if "stats" not in op.name], **IDS)
def test_invariant_to_a_shift_of_the_logits(backend: str, op: Op) -> None:
    # multiples of 2^-10 below 2^13: the shift is exact in float32
    z, operands = setting(op)
    z = (z * 1024).round() / 1024
    close(op.call(z + 128, *operands), op.call(z, *operands), slack=1)


@pytest.mark.parametrize("op", OPS, **IDS)
def test_temperature_scales_the_logits(backend: str, op: Op) -> None:
    """softmax(z / τ) at τ is softmax of z / τ at 1, and F has the factor 1 / τ² besides."""
    z, operands = setting(op)
    at_two = cases.tensors(op.call(2 * z, *operands, temperature=2.0))
    at_one = cases.tensors(op.call(z, *operands))
    powers = {"mean_probs": (0,), "stats": (0, 0, 2, 4, 0), "gradient": (1,)}
    powers |= dict.fromkeys(("sqrt_matvec", "sqrt_rmatvec"), (1,))
    name = op.name.removeprefix("softmax_fisher_")
    for a, b, power in zip(at_two, at_one, powers.get(name, (2,)), strict=True):
        close(a, b / 2**power, slack=2)


def test_fisher_of_a_constant_vector_is_zero(backend: str) -> None:
    z = cases.logits((5, V), torch.float32, 4.0)
    assert fk.softmax_fisher_matvec(z, torch.full((V,), 3.0, device=z.device)).abs().max() < 1e-6


def test_matvec_is_symmetric_and_positive(backend: str) -> None:
    z = cases.logits((5, V), torch.float32, 4.0)
    u, v = cases.logits((5, V), torch.float32, seed=1), cases.logits((5, V), torch.float32, seed=2)
    fu, fv = fk.softmax_fisher_matvec(z, u), fk.softmax_fisher_matvec(z, v)
    close((u * fv).sum(-1), (v * fu).sum(-1), slack=64)
    quadratic = fk.softmax_fisher_quadratic(z, v)
    close((v * fv).sum(-1), quadratic, slack=64)
    assert (quadratic >= 0).all()


def test_square_root_squares_to_the_fisher(backend: str) -> None:
    z = cases.logits((5, V), torch.float32)
    v = cases.logits((5, V), torch.float32, seed=3)
    half = fk.softmax_fisher_sqrt_rmatvec(z, v)
    close(fk.softmax_fisher_sqrt_matvec(z, half), fk.softmax_fisher_matvec(z, v), slack=32)
    close(half.square().sum(-1), fk.softmax_fisher_quadratic(z, v), slack=32)


def test_trace_is_the_sum_of_the_diagonal_and_one_of_the_stats(backend: str) -> None:
    z = cases.logits((5, V), torch.float32)
    trace = fk.softmax_fisher_trace(z)
    close(trace, fk.softmax_fisher_diagonal(z).sum(-1))
    close(trace, fk.softmax_fisher_stats(z).trace)


def test_mean_probabilities_sum_to_one(backend: str) -> None:
    z = cases.logits((40, V), torch.float32)
    total = fk.softmax_fisher_mean_probs(z).double().sum().item()
    assert abs(total - 1) < 1e-6


def test_k_directions_are_pairs_of_directions(backend: str) -> None:
    z = cases.logits((3, V), torch.float32)
    a, b = cases.logits((3, V), torch.float32, seed=4), cases.logits((3, V), torch.float32, seed=5)
    covariance = fk.softmax_fisher_quadratic(z, torch.stack([a, b, a + b], -2))
    assert torch.equal(covariance, covariance.mT)
    close(covariance[:, 0, 0], fk.softmax_fisher_quadratic(z, a), slack=16)
    close(covariance[:, 1, 1], fk.softmax_fisher_quadratic(z, b), slack=16)
    close(covariance[:, 0, 1], (a * fk.softmax_fisher_matvec(z, b)).sum(-1), slack=256)
    close(covariance[:, 2, 2], fk.softmax_fisher_quadratic(z, a + b), slack=16)


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_ignored_label_is_a_masked_token(backend: str, ignore_index: int) -> None:
    z = cases.logits((6, V), torch.float32)
    labels = torch.tensor([1, ignore_index, 0, V - 1, ignore_index, 2], device=z.device)
    z[labels == ignore_index] = torch.nan
    mask = labels != ignore_index
    result = fk.softmax_fisher_gradient(z, labels, ignore_index=ignore_index)
    expected = fk.softmax_fisher_gradient(z[mask], labels[mask], ignore_index=-1)
    assert cases.agree(backend, result[mask], expected)
    assert (result[~mask] == 0).all()
