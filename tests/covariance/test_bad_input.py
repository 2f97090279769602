"""One clear error each, naming the argument, what it was and what is allowed; nothing written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fisherkern as fk
from conftest import DEVICE
from covariance import cases
from covariance.cases import IDS, OPS, UPDATES, Op


def refused(op: Op, error: type[Exception], message: str, *inputs: Any, **arguments: Any) -> None:
    """Refused, and the factor is as it was."""
    shape = op.truth(*op.make(torch.float32)).shape
    factor = torch.full(shape, 3.0, device=DEVICE)
    with pytest.raises(error, match=message):
        op.update(factor, *inputs, **{"ema_decay": 0.0, **op.options, **arguments})
    assert (factor == 3).all()


@pytest.mark.parametrize("op", OPS, **IDS)
def test_inputs(backend: str, op: Op) -> None:
    x, *rest = op.make(torch.float32)
    refused(op, TypeError, "x has dtype torch.int64; allowed are float32", x.long(), *rest)
    refused(op, TypeError, "x must be a torch.Tensor, not list", [0.0], *rest)
    refused(op, TypeError, "x has layout", x.to_sparse(), *rest)
    refused(op, ValueError, r"x has shape \[\]; expected", x.sum(), *rest)


@pytest.mark.parametrize("op", [op for op in OPS if len(op.shapes) == 2], **IDS)
def test_gradients(backend: str, op: Op) -> None:
    x, g = op.make(torch.float32)
    refused(op, ValueError, r"g has shape .*; expected the leading shape of x", x, g[1:])
    refused(op, TypeError, "g has dtype torch.float16; expected that of x", x, g.half())


@pytest.mark.parametrize("op", OPS, **IDS)
def test_mask_and_weights(backend: str, op: Op) -> None:
    inputs = op.make(torch.float32)
    mask, w = cases.some_tokens(op), cases.some_weights(op, torch.float32)
    refused(op, ValueError, "mask and weights were both given", *inputs, mask=mask, weights=w)
    refused(op, TypeError, "mask has dtype torch.float32; allowed is bool", *inputs, mask=w)
    refused(op, TypeError, "weights has dtype torch.bool", *inputs, weights=mask)
    refused(op, ValueError, "mask has shape .*leading shape of x", *inputs, mask=mask[:-1])
    refused(op, ValueError, "weights requires grad", *inputs, weights=w.clone().requires_grad_())
    if DEVICE == "cpu":
        for bad in (-1.0, float("inf"), float("nan")):
            spoiled = w.clone()
            spoiled.view(-1)[-1] = bad
            refused(
                op, ValueError, "weights holds .*; allowed are finite", *inputs, weights=spoiled
            )


@pytest.mark.parametrize("op", OPS, **IDS)
def test_options(backend: str, op: Op) -> None:
    inputs = op.make(torch.float32)
    refused(
        op, ValueError, "reduction is 'none'; allowed are 'mean', 'sum'", *inputs, reduction="none"
    )
    refused(op, ValueError, "precision is 'fp8'; allowed are", *inputs, precision="fp8")
    refused(op, ValueError, "scale is nan; allowed are numbers that", *inputs, scale=float("nan"))
    refused(op, TypeError, "scale has type str; expected a number", *inputs, scale="1")


@pytest.mark.parametrize("op", UPDATES, **IDS)
def test_ema_decay(backend: str, op: Op) -> None:
    inputs = op.make(torch.float32)
    for bad in (-0.1, 1.1, float("nan")):
        refused(op, ValueError, r"ema_decay is .*; allowed are numbers in", *inputs, ema_decay=bad)
    refused(op, TypeError, "ema_decay has type bool", *inputs, ema_decay=True)


@pytest.mark.parametrize("op", UPDATES, **IDS)
def test_factor(backend: str, op: Op) -> None:
    inputs = op.make(torch.float32)
    shape = op.truth(*inputs).shape

    def refuse(factor: Any, error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            op.update(factor, *inputs, ema_decay=0.0, **op.options)

    good = torch.zeros(shape, device=DEVICE)
    refuse(good.tolist(), TypeError, "factor must be a torch.Tensor, not list")
    refuse(good.half(), TypeError, "factor has dtype torch.float16; allowed for torch.float32")
    refuse(good[..., 1:], ValueError, r"factor has shape .*; expected")
    refuse(good.clone().requires_grad_(), ValueError, "factor requires grad")
    refuse(good[..., :1].expand(shape), ValueError, "its elements share memory")
    if op.id != "covariance-heads":
        doubles = [x.double() for x in inputs]
        if DEVICE == "cpu":
            with pytest.raises(TypeError, match=r"factor has dtype torch.float32; .*float64"):
                op.update(good, *doubles, ema_decay=0.0, **op.options)


def test_overlap(backend: str) -> None:
    x = torch.zeros(8, 4, device=DEVICE)
    with pytest.raises(ValueError, match="factor overlaps x in memory"):
        fk.covariance_update_(x[:4], x, ema_decay=0.5)
    with pytest.raises(ValueError, match="factor overlaps g in memory"):
        fk.squared_gradient_update_(x[:4], torch.ones_like(x), x, ema_decay=0.5)
    A = torch.zeros(4, 4, device=DEVICE)
    with pytest.raises(ValueError, match="factor overlaps x in memory"):
        fk.convolution_covariance_update_(A, A.view(1, 4, 4), 1, ema_decay=0.5)
    windows = torch.zeros(7, device=DEVICE).as_strided((4, 4), (1, 1))
    with pytest.raises(ValueError, match="several of its elements share memory"):
        fk.covariance_update_(windows, x, ema_decay=0.5)


def test_convolution_arguments(backend: str) -> None:
    x, A = torch.zeros(2, 4, 5, 6, device=DEVICE), torch.zeros(16, 16, device=DEVICE)

    def refuse(message: str, **arguments: Any) -> None:
        given = {"kernel_size": 2, **arguments}
        with pytest.raises(ValueError, match=message):
            fk.convolution_covariance_update_(
                given.pop("factor", A), given.pop("x", x), ema_decay=0.5, **given
            )

    refuse(r"x has shape \[2, 4, 5, 6, 1\]; expected \[B, C, L\] or", x=x[..., None])
    refuse("kernel_size is 0; allowed are ints >= 1", kernel_size=0)
    refuse(r"stride is \(1, 2, 3\); expected an int or 2 of them", stride=(1, 2, 3))
    refuse("padding is -1; allowed are ints >= 0", padding=-1)
    refuse("groups is 3; expected a divisor of the 4 channels", groups=3)
    refuse("workspace is 0; expected a number of bytes", workspace=0)
    refuse("kernel_size is 9; with this dilation it exceeds the padded input", kernel_size=9)
    refuse(r"factor has shape \[16, 16\]; expected \[17, 17\]", bias=True)


def test_embedding_arguments(backend: str) -> None:
    i = torch.tensor([0, 3], device=DEVICE)
    with pytest.raises(TypeError, match="indices has dtype torch.int32; allowed is int64"):
        fk.embedding_counts(i.int(), 4)
    with pytest.raises(ValueError, match="num_embeddings is 0; expected an int >= 1"):
        fk.embedding_counts(i, 0)
    with pytest.raises(ValueError, match=r"mask has shape \[1\]; expected \[2\]"):
        fk.embedding_counts(i, 4, mask=torch.ones(1, dtype=torch.bool, device=DEVICE))
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="indices holds 3; allowed are 0 to 2"):
            fk.embedding_counts(i, 3)


def test_mirror_arguments(backend: str) -> None:
    with pytest.raises(ValueError, match=r"factor has shape \[2, 3\]; expected \[3, 3\]"):
        fk.mirror_(torch.zeros(2, 3, device=DEVICE))
    with pytest.raises(TypeError, match="factor has dtype torch.float16"):
        fk.mirror_(torch.zeros(2, 2, device=DEVICE, dtype=torch.float16))
