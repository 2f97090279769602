"""Packing, averaging and the schedule around cuBLAS, on the emulated CUDA kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from covariance import cases
from cuda_emulation import build
from torch import Tensor

import fisherkern as fk
from conftest import serving
from fisherkern import reference
from fisherkern.ops import _cuda_kernels, _reference_kernels

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "can be built")


@pytest.fixture(scope="module")
def native() -> build.Emulated:
    emulated, reason = build.load()
    assert emulated is not None, reason
    return emulated


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    x = torch.randn(shape, generator=cases.generator(seed), dtype=torch.float64)
    return x.to(dtype)


def packed(
    native: build.Emulated,
    x: Tensor,
    *,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    bias: bool = False,
    squares: bool = False,
    first: int = 0,
    tokens: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    heads, batches, length, columns = x.shape
    tokens = batches * length - first if tokens is None else tokens
    row = -(-(columns + bias) // 8) * 8
    panel = torch.full((heads, tokens, row), torch.nan, dtype=dtype)
    native.covariance_pack(x, mask, weights, bias, squares, first, panel)
    return panel


# ---- pack ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 8, 37])
def test_float32_panels(native: build.Emulated, dtype: torch.dtype, columns: int) -> None:
    x = random(2, 3, 5, columns, dtype=dtype)
    value = x.flatten(1, 2).float()
    panel = packed(native, x)
    assert torch.equal(panel[..., :columns], value)
    assert (panel[..., columns:] == 0).all()
    assert torch.equal(packed(native, x, squares=True)[..., :columns], value.square())


def test_weights_bias_and_token_range(native: build.Emulated) -> None:
    """x̃ in the order of the tokens, from the middle of one batch to the middle of another."""
    x = random(2, 3, 5, 11)
    w = random(1, 3, 5, seed=1).abs().expand(2, -1, -1)
    panel = packed(native, x, weights=w, bias=True, squares=True, first=3, tokens=9)
    rows = torch.cat([x.square(), torch.ones(2, 3, 5, 1)], -1) * w[..., None]
    assert torch.equal(panel[..., :12], rows.flatten(1, 2)[:, 3:12])
    assert (panel[..., 12:] == 0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_tokens_that_do_not_count_are_not_read(native: build.Emulated, poison: float) -> None:
    x = random(1, 2, 6, 9)
    mask = random(1, 2, 6, seed=1) > 0
    x[~mask] = poison
    expected = torch.where(mask[..., None], x, 0.0).flatten(1, 2)
    weights = mask.float()
    for given in ({"mask": mask}, {"weights": weights}):
        panel = packed(native, x, **given)
        assert torch.equal(panel[..., :9], expected)
        assert (panel[..., 9:] == 0).all()
    weights[mask] = torch.nan
    panel = packed(native, x, weights=weights, bias=True)
    assert panel[mask.flatten(1)][:, :10].isnan().all()
    assert (panel[..., 10:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_panels(native: build.Emulated, dtype: torch.dtype) -> None:
    x = random(2, 3, 4, 13, dtype=dtype)
    mask = random(2, 3, 4, seed=1) > 0
    panel = packed(native, x, mask=mask, bias=True, dtype=dtype)
    rows = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    assert torch.equal(panel[..., :14], torch.where(mask[..., None], rows, 0).flatten(1, 2))
    assert (panel[..., 14:] == 0).all()


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_rows_of_any_alignment(native: build.Emulated, offset: int) -> None:
    whole = random(2, 3, 5, 40, dtype=torch.bfloat16)
    x = whole.transpose(0, 2)[..., offset : offset + 33]
    panel = packed(native, x, dtype=torch.bfloat16)
    assert torch.equal(panel[..., :33], x.flatten(1, 2))


def test_panel_that_cannot_hold_the_value_is_refused(native: build.Emulated) -> None:
    x = random(1, 1, 2, 8, dtype=torch.float16)
    with pytest.raises(RuntimeError, match="covariance_pack"):
        packed(native, x, squares=True, dtype=torch.float16)


# ---- update -------------------------------------------------------------------------------------


def padded(x: Tensor, columns: int) -> Tensor:
    """The same values with longer rows in memory."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + columns), torch.nan, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extra", [0, 3, 4])
@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_factor_update(
    native: build.Emulated, beta: float, lower: bool, extra: int, dtype: torch.dtype
) -> None:
    """In place, inside the tile alone; a beta of zero does not read."""
    tile = padded(random(2, 9, 21), extra)
    alpha = torch.tensor([0.3], dtype=dtype)
    start = random(2, 30, 30, dtype=dtype, seed=1)
    inside = torch.zeros(30, 30, dtype=torch.bool)
    inside[15:24, 4:25] = True
    if lower:
        inside &= torch.ones_like(inside).tril()
    if beta == 0:
        start[:, inside] = torch.nan
    factor = padded(start, extra)
    native.factor_update(tile, alpha, beta, 15, 4, lower, False, factor)
    new = torch.zeros(2, 30, 30, dtype=torch.float64)
    new[:, 15:24, 4:25] = alpha.double() * tile.double()
    old = beta * start.double() if beta else 0.0
    torch.testing.assert_close(factor, torch.where(inside, old + new, start).to(dtype))
    assert torch.equal(factor[:, ~inside], start[:, ~inside])


@pytest.mark.parametrize("extra", [0, 3])
def test_squares_are_summed_over_the_samples(native: build.Emulated, extra: int) -> None:
    tile, alpha = padded(random(7, 5, 18), extra), torch.tensor([0.5])
    start = random(1, 8, 18, seed=1)
    factor = start.clone()
    native.factor_update(tile, alpha, 0.25, 2, 0, False, True, factor)
    expected = start.double()
    expected[:, 2:7] = 0.25 * expected[:, 2:7] + 0.5 * tile.double().square().sum(0)
    torch.testing.assert_close(factor[:, 2:7], expected[:, 2:7].float())
    assert torch.equal(factor[:, 7:], start[:, 7:])
    assert torch.equal(factor[:, :2], start[:, :2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 31, 32, 33, 100])
def test_mirror(native: build.Emulated, width: int, dtype: torch.dtype) -> None:
    start = random(3, width, width, dtype=dtype)
    for strided in (start.clone(), start.mT.contiguous().mT, padded(start, 3)):
        native.mirror(strided)
        assert torch.equal(strided, start.tril() + start.tril(-1).mT)


# ---- schedule -----------------------------------------------------------------------------------


class Recorded:
    """The emulated ops, how often they were called, and the most bytes of their operands."""

    def __init__(self, native: build.Emulated, sides: int = 2) -> None:
        self.native = native
        self.sides = sides
        self.panels: list[int] = []
        self.tiles = 0
        self.most = 0

    def covariance_pack(self, *arguments: Any) -> None:
        self.panels.append(arguments[-1].nbytes)
        self.native.covariance_pack(*arguments)

    def factor_update(self, tile: Tensor, *arguments: Any) -> None:
        self.tiles += 1
        operands = sum(self.panels[-self.sides :]) + tile.untyped_storage().nbytes()
        self.most = max(self.most, operands)
        self.native.factor_update(tile, *arguments)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    """A workspace that a hundred tokens exceed, and blocks of a few rows; its size in bytes."""
    monkeypatch.setattr(_cuda_kernels, "WORKSPACE", 24 << 10)
    monkeypatch.setattr(_cuda_kernels, "MIN_TOKENS", 8)
    monkeypatch.setattr(_cuda_kernels, "BLOCK", 24)
    return 24 << 10


def updated(kernels: Any, name: str, *arguments: Any, shape: tuple[int, ...]) -> Tensor:
    factor = random(*shape, seed=9)
    getattr(kernels, name)(*arguments, factor)
    return factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", ["all", "mask", "weights"])
def test_symmetric_in_pieces(
    native: build.Emulated, small: int, given: str, dtype: torch.dtype
) -> None:
    """Heads, tokens and rows of the triangle are all cut, and nothing exceeds the workspace."""
    x = random(3, 41, 5, 67, dtype=dtype)
    mask = (random(123, seed=1) > 0) if given == "mask" else None
    weights = random(123, seed=1).abs() if given == "weights" else None
    arguments = (x, mask, weights, torch.tensor([0.01]), 0.5, True, "tf32x3")
    sides = 2 if given == "weights" else 1
    recorded = Recorded(native, sides)
    kernels = _cuda_kernels.Kernels(recorded)
    result = updated(kernels, "covariance_update", *arguments, shape=(5, 68, 68))
    expected = updated(_reference_kernels, "covariance_update", *arguments, shape=(5, 68, 68))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(result.triu(1), expected.triu(1))
    assert recorded.tiles >= 3 * 5 * 2, "blocks of rows, heads and ranges of tokens"
    assert small / 2 < recorded.most <= small


@pytest.mark.parametrize("form", ["product", "squares", "samples"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("length", [7, 60])
def test_cross_in_pieces(
    native: build.Emulated, small: int, length: int, weighted: bool, form: str
) -> None:
    """Also samples that are longer than a panel."""
    x, g = random(9, length, 50), random(9, length, 75, seed=1)
    weights = random(9 * length, seed=2).abs() if weighted else None
    alpha = torch.tensor([1 / length])
    arguments = (x, g, None, weights, alpha, 0.5, True, form, "tf32x3")
    recorded = Recorded(native)
    kernels = _cuda_kernels.Kernels(recorded)
    result = updated(kernels, "cross_update", *arguments, shape=(75, 51))
    expected = updated(_reference_kernels, "cross_update", *arguments, shape=(75, 51))
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert recorded.tiles > 1
    # two tiles where a sample has sums of its own
    assert small / 4 < recorded.most <= small


@pytest.mark.parametrize(
    ("rows", "budget", "expected"),
    [
        (2048, 1 << 25, 2048),
        (2049, 1 << 25, 2056),  # a bias
        (4097, 1 << 25, 1368),  # two are more than 32 MiB
        (4097, 1 << 26, 2056),
        (8192, 1 << 25, 1024),
        (5, 1, 8),
    ],
)
def test_blocks_of_the_triangle_are_even(rows: int, budget: int, expected: int) -> None:
    columns = -(-rows // 8) * 8
    assert _cuda_kernels._tile_rows(rows, columns, budget, 2048) == expected
    assert expected * columns * 4 <= budget or expected == 8


def test_half_precision_rows_are_multiplied_where_they_lie(native: build.Emulated) -> None:
    """A head of a batch is an operand as it is; expanded, odd or masked rows are packed."""
    alpha, factor = torch.ones(1), torch.empty(2, 16, 16)

    def panels(x: Tensor, mask: Tensor | None = None) -> int:
        recorded = Recorded(native)
        kernels = _cuda_kernels.Kernels(recorded)
        kernels.covariance_update(x, mask, None, alpha, 0.0, False, "tf32x3", factor)
        expected = reference.covariance(x.double(), mask=mask, heads=True, reduction="sum")
        torch.testing.assert_close(factor.tril(), expected.tril().float(), rtol=1e-5, atol=1e-5)
        return len(recorded.panels)

    whole = random(3, 8, 2, 40, dtype=torch.bfloat16)
    assert panels(whole[..., :16]) == 0
    assert panels(whole[..., 8:24].half()) == 0
    assert panels(whole[:, :5, :, :16]) == 1, "two strides of tokens"
    assert panels(whole[..., 1:17]) == 1, "not aligned"
    assert panels(whole[:1, :1, :, :16].expand(1, 8, 2, 16)) == 1, "one row eight times"
    assert panels(whole[..., :16], torch.ones(3, 8, dtype=torch.bool)) == 1


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_autocast_of_a_model_does_not_reach_the_products(precision: str) -> None:
    x = random(64, 40)
    before = torch.backends.cuda.matmul.fp32_precision
    with serving("emulated"), torch.autocast("cpu", dtype=torch.bfloat16):
        result = fk.covariance(x, precision=precision)
    assert cases.error(result, reference.covariance(x.double())) < 4e-7
    assert torch.backends.cuda.matmul.fp32_precision == before


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("ieee", "ieee"), ("tf32x3", "ieee"), ("bf16x6", "ieee"), ("tf32", "tf32")],
)
def test_cublas_has_tf32_only_where_it_was_named(
    monkeypatch: pytest.MonkeyPatch, precision: str, expected: str
) -> None:
    """Whatever the user chose for their own products, which is as it was afterwards."""
    matmul: Any = torch.backends.cuda.matmul
    multiply, seen = torch.bmm, []

    def recorded(*operands: Tensor) -> Tensor:
        seen.append(matmul.fp32_precision)
        return multiply(*operands)

    monkeypatch.setattr(torch, "bmm", recorded)
    before = matmul.fp32_precision
    for users in ("ieee", "tf32"):
        try:
            matmul.fp32_precision = users
            with serving("emulated"):
                fk.covariance(random(20, 40), precision=precision)
            assert matmul.fp32_precision == users
        finally:
            matmul.fp32_precision = before
    assert set(seen) == {expected}


def test_results_do_not_depend_on_the_schedule(native: build.Emulated) -> None:
    x, w = random(2, 30, 3, 45), random(60, seed=1).abs()
    kernels = _cuda_kernels.Kernels(native)
    results = []
    for seed in range(4):
        native.seed(seed)
        factor = random(3, 46, 46, seed=2)
        kernels.covariance_update(x, None, w, torch.ones(1), 0.5, True, "tf32x3", factor)
        kernels.mirror(factor)
        results.append(factor)
    assert all(torch.equal(result, results[0]) for result in results)
