"""Rows with nearly all mass on one class: what accuracy="high" is for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import fisherkern as fk
from conftest import DEVICE, SLOW
from fisherkern import reference
from head_fisher import cases

T, V, d = (3, 130, 64) if SLOW else (24, 517, 64)


def peaked(gap: float, softcap: float | None) -> cases.Inputs:
    """Hidden states along a row of W, whose logit is `gap` with and without a soft-cap."""
    x = cases.make(T, V, d, bias=False, scale=1.0)
    star = torch.randint(V, (T,), generator=cases.generator(2)).to(DEVICE)
    W = x.weight[star]
    length = gap if softcap is None else softcap * math.atanh(gap / softcap)
    hidden = length * W / W.square().sum(-1, keepdim=True)
    return x.replace(hidden=hidden, softcap=softcap)


def remainders(x: cases.Inputs) -> Tensor:
    """1 − the largest p, per token."""
    z, _ = reference.head_logits(x.hidden, x.weight, None, x.softcap)
    return 1 - torch.softmax(z, -1).amax(-1)


def pullback(x: cases.Inputs, accuracy: str, reduction: str) -> Tensor:
    return fk.head_fisher_pullback(
        x.hidden, x.weight, softcap=x.softcap, accuracy=accuracy, reduction=reduction
    )


def truth(x: cases.Inputs, reduction: str) -> Tensor:
    wide = x.to(torch.float64)
    return reference.head_fisher_pullback(
        wide.hidden, wide.weight, softcap=x.softcap, reduction=reduction
    )


@cases.softcaps(30.0)
@pytest.mark.parametrize("gap", [18.0] if SLOW else [16.0, 18.0, 20.0])
def test_high_accuracy_does_not_cancel(backend: str, gap: float, softcap: float | None) -> None:
    x = peaked(gap, softcap)
    typical = remainders(x).median().item()
    assert 3e-6 < typical < 2e-3
    exact = truth(x, "sum")
    standard, high = (cases.error(pullback(x, a, "sum"), exact) for a in ("standard", "high"))
    # found: a hundred times smaller or more, on every back end
    assert standard > 1e-5
    assert high < standard / 3
    # what is left is the rounding of logits: p of a class has the error of its gap to the star
    assert high <= 4 * gap * cases.EPSILON[torch.float32]
    for a, b in zip(pullback(x, "high", "none"), truth(x, "none"), strict=True):
        assert cases.error(a, b) <= 8 * gap * cases.EPSILON[torch.float32]


@cases.softcaps(5.0)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_high_accuracy_is_as_good_on_diffuse_rows(
    backend: str, reduction: str, softcap: float | None
) -> None:
    x = cases.make(T, V, d, bias=False, softcap=softcap, scale=1.0)
    assert remainders(x).min() > 0.5
    exact = truth(x, reduction)
    standard, high = (cases.error(pullback(x, a, reduction), exact) for a in ("standard", "high"))
    assert high <= 2 * standard + cases.SLACK[torch.float32] * cases.EPSILON[torch.float32]


@pytest.mark.parametrize("accuracy", ["standard", "high"])
def test_certain_rows_have_no_fisher(backend: str, accuracy: str) -> None:
    """p of one class is 1, of the others 0 in float32: M is zero to its rounding."""
    x = peaked(300.0, None)
    M, scale = pullback(x, accuracy, "none"), x.weight.square().sum(-1).max().item()
    assert M.abs().max() <= (0 if accuracy == "high" else 4e-7 * scale)


def test_other_ops_keep_relative_accuracy(backend: str) -> None:
    """1 − p is about 1e-5: formulas with 1 − p in float32 would be wrong in the third digit."""
    x = peaked(20.0, None)
    for op in cases.PLACELESS:
        if op.short in ("matvec", "weight_diagonal", "stats"):
            for a, b in zip(cases.tensors(op.call(x)), op.truth(x), strict=True):
                assert cases.error(a, b) <= 8 * 20 * cases.EPSILON[torch.float32]
