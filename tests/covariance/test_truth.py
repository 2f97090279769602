"""Errors against float64: at most twice those of a plain product, over shapes and options."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fisherkern as fk
from conftest import DEVICE, SLOW
from covariance import cases
from covariance.cases import IDS, OPS, Op
from fisherkern import reference
from fisherkern.ops.covariance._common import PRECISIONS

# d on both sides of the sizes of tiles, T of those of segments; the large ones only where they cost
# no minutes
WIDTHS = (1, 3, 40, 127) if SLOW else (1, 3, 64, 127, 128, 129, 576, 768, 1024)
TOKENS = (1, 7, 65) if SLOW else (1, 5, 129, 1000)
TOKENS_OF_WIDE = (5, 300)
LARGE = [] if SLOW else [(300, 4095), (64, 4096), (8192, 64), (8192, 193)]


def activations(T: int, d: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(T, d, generator=cases.generator(T + d), dtype=torch.float64)
    # coordinates of unequal size, as those of a model are, and a mean that is not zero
    x = x * torch.logspace(-1, 1, d, dtype=torch.float64) + 0.3
    return x.to(dtype).to(DEVICE)


def plain(x: Tensor, w: Tensor | None, beta: float, factor: Tensor, bias: bool) -> Tensor:
    """What a user writes: a masked copy, a bias column, a product, a moving average."""
    x = x.to(factor.dtype)
    if bias:
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    scaled = x if w is None else x * w.to(x.dtype)[:, None]
    count = len(x) if w is None else w.sum()
    return beta * factor + (1 - beta) * (scaled.T @ x) / count


def check(T: int, d: int, dtype: torch.dtype, which: str, bias: bool, beta: float) -> None:
    x = activations(T, d, dtype)
    accumulation = reference.accumulation_dtype(dtype)
    drawn = torch.rand(T, generator=cases.generator(1), dtype=torch.float64).to(DEVICE)
    w = {"all": None, "mask": drawn > 0.3, "weights": drawn.to(accumulation)}[which]
    if w is not None:
        w[-1] = 1
    given = {} if w is None else {which: w}
    start = torch.randn(d + bias, 64, generator=cases.generator(2), dtype=torch.float64)
    start = (start @ start.T / 64).to(accumulation).to(DEVICE)
    truth = reference.covariance_update(
        start.double(), x.double(), ema_decay=beta, bias=bias, **given
    )
    result = fk.covariance_update_(start.clone(), x, ema_decay=beta, bias=bias, **given)
    torch.testing.assert_close(result, result.T, rtol=0, atol=0)
    reached = cases.error(plain(x, w, beta, start, bias), truth)
    allowed = 2 * reached + cases.SLACK[accumulation] * cases.EPSILON[accumulation]
    assert cases.error(result, truth) <= allowed


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
def test_error_within_twice_the_plain_one(backend: str, d: int, dtype: torch.dtype) -> None:
    cases.require(backend, dtype)
    for T in TOKENS if d < 500 else TOKENS_OF_WIDE:
        for which in ("all", "mask", "weights"):
            for bias in (False, True):
                check(T, d, dtype, which, bias, 0.95)


@pytest.mark.parametrize("dtype", cases.DTYPES[:2])
@pytest.mark.parametrize(("T", "d"), LARGE)
def test_error_at_large_shapes(backend: str, T: int, d: int, dtype: torch.dtype) -> None:
    if backend == "reference" and d > 1000:
        pytest.skip("the reference is the truth here, and slow")
    check(T, d, dtype, "mask", False, 0.95)
    check(T, d, dtype, "weights", True, 0.95)


@pytest.mark.skipif(SLOW, reason="minutes")
def test_many_tokens_with_heads_and_of_two_sides(backend: str) -> None:
    """So many that the C++ kernels share out tokens, where they else share out the result."""
    x = torch.randn(9000, 3, 20, generator=cases.generator(0)).to(DEVICE)
    g = torch.randn(9000, 33, generator=cases.generator(1)).to(DEVICE)
    w = torch.rand(9000, generator=cases.generator(2)).to(DEVICE)
    factor = torch.full((3, 20, 20), 2.0, device=DEVICE)
    fk.covariance_update_(factor, x, ema_decay=0.5, weights=w)
    for head in range(3):
        one = reference.covariance(x[:, head].double(), weights=w.double())
        assert cases.error(factor[head], 1 + one / 2) <= 1e-6
    cross = fk.cross_covariance(g, x[:, 0], weights=w)
    truth = reference.cross_covariance(g.double(), x[:, 0].double(), weights=w.double())
    assert cases.error(cross, truth) <= 1e-6


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("op", OPS, **IDS)
def test_every_op(backend: str, op: Op, reduction: str, dtype: torch.dtype) -> None:
    cases.require(backend, dtype)
    inputs = op.make(dtype)
    for given in ({}, {"mask": cases.some_tokens(op)}, {"weights": cases.some_weights(op, dtype)}):
        result = op.new(*inputs, reduction=reduction, scale=0.5, **given)
        truth = op.truth(*inputs, reduction=reduction, scale=0.5, **given)
        assert result.dtype == reference.accumulation_dtype(dtype)
        assert cases.error(result, truth) <= cases.bound(truth, 300, dtype)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precision_has_a_stated_error(backend: str, precision: str) -> None:
    """TF32 keeps 10 bits of each factor; the others are as good as float32."""
    x = activations(64, 40, torch.float32)
    truth = reference.covariance(x.double())
    error = cases.error(fk.covariance(x, precision=precision), truth)
    assert error <= (1e-3 if precision == "tf32" else 4e-7)


@pytest.mark.parametrize("length", [1, 3, 300])
def test_samples_longer_and_shorter_than_a_segment(backend: str, length: int) -> None:
    x = torch.randn(4, 70 if SLOW and length > 70 else length, 50, generator=cases.generator(0))
    g = torch.randn(*x.shape[:2], 33, generator=cases.generator(1)).to(DEVICE)
    x = x.to(DEVICE)
    D = torch.zeros(33, 50, device=DEVICE)
    fk.squared_gradient_update_(D, x, g, ema_decay=None, per_sample=True, reduction="sum")
    truth = reference.squared_gradient(x.double(), g.double(), per_sample=True, reduction="sum")
    assert cases.error(D, truth) <= 1e-6


def test_weights_are_not_rounded_into_half_precision(backend: str) -> None:
    """Weights near one that bfloat16 cannot tell from it: rounding w x would lose them."""
    x = activations(64, 40, torch.bfloat16)
    w = 1 + torch.linspace(0, 3e-3, 64, device=DEVICE)
    truth = reference.covariance(x.double(), weights=w.double(), reduction="sum")
    result = fk.covariance(x, weights=w, reduction="sum")
    assert cases.error(result, truth) <= 1e-6


def test_squares_of_weights_may_be_beyond_float32(backend: str) -> None:
    """Of samples of one token: (w g x)², where w² or g² alone is not a float32."""

    def diagonal(w: float, g: float) -> float:
        factor = torch.zeros(1, 1, device=DEVICE)
        x, gradients = torch.ones(2, 1, 1, device=DEVICE), torch.full((2, 1, 1), g, device=DEVICE)
        weights = torch.full((2, 1), w, device=DEVICE)
        how = {"ema_decay": 0.0, "per_sample": True, "reduction": "sum"}
        return fk.squared_gradient_update_(factor, x, gradients, weights=weights, **how).item()

    assert diagonal(1e-23, 1e15) == pytest.approx(2e-16, rel=1e-5)
    assert diagonal(1e20, 1e-20) == pytest.approx(2, rel=1e-5)
    assert diagonal(1e-23, float("nan")) != diagonal(1e-23, float("nan"))
