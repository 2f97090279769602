"""Inverses of damped factors, by each method."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fisherkern.optim import _inverse
from fisherkern.optim._inverse import damped_inverse, inverse_free
from optim.cases import error, generator

N = 24
EPSILON = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


def factor(condition: float, seed: int = 0) -> Tensor:
    """Eigenvalues from 1 down to 1 / condition, in float64."""
    g = generator(seed)
    Q = torch.linalg.qr(torch.randn(N, N, generator=g, dtype=torch.float64))[0]
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), N, dtype=torch.float64)
    F = (Q * values) @ Q.mT
    return (F + F.mT) / 2


def damped(F: Tensor, damping: float) -> Tensor:
    return F.double() + damping * torch.eye(N, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("damping", [1e-1, 1e-3, 1e-5])
@pytest.mark.parametrize("method", [damped_inverse, inverse_free])
def test_error_is_that_of_the_condition_number(
    method: object, damping: float, dtype: torch.dtype
) -> None:
    """An inverse loses κ roundings; "inverse-free" aims at 1e-5 and 1e-10 where it is less."""
    F = factor(1e8).to(dtype)
    inverse = method(F, damping)  # type: ignore[operator]
    aim = _inverse._AIM[dtype] if method is inverse_free else 0.0
    bound = 10 * max(EPSILON[dtype] / damping, aim)
    assert inverse.dtype == dtype
    assert error(inverse, torch.linalg.inv(damped(F, damping))) < bound


def iterations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts residuals, one for a start and one per iteration."""
    calls = [0]
    residual = _inverse._residual

    def counted(M: Tensor, X: Tensor) -> Tensor:
        calls[0] += 1
        return residual(M, X)

    monkeypatch.setattr(_inverse, "_residual", counted)
    return calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_near_start_saves_iterations(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It need not commute with the factor: other eigenvectors, and a condition number of 10⁴."""
    damping = 1e-4
    old, other = factor(1e8), factor(1e8, seed=1)
    F = (0.9999 * old + 0.0001 * other).to(dtype)
    start = torch.linalg.inv(damped(old, damping)).to(dtype)
    truth = torch.linalg.inv(damped(F, damping))
    assert error(start, truth) > 0.01
    calls = iterations(monkeypatch)
    warm = inverse_free(F, damping, start)
    assert calls[0] <= 7
    calls[0] = 0
    cold = inverse_free(F, damping)
    assert calls[0] > 14  # about log2 of the condition number
    bound = 10 * max(EPSILON[dtype] / damping, _inverse._AIM[dtype])
    assert error(warm, truth) < bound
    assert error(cold, truth) < bound


@pytest.mark.parametrize("start", ["far", "nan"])
def test_a_start_that_is_of_no_use(start: str) -> None:
    F = factor(1e8)
    given = torch.eye(N, dtype=torch.float64) * (1e3 if start == "far" else torch.nan)
    assert torch.equal(inverse_free(F, 1e-2, given), inverse_free(F, 1e-2))


@pytest.mark.parametrize("method", ["cholesky", "inverse-free"])
def test_float64_follows(method: str) -> None:
    """Where float32 loses the damping beside the factor."""
    F, damping = torch.full((8, 8), 2.0**20), 2.0**-6
    single = F + damping * torch.eye(8)
    assert torch.equal(single, F)
    if method == "cholesky":
        assert torch.linalg.cholesky_ex(single).info != 0
        inverse = damped_inverse(F, damping)
    else:
        assert _inverse._newton_schulz(single, None)[1] > _inverse._TAKEN
        inverse = inverse_free(F, damping)
    # Sherman and Morrison; float64 and a condition number of 5e8
    truth = (torch.eye(8).double() - 2.0**20 / (8 * 2.0**20 + damping)) / damping
    assert inverse.dtype == torch.float32
    assert error(inverse, truth) < 1e-6


@pytest.mark.parametrize("method", [damped_inverse, inverse_free])
def test_what_has_no_inverse(method: object) -> None:
    F = torch.diag(torch.tensor([2.0, -0.5]))
    message = "a factor with an eigenvalue of -0.5 is damped by 0.1; it takes more than 0.5"
    with pytest.raises(torch.linalg.LinAlgError, match=message):
        method(F, 0.1)  # type: ignore[operator]
    with pytest.raises(torch.linalg.LinAlgError, match="the factor holds NaN or infinity"):
        method(torch.full((2, 2), torch.nan), 0.1)  # type: ignore[operator]
