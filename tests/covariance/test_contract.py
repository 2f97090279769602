"""The scaling contract (docs/conventions.md) for every covariance op and back end."""

from __future__ import annotations

import pytest
import torch

import fisherkern as fk
from conftest import DEVICE, SLOW
from covariance import cases
from covariance.cases import IDS, OPS, SYMMETRIC, UPDATES, Op

F32 = torch.float32


def spoiled(op: Op, inputs: list[torch.Tensor], mask: torch.Tensor, value: float) -> list:
    copies = [x.clone() for x in inputs]
    for x in copies:
        x[~mask] = value
    return copies


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30])
@pytest.mark.parametrize("op", OPS, **IDS)
def test_masked_tokens_contribute_exactly_nothing(backend: str, op: Op, value: float) -> None:
    mask, inputs = cases.some_tokens(op), op.make(F32)
    expected = op.new(*inputs, mask=mask)
    assert expected.isfinite().all()
    assert torch.equal(op.new(*spoiled(op, inputs, mask, value), mask=mask), expected)
    w = cases.some_weights(op, F32)
    expected = op.new(*inputs, weights=w)
    assert torch.equal(op.new(*spoiled(op, inputs, w != 0, value), weights=w), expected)


@pytest.mark.parametrize("op", OPS, **IDS)
def test_strides_of_a_mask_and_of_weights_are_free(backend: str, op: Op) -> None:
    inputs, mask, w = op.make(F32), cases.some_tokens(op), cases.some_weights(op, F32)
    for name, values, others in (("mask", mask, ~mask), ("weights", w, w + 1)):
        strided = torch.stack([values, others], -1)[..., 0]
        assert torch.equal(op.new(*inputs, **{name: strided}), op.new(*inputs, **{name: values}))
    one = mask.new_ones(1).expand(mask.shape)
    assert torch.equal(op.new(*inputs, mask=one), op.new(*inputs, mask=one.contiguous()))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("op", OPS, **IDS)
def test_nothing_counts_gives_zeros(backend: str, op: Op, reduction: str) -> None:
    inputs = [torch.full_like(x, torch.nan) for x in op.make(F32)]
    none = torch.zeros(op.tokens, dtype=torch.bool, device=DEVICE)
    assert (op.new(*inputs, mask=none, reduction=reduction) == 0).all()
    assert (op.new(*inputs, weights=none.float(), reduction=reduction) == 0).all()
    empty = [x[:0] for x in inputs]
    assert (op.new(*empty, reduction=reduction) == 0).all()


@pytest.mark.parametrize("op", OPS, **IDS)
def test_nan_that_counts_is_seen(backend: str, op: Op) -> None:
    inputs = op.make(F32)
    mask = cases.some_tokens(op)
    bad = [x.clone() for x in inputs]
    bad[0][mask.nonzero()[0].tolist()] = torch.nan
    assert op.new(*bad, mask=mask).isnan().any()


@pytest.mark.parametrize("op", OPS, **IDS)
def test_mean_is_sum_over_the_count(backend: str, op: Op) -> None:
    inputs, w = op.make(F32), cases.some_weights(op, F32)
    ratio = op.truth(*inputs, weights=w, reduction="sum") / op.truth(*inputs, weights=w)
    total = op.new(*inputs, weights=w, reduction="sum").double()
    mean = op.new(*inputs, weights=w).double()
    assert cases.error(total, mean * ratio.nan_to_num()) < 1e-6


@pytest.mark.parametrize("op", OPS, **IDS)
def test_a_mask_is_weights_of_zero_and_one(backend: str, op: Op) -> None:
    inputs, mask = op.make(F32), cases.some_tokens(op)
    a, b = op.new(*inputs, mask=mask), op.new(*inputs, weights=mask.float())
    assert cases.error(a, b) < 1e-6


@pytest.mark.parametrize("op", OPS, **IDS)
def test_doubled_weights(backend: str, op: Op) -> None:
    inputs, w = op.make(F32), cases.some_weights(op, F32)
    factor = 2 if op.linear else 4
    once = op.new(*inputs, weights=w, reduction="sum")
    twice = op.new(*inputs, weights=2 * w, reduction="sum")
    assert cases.error(twice, factor * once) < 1e-6
    assert torch.equal(op.new(*inputs, weights=w, reduction="sum", scale=4.0), 4 * once)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("op", UPDATES, **IDS)
def test_three_batches_are_one(backend: str, op: Op, weighted: bool) -> None:
    inputs = op.make(F32)
    w = cases.some_weights(op, F32) if weighted else None
    whole = op.new(*inputs, reduction="sum", weights=w)
    factor = torch.zeros_like(whole)
    n = len(inputs[0])
    for part in (slice(0, 1), slice(1, 2), slice(2, n)):
        op.update(
            factor,
            *(x[part] for x in inputs),
            ema_decay=None,
            reduction="sum",
            weights=None if w is None else w[part],
            **op.options,
        )
    assert cases.error(factor, whole) < 1e-6


@pytest.mark.parametrize("op", OPS, **IDS)
def test_reruns_give_the_same_bits(backend: str, op: Op) -> None:
    inputs, w = op.make(F32), cases.some_weights(op, F32)
    assert torch.equal(op.new(*inputs, weights=w), op.new(*inputs, weights=w))


@pytest.mark.skipif(SLOW, reason="the interpreter and the emulation have no threads")
@pytest.mark.parametrize(("T", "d"), [(2000, 40), (2000, 400), (9000, 40)])
def test_threads_do_not_change_the_bits(backend: str, T: int, d: int) -> None:
    x = torch.randn(T, d, generator=cases.generator(0)).to(DEVICE)
    expected = fk.covariance(x)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert torch.equal(fk.covariance(x), expected) or backend == "reference"
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("op", SYMMETRIC, **IDS)
def test_symmetric_and_positive_semidefinite(backend: str, op: Op) -> None:
    factor = op.new(*op.make(F32), weights=cases.some_weights(op, F32))
    assert torch.equal(factor, factor.mT)
    eigenvalues = torch.linalg.eigvalsh(factor.double())
    assert (eigenvalues[..., 0] >= -4e-7 * eigenvalues[..., -1]).all()


@pytest.mark.parametrize("op", SYMMETRIC, **IDS)
def test_only_the_lower_triangle_is_read_and_written(backend: str, op: Op) -> None:
    inputs = op.make(F32)
    upper = torch.ones_like(op.new(*inputs), dtype=torch.bool).triu(1)
    start = torch.randn(upper.shape, generator=cases.generator(3)).to(DEVICE)
    poisoned = torch.where(upper, torch.nan, start)
    options = {**op.options, "ema_decay": 0.9}
    lower = op.update(poisoned.clone(), *inputs, mirror=False, **options)
    assert lower[upper].isnan().all()
    whole = op.update(poisoned.clone(), *inputs, **options)
    assert torch.equal(whole, whole.mT)
    assert torch.equal(fk.mirror_(lower), whole)
    for beta in (0.0, 0.9):
        options["ema_decay"] = beta
        empty = [x[:0] for x in inputs]
        decayed = op.update(poisoned.clone(), *empty, mirror=False, **options)
        assert decayed[upper].isnan().all()
        assert torch.equal(decayed[~upper], beta * start[~upper])


@pytest.mark.parametrize("op", UPDATES, **IDS)
def test_moving_average(backend: str, op: Op) -> None:
    inputs = op.make(F32)
    new = op.new(*inputs)
    start = torch.randn(new.shape, generator=cases.generator(3)).to(DEVICE)
    if op.symmetric:
        fk.mirror_(start)
    for beta in (0.5, 0.95):
        moved = op.update(start.clone(), *inputs, ema_decay=beta, **op.options)
        assert cases.error(moved, beta * start + (1 - beta) * new) < 1e-6
    assert torch.equal(op.update(start.clone(), *inputs, ema_decay=1.0, **op.options), start)
    added = op.update(start.clone(), *inputs, ema_decay=None, **op.options)
    assert cases.error(added, start + new) < 1e-6
    # nothing counts: the old value decays towards the zero of the contract
    none = torch.zeros(op.tokens, dtype=torch.bool, device=DEVICE)
    moved = op.update(start.clone(), *inputs, ema_decay=0.5, mask=none, **op.options)
    assert torch.equal(moved, 0.5 * start)
    empty = [x[:0] for x in inputs]
    moved = op.update(start.clone(), *empty, ema_decay=0.5, **op.options)
    assert torch.equal(moved, 0.5 * start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", UPDATES, **IDS)
def test_float64_factor(backend: str, op: Op, dtype: torch.dtype) -> None:
    """A factor in float64 takes narrower inputs: nothing is lost in many small steps."""
    inputs = op.make(dtype)
    factor = torch.zeros(op.truth(*inputs).shape, dtype=torch.float64, device=DEVICE)
    op.update(factor, *inputs, ema_decay=0.0, **op.options)
    assert cases.error(factor, op.truth(*inputs)) < 1e-6


def strided(x: torch.Tensor) -> list[torch.Tensor]:
    """The same values in other layouts."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan, device=x.device, dtype=x.dtype)
    wide[..., ::2] = x
    padded = torch.full((*x.shape[:-1], x.shape[-1] + 3), torch.nan, device=x.device, dtype=x.dtype)
    padded[..., 1:-2] = x
    first = x.transpose(0, 1).contiguous().transpose(0, 1)
    return [wide[..., ::2], padded[..., 1:-2], first]


@pytest.mark.parametrize("layout", range(3))
@pytest.mark.parametrize("op", OPS, **IDS)
def test_any_strides(backend: str, op: Op, layout: int) -> None:
    inputs = op.make(F32)
    others = [strided(x)[layout] for x in inputs]
    result, expected = op.new(*others), op.new(*inputs)
    assert cases.agree("triton", result, expected)


@pytest.mark.parametrize("op", OPS, **IDS)
def test_expanded_inputs(backend: str, op: Op) -> None:
    inputs = [x[:1].expand(x.shape) for x in op.make(F32)]
    assert cases.agree("triton", op.new(*inputs), op.new(*(x.contiguous() for x in inputs)))


@pytest.mark.parametrize("op", UPDATES, **IDS)
def test_any_strides_of_the_factor(backend: str, op: Op) -> None:
    inputs = op.make(F32)
    expected = op.new(*inputs)
    transposed = torch.full_like(expected, torch.nan).mT
    transposed = transposed.contiguous().mT
    assert not transposed.is_contiguous() or 1 in expected.shape[-2:]
    op.update(transposed, *inputs, ema_decay=0.0, **op.options)
    assert torch.equal(transposed, expected)
    shape = (*expected.shape[:-1], expected.shape[-1] + 5)
    padded = torch.full(shape, 7.0, device=DEVICE)
    op.update(padded[..., 2:-3], *inputs, ema_decay=0.0, **op.options)
    assert torch.equal(padded[..., 2:-3], expected)
    assert (padded[..., :2] == 7).all()
    assert (padded[..., -3:] == 7).all()
