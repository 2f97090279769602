"""Every op against the float64 truth, within twice the error of plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fisherkern as fk
from conftest import DEVICE, SLOW
from fisherkern import reference
from fisherkern.ops.covariance._common import PRECISIONS
from head_fisher import cases
from head_fisher.cases import DTYPES, IDS, PLACELESS, Op

# T, V, d: sizes on both sides of blocks, multiples of nothing, one, and none
SHAPES = [(0, 7, 5), (37, 1, 1), (1, 7, 130), (37, 7, 64), (1, 1031, 5), (37, 257, 65)]
SHAPES = [(0, 7, 5), (3, 1, 1), (11, 7, 5), (2, 70, 65)] if SLOW else [*SHAPES, (9, 1031, 130)]
# the head, what its tokens are counted by, and the temperature
HEADS: dict[str, tuple[dict[str, Any], str, float]] = {
    "linear": ({"bias": False}, "all", 1.0),
    "linear with bias": ({}, "mask", 1.0),
    "capped with bias": ({"softcap": 5.0}, "weights", 1.3),
    "capped": ({"bias": False, "softcap": 3.0}, "all", 0.7),
}


def counted(how: str, T: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """The argument that says how tokens count: at least one not at all, where there are several."""
    w = torch.rand(T, generator=cases.generator(T), dtype=torch.float64).to(DEVICE)
    w[1:2] = 0
    w[:1] = 0.75
    if how == "all":
        return {}
    return {how: w > 0.3 if how == "mask" else w.to(reference.accumulation_dtype(dtype))}


@pytest.mark.parametrize("head", list(HEADS)[1:3] if SLOW else HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", PLACELESS, **IDS)
def test_error_within_twice_that_of_pytorch(
    backend: str, op: Op, dtype: torch.dtype, head: str
) -> None:
    cases.require(backend, dtype)
    form, how, tau = HEADS[head]
    for T, V, d in SHAPES:
        count = min(T, 5) if op.matrices else T
        x = cases.make(count, V, d, dtype, seed=V, **form)
        cases.check(backend, op, x, temperature=tau, **counted(how, count, dtype))


@pytest.mark.parametrize("op", PLACELESS, **IDS)
def test_dtype_of_results(backend: str, op: Op) -> None:
    """Vectors for the backward pass are in the dtype of the hidden states, statistics are not."""
    for dtype in DTYPES[:3]:
        results = cases.tensors(op.raw(cases.make(3, 7, 5, dtype)))
        expected = dtype if op.short == "matvec" else torch.float32
        assert {x.dtype for x in results} == {expected}


@pytest.mark.parametrize("op", [op for op in PLACELESS if op.short in ("pullback", "gram")], **IDS)
def test_precisions(backend: str, op: Op) -> None:
    """TF32 keeps 10 bits of each factor; the others are as good as float32."""
    x = cases.make(2 if SLOW else 5, 70, 20, softcap=5.0)
    for precision in PRECISIONS:
        if precision == "tf32":
            assert cases.error(op.call(x, precision=precision), op.truth(x)[0]) <= 1e-3
        else:
            cases.check(backend, op, x, precision=precision)


def test_expected_embedding_is_made_where_it_is_asked_for(backend: str) -> None:
    x = cases.make(3, 7, 5)
    stats = fk.head_fisher_stats(x.hidden, x.weight, bias=x.bias)
    assert stats.expected_embedding is None
    more = fk.head_fisher_stats(x.hidden, x.weight, bias=x.bias, expected_embedding=True)
    cases.equal(tuple(stats[:-1]), tuple(more[:-1]))


@cases.softcaps(5.0)
@pytest.mark.parametrize("op", cases.OPS, **IDS)
def test_same_bits_on_every_run(backend: str, op: Op, softcap: float | None) -> None:
    T = 3 if SLOW else 5 if op.matrices else 70
    x = cases.make(T, *((70, 9) if SLOW else (1031, 130)), softcap=softcap)
    first = op.raw(x)
    for _ in range(1 if SLOW else 2):
        cases.equal(op.raw(x), first)
