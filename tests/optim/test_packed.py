"""Lower triangles folded into rectangles."""

from __future__ import annotations

import pytest
import torch

from fisherkern.optim._packed import packed, unpack_


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_there_and_back(n: int, dtype: torch.dtype) -> None:
    """Every value of the triangle travels once; what is above the diagonal stays as it was."""
    matrix = torch.randn(n, n, dtype=dtype, generator=torch.Generator().manual_seed(n))
    rectangle = packed(matrix)
    assert rectangle.numel() == n * (n + 1) // 2
    rows, columns = torch.tril_indices(n, n)
    assert torch.equal(rectangle.flatten().sort()[0], matrix[rows, columns].sort()[0])
    other = torch.full((n, n), 7.0, dtype=dtype)
    unpack_(other, rectangle)
    assert torch.equal(other, matrix.tril() + torch.full_like(other, 7.0).triu(1))


def test_nan_stays_where_it_is() -> None:
    matrix = torch.eye(5)
    matrix[3, 1] = matrix[1, 0] = torch.nan
    other = torch.zeros(5, 5)
    unpack_(other, packed(matrix))
    assert torch.equal(other.isnan(), matrix.isnan())
