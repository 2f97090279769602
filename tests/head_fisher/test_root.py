"""The root of the pullback: R Rᵀ is M, columns by decreasing eigenvalue."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fisherkern as fk
from conftest import DEVICE, SLOW
from head_fisher import cases

T, V, d = (3, 70, 9) if SLOW else (12, 257, 33)
F32 = torch.float32


def root_and_pullback(
    lead: tuple[int, ...], reduction: str, dtype: torch.dtype, **arguments: Any
) -> tuple[Tensor, Tensor]:
    x = cases.make(lead, V, d, dtype, softcap=5.0)
    given = {"bias": x.bias, "softcap": x.softcap, "reduction": reduction, **arguments}
    R = fk.head_fisher_pullback_root(x.hidden, x.weight, **given)
    return R, fk.head_fisher_pullback(x.hidden, x.weight, **{"accuracy": "high", **given})


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_squares_to_the_pullback(backend: str, reduction: str, dtype: torch.dtype) -> None:
    cases.require(backend, dtype)
    w = torch.rand(T, generator=cases.generator(1)).to(DEVICE)
    w[1] = 0
    for arguments in ({"weights": w},) if SLOW else ({}, {"weights": w}, {"accuracy": "standard"}):
        R, M = root_and_pullback((T,), reduction, dtype, **arguments)
        assert (R.dtype, R.shape) == (M.dtype, M.shape)
        # R is rounded once, from float64
        rounding = cases.SLACK[M.dtype] * cases.EPSILON[M.dtype]
        assert cases.error(R.double() @ R.double().mT, M) <= rounding
        if "weights" in arguments and reduction == "none":
            assert (R[1] == 0).all()


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_columns_are_eigenvectors_in_decreasing_order(backend: str, reduction: str) -> None:
    R, M = (x.double() for x in root_and_pullback((2, 3), reduction, F32))
    squares = R.mT @ R
    values = squares.diagonal(dim1=-2, dim2=-1)
    largest = values[..., :1]
    assert (values.diff(dim=-1) <= 1e-6 * largest).all()
    assert ((squares - torch.diag_embed(values)).abs() <= 1e-6 * largest[..., None]).all()
    expected = torch.linalg.eigvalsh(M).flip(-1).clamp(min=0)
    assert ((values - expected).abs() <= 1e-6 * largest).all()
    # the first columns are the best factor of their rank: Eckart and Young
    k = d // 3
    rest = M - R[..., :k] @ R[..., :k].mT
    best = expected[..., k:].square().sum(-1).sqrt()
    assert torch.allclose(torch.linalg.matrix_norm(rest), best, rtol=1e-4)


def test_fewer_classes_than_coordinates(backend: str) -> None:
    """Rank V − 1: the other columns are zero but for rounding, never NaN."""
    x = cases.make(5, 4, 20)
    R = fk.head_fisher_pullback_root(x.hidden, x.weight, bias=x.bias)
    norms = R.norm(dim=0)
    assert (norms[:3] > 0.01).all()
    # the root of a rounding of M
    assert (norms[3:] <= 1e-3 * norms[0]).all()
