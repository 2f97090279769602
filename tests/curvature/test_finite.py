"""Finiteness of several tensors at once."""

from __future__ import annotations

import math

import pytest
import torch

from fisherkern.curvature._finite import all_finite

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 500, 1000])
def test_one_bad_value(dtype: torch.dtype, bad: float, place: int) -> None:
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0)).to(dtype)
    fine = values.clone()
    values[place] = bad
    assert all_finite([fine, fine[::2]])
    assert not all_finite([fine, values])
    assert not all_finite([values[None].expand(3, -1)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_values_are_finite(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max
    assert all_finite(
        [torch.full((1000,), most, dtype=dtype), torch.tensor([-most, most], dtype=dtype)]
    )


def test_what_holds_no_floats_is_finite() -> None:
    assert all_finite([])
    assert all_finite([torch.empty(0), torch.arange(3)])
