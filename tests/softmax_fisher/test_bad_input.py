"""One clear error each, naming the argument, what it was and what is allowed; nothing written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fisherkern as fk
from conftest import DEVICE
from softmax_fisher import cases
from softmax_fisher.cases import IDS, OPS, PER_TOKEN, Op


def usual(op: Op) -> tuple[torch.Tensor, list[torch.Tensor]]:
    z = cases.logits((3, 7), torch.float32)
    return z, op.make(z, cases.generator(0))


def refused(
    op: Op, error: type[Exception], message: str, z: Any, *operands: Any, **arguments: Any
) -> None:
    with pytest.raises(error, match=message):
        op.call(z, *operands, **arguments)


@pytest.mark.parametrize("op", OPS, **IDS)
def test_logits(backend: str, op: Op) -> None:
    z, operands = usual(op)
    refused(op, TypeError, "logits has dtype torch.int64; allowed are float32", z.long(), *operands)
    refused(op, TypeError, "logits must be a torch.Tensor, not list", [[0.0]], *operands)
    refused(op, ValueError, r"logits is a scalar; expected \[\.\.\., V\]", z[0, 0], *operands)
    refused(op, TypeError, "logits has layout", z.to_sparse(), *operands)


@pytest.mark.parametrize("op", OPS, **IDS)
def test_temperature(backend: str, op: Op) -> None:
    z, operands = usual(op)
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        refused(
            op, ValueError, "temperature is .*; allowed are finite", z, *operands, temperature=bad
        )
    for worse in ("1", None, True, torch.tensor(1.0)):
        refused(op, TypeError, "temperature", z, *operands, temperature=worse)


@pytest.mark.parametrize("op", OPS, **IDS)
def test_mask(backend: str, op: Op) -> None:
    z, operands = usual(op)
    mask = torch.ones(3, dtype=torch.bool, device=DEVICE)
    refused(
        op,
        TypeError,
        "mask has dtype torch.float32; allowed is bool",
        z,
        *operands,
        mask=mask.float(),
    )
    refused(op, ValueError, r"mask has shape \[2\]; expected \[3\]", z, *operands, mask=mask[:2])
    refused(op, ValueError, r"mask has shape \[3, 1\]", z, *operands, mask=mask[:, None])
    refused(op, TypeError, "mask must be a torch.Tensor, not list", z, *operands, mask=[True] * 3)
    weights = torch.ones(3, device=DEVICE)
    refused(
        op, ValueError, "mask and weights were both given", z, *operands, mask=mask, weights=weights
    )


@pytest.mark.parametrize("op", OPS, **IDS)
def test_weights(backend: str, op: Op) -> None:
    z, operands = usual(op)
    w = torch.ones(3, device=DEVICE)
    refused(op, TypeError, "weights has dtype torch.int64", z, *operands, weights=w.long())
    refused(op, ValueError, r"weights has shape \[3, 1\]", z, *operands, weights=w[:, None])
    refused(op, ValueError, "weights requires grad", z, *operands, weights=w.requires_grad_())
    for bad in (-1.0, float("nan"), float("inf")):
        values = torch.tensor([1.0, bad, 1.0], device=DEVICE)
        if DEVICE == "cpu":
            refused(op, ValueError, f"weights holds {bad}", z, *operands, weights=values)
        else:
            result = cases.tensors(op.call(z, *operands, weights=values))[0]
            if op in PER_TOKEN:
                assert result[1].isnan().all()
                assert result[[0, 2]].isfinite().all()
            else:
                assert result.isnan().all()


@pytest.mark.parametrize("op", OPS, **IDS)
def test_logsumexp(backend: str, op: Op) -> None:
    z, operands = usual(op)
    lse = torch.logsumexp(z, -1)
    refused(
        op, TypeError, "logsumexp has dtype torch.bfloat16", z, *operands, logsumexp=lse.bfloat16()
    )
    refused(op, ValueError, r"logsumexp has shape \[2\]", z, *operands, logsumexp=lse[:2])
    refused(op, TypeError, "logsumexp must be a torch.Tensor", z, *operands, logsumexp=1.0)


@pytest.mark.parametrize("op", [op for op in OPS if "v" in op.operands], **IDS)
def test_vectors(backend: str, op: Op) -> None:
    z, (v,) = usual(op)
    refused(op, TypeError, "v has dtype torch.float64; expected that of logits", z, v.double())
    refused(op, ValueError, r"v has shape \[3, 6\]; expected \[3, 7\]", z, v[:, :6])
    refused(op, ValueError, r"v has shape \[2, 7\]", z, v[:2])
    refused(op, TypeError, "v must be a torch.Tensor", z, 1.0)
    refused(op, ValueError, "v is on meta; expected the device of logits", z, v.to("meta"))


def test_directions(backend: str) -> None:
    z = cases.logits((3, 7), torch.float32)
    with pytest.raises(ValueError, match=r"or \[3, K, 7\] for K directions"):
        fk.softmax_fisher_quadratic(z, torch.zeros(2, 4, 7, device=DEVICE))


@pytest.mark.parametrize("op", [op for op in OPS if op.options or op.name.endswith("trace")], **IDS)
def test_reduction(backend: str, op: Op) -> None:
    z, operands = usual(op)
    with pytest.raises(ValueError, match="reduction is 'average'; allowed are"):
        getattr(fk, op.name)(z, *operands, reduction="average")


def test_labels(backend: str) -> None:
    z = cases.logits((3, 7), torch.float32)
    labels = torch.tensor([0, 6, 3], device=DEVICE)
    gradient = fk.softmax_fisher_gradient
    with pytest.raises(TypeError, match="labels has dtype torch.int32; allowed is int64"):
        gradient(z, labels.int())
    with pytest.raises(ValueError, match=r"labels has shape \[2\]; expected \[3\]"):
        gradient(z, labels[:2])
    with pytest.raises(TypeError, match="ignore_index has type float"):
        gradient(z, labels, ignore_index=1.0)
    for bad in (7, -1, -100, 2**40):
        out = torch.full_like(z, 5.0)
        wrong = torch.tensor([0, bad, 3], device=DEVICE)
        if DEVICE == "cpu":
            with pytest.raises(ValueError, match=f"labels holds {bad}; allowed are 0 to 6"):
                gradient(z, wrong, ignore_index=-7, out=out)
            assert (out == 5).all()
            before = z.clone()
            with pytest.raises(ValueError, match=f"labels holds {bad}"):
                fk.softmax_fisher_gradient_(z, wrong, ignore_index=-7)
            assert torch.equal(z, before)
        else:
            rows = gradient(z, wrong, ignore_index=-7)
            assert rows[1].isnan().all()
            assert rows[[0, 2]].isfinite().all()


@pytest.mark.parametrize("op", [op for op in OPS if op.takes_out], **IDS)
def test_out(backend: str, op: Op) -> None:
    z, operands = usual(op)
    expected = op.call(z, *operands)
    refused(op, TypeError, "out must be a torch.Tensor", z, *operands, out=1.0)
    refused(op, ValueError, "out has shape", z, *operands, out=expected[..., :3])
    refused(op, TypeError, "out has dtype torch.float64", z, *operands, out=expected.double())
    shared = torch.zeros(1, device=DEVICE).expand(expected.shape)
    refused(op, ValueError, "several of its elements share memory", z, *operands, out=shared)
    V = expected.shape[-1]
    memory = torch.zeros(expected.numel() + V, dtype=expected.dtype, device=DEVICE)
    if expected.ndim > 1:
        windows = memory.as_strided(expected.shape, (1,) * expected.ndim)
        refused(op, ValueError, "several of its elements share memory", z, *operands, out=windows)
    out = memory[: expected.numel()].view(expected.shape)
    if op.name != "softmax_fisher_gradient" or z.dtype == out.dtype:
        lse = memory[: z.shape[:-1].numel()].view(z.shape[:-1])
        refused(op, ValueError, "out overlaps logsumexp", z, *operands, out=out, logsumexp=lse)
    if op.kind == "row":
        before = z.clone()
        refused(op, ValueError, "out overlaps logits in memory", z, *operands, out=z)
        assert torch.equal(z, before)
    leaf = torch.zeros_like(expected).requires_grad_()
    refused(op, ValueError, "out= does not support autograd", z, *operands, out=leaf)


def test_sampling(backend: str) -> None:
    z = cases.logits((3, 7), torch.float32)
    with pytest.raises(TypeError, match="generator must be a torch.Generator or None, not int"):
        fk.softmax_fisher_sample(z, 3)  # type: ignore[arg-type]
    for sample in (fk.softmax_fisher_sample, fk.softmax_fisher_sample_):
        with pytest.raises(ValueError, match="no classes; softmax_fisher_sample_? needs V >= 1"):
            sample(z[:, :0])


def test_over_the_logits(backend: str) -> None:
    z = cases.logits((3, 7), torch.float32)
    labels = torch.tensor([0, 1, 2], device=DEVICE)
    with pytest.raises(ValueError, match="logits requires grad; an in-place op cannot write"):
        fk.softmax_fisher_gradient_(z.clone().requires_grad_(), labels)
    with pytest.raises(ValueError, match="its elements share memory; clone it first"):
        fk.softmax_fisher_sample_(z[:1].expand(3, 7))


def test_float64_weights_beyond_float32() -> None:
    w = torch.tensor([1e39, 1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"weights holds 1e\+39; allowed are finite float32 >= 0"):
        fk.softmax_fisher_mean_probs(torch.zeros(2, 2), weights=w)
    fk.softmax_fisher_mean_probs(torch.zeros(2, 2, dtype=torch.float64), weights=w)


@pytest.mark.parametrize("name", ["gradient_", "sample_"])
def test_rows_that_overlap_are_not_written_over(name: str) -> None:
    z = torch.arange(12.0).as_strided((3, 6), (3, 1))
    before = z.clone()
    operands = (torch.tensor([0, 1, 2]),) if name == "gradient_" else ()
    with pytest.raises(ValueError, match=r"logits has strides \(3, 1\): its elements share memory"):
        getattr(fk, f"softmax_fisher_{name}")(z, *operands)
    assert torch.equal(z, before)
