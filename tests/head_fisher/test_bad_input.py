"""One clear error each, naming the argument, what it was and what is allowed; nothing half done."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import fisherkern as fk
from conftest import DEVICE
from head_fisher import cases
from head_fisher.cases import IDS, ONE_EACH, Inputs, Op

T, V, d = 3, 7, 5
REDUCED = [op for op in ONE_EACH if "reduction" in dict(op.options)]


def usual() -> Inputs:
    return cases.make(T, V, d)


def refused(
    op: Op, error: type[Exception], message: str, x: Inputs | None = None, **arguments: Any
) -> None:
    with pytest.raises(error, match=message):
        op.raw(usual() if x is None else x, **arguments)


@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_hidden(backend: str, op: Op) -> None:
    x = usual()

    def refuse(hidden: Any, error: type[Exception], message: str) -> None:
        refused(op, error, message, x.replace(hidden=hidden))

    refuse([[0.0]], TypeError, "hidden must be a torch.Tensor, not list")
    refuse(x.hidden.long(), TypeError, "hidden has dtype torch.int64; allowed are float32")
    refuse(x.hidden.to_sparse(), TypeError, "hidden has layout torch.sparse_coo; only dense")
    refuse(x.hidden[0, 0], ValueError, r"hidden has shape \[\]; expected \[\.\.\., d\]")
    refuse(x.hidden[:, :0], ValueError, r"hidden has shape \[3, 0\]; its last dimension must not")


@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_weight(backend: str, op: Op) -> None:
    x = usual()

    def refuse(weight: Any, error: type[Exception], message: str) -> None:
        refused(op, error, message, x.replace(weight=weight))

    W = x.weight
    refuse(W.tolist(), TypeError, "weight must be a torch.Tensor, not list")
    refuse(W.half(), TypeError, "weight has dtype torch.float16; expected that of hidden, .*32")
    refuse(W.to("meta"), ValueError, "weight is on meta; expected the device of hidden")
    shape = r"expected \[V, 5\], V >= 1, for hidden \[3, 5\]"
    refuse(W.mT, ValueError, rf"weight has shape \[5, 7\]; {shape}")
    refuse(W[:, 1:], ValueError, rf"weight has shape \[7, 4\]; {shape}")
    refuse(W[0], ValueError, rf"weight has shape \[5\]; {shape}")
    refuse(W[None], ValueError, rf"weight has shape \[1, 7, 5\]; {shape}")
    refuse(W[:0], ValueError, rf"weight has shape \[0, 5\]; {shape}")


@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_bias(backend: str, op: Op) -> None:
    b = usual().bias
    refused(op, TypeError, "bias must be a torch.Tensor, not float", bias=0.0)
    refused(op, TypeError, "bias has dtype torch.float64; expected that of weight", bias=b.double())
    refused(op, ValueError, "bias is on meta; expected the device of weight", bias=b.to("meta"))
    for bad in (b[1:], b[None], b[0]):
        refused(op, ValueError, r"bias has shape \[.*\]; expected \[7\]", bias=bad)


@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_softcap(backend: str, op: Op) -> None:
    # its square has to be a float32, and the reciprocal of that
    for bad in (0, -1.0, float("nan"), float("inf"), 1e-20, 1e39):
        message = f"softcap is {bad}; allowed are numbers in [1e-18, 1e+18]"
        refused(op, ValueError, re.escape(message), softcap=bad)
    for worse in ("30", True, torch.tensor(30.0)):
        refused(op, TypeError, "softcap has type .*; expected a number", softcap=worse)


@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_temperature(backend: str, op: Op) -> None:
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        refused(op, ValueError, "temperature is .*; allowed are finite", temperature=bad)
    for worse in ("1", None, True, torch.tensor(1.0)):
        refused(op, TypeError, "temperature", temperature=worse)


@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_mask(backend: str, op: Op) -> None:
    mask = torch.ones(T, dtype=torch.bool, device=DEVICE)
    refused(op, TypeError, "mask has dtype torch.float32; allowed is bool", mask=mask.float())
    lead = r"expected \[3\], the leading shape of hidden \[3, 5\]"
    refused(op, ValueError, rf"mask has shape \[2\]; {lead}", mask=mask[:2])
    refused(op, ValueError, rf"mask has shape \[3, 1\]; {lead}", mask=mask[:, None])
    refused(op, ValueError, "mask is on meta; expected the device of hidden", mask=mask.to("meta"))
    refused(op, TypeError, "mask must be a torch.Tensor, not list", mask=[True] * T)
    refused(op, ValueError, "mask and weights were both given", mask=mask, weights=mask.float())


@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_weights(backend: str, op: Op) -> None:
    w = torch.ones(T, device=DEVICE)
    refused(op, TypeError, "weights must be a torch.Tensor, not list", weights=[1.0] * T)
    refused(op, TypeError, "weights has dtype torch.int64", weights=w.long())
    lead = r"expected \[3\], the leading shape of hidden"
    refused(op, ValueError, rf"weights has shape \[3, 1\]; {lead}", weights=w[:, None])
    refused(op, ValueError, "weights is on meta; expected the device", weights=w.to("meta"))
    refused(op, ValueError, "weights requires grad", weights=w.clone().requires_grad_())
    for bad in (-1.0, float("nan"), float("inf")):
        values = torch.tensor([1.0, bad, 1.0], device=DEVICE)
        if DEVICE == "cpu":
            refused(op, ValueError, f"weights holds {bad}; allowed are finite", weights=values)
        else:
            result = cases.tensors(op.raw(usual(), weights=values))[-1]
            if op.kind == "token":
                assert result[1].isnan().all()
                assert result[[0, 2]].isfinite().all()
            else:
                assert result.isnan().all()


@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_workspace(backend: str, op: Op) -> None:
    for bad in (0, -1):
        refused(
            op, ValueError, f"workspace is {bad}; allowed are numbers of bytes >= 1", workspace=bad
        )
    for worse in (1e6, "1", True):
        refused(op, TypeError, "workspace has type .*; expected an int", workspace=worse)


@pytest.mark.parametrize("op", REDUCED, **IDS)
def test_reduction(backend: str, op: Op) -> None:
    allowed = "'none', 'mean', 'sum'" if op.short.startswith("pullback") else "'mean', 'sum'"
    for bad in ("average", None) if "none" in allowed else ("average", "none", None):
        message = f"reduction is {bad!r}; allowed are {allowed}$"
        refused(op, ValueError, message, reduction=bad)


@pytest.mark.parametrize("op", [op for op in ONE_EACH if "pullback" in op.short], **IDS)
def test_accuracy(backend: str, op: Op) -> None:
    for bad in ("best", True):
        message = f"accuracy is {bad!r}; allowed are 'standard', 'high'"
        refused(op, ValueError, message, accuracy=bad)


@pytest.mark.parametrize(
    "op", [op for op in ONE_EACH if op.short in ("pullback", "pullback_root", "gram")], **IDS
)
def test_precision(backend: str, op: Op) -> None:
    for bad in ("fp8", 32):
        message = f"precision is {bad!r}; allowed are 'tf32x3', 'bf16x6'"
        refused(op, ValueError, message, precision=bad)


@pytest.mark.parametrize("op", [op for op in ONE_EACH if op.kind == "gram"], **IDS)
def test_damping(backend: str, op: Op) -> None:
    refused(op, ValueError, "damping is 0; allowed are finite numbers > 0", damping=0)
    for bad in (-1.0, float("nan"), float("inf")):
        refused(op, ValueError, f"damping is {bad}; allowed are finite numbers > 0", damping=bad)
    for worse in ("1", None, torch.tensor(1.0)):
        refused(op, TypeError, "damping has type .*; expected a number", damping=worse)


def test_vectors(backend: str) -> None:
    x = usual()
    matvec = next(op for op in ONE_EACH if op.short == "matvec")

    def refuse(u: Any, error: type[Exception], message: str) -> None:
        refused(matvec, error, message, x.replace(u=u))

    refuse(1.0, TypeError, "u must be a torch.Tensor, not float")
    refuse(x.u.double(), TypeError, "u has dtype torch.float64; expected that of hidden")
    refuse(x.u.to("meta"), ValueError, "u is on meta; expected the device of hidden")
    expected = r"expected \[3, 5\] \(the shape of hidden\) or \[5\]"
    refuse(x.u[:, 1:], ValueError, rf"u has shape \[3, 4\]; {expected}")
    refuse(x.u[:2], ValueError, rf"u has shape \[2, 5\]; {expected}")
    refuse(x.u[0, 0], ValueError, rf"u has shape \[\]; {expected}")


def test_generator(backend: str) -> None:
    x = usual()
    with pytest.raises(TypeError, match="generator must be a torch.Generator or None, not int"):
        fk.head_fisher_sample(x.hidden, x.weight, 3)  # type: ignore[arg-type]
    # a call that is refused draws nothing
    g = torch.Generator(DEVICE).manual_seed(0)
    before = g.get_state()
    for bad in ({"softcap": 0.0}, {"workspace": 0}, {"bias": x.bias[1:]}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            fk.head_fisher_sample(x.hidden, x.weight, g, **bad)
    assert torch.equal(g.get_state(), before)


@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_float64_on_a_gpu_back_end_is_refused_with_its_reason(op: Op) -> None:
    with fk.backend("triton"), pytest.raises(fk.BackendUnavailableError, match="no float64"):
        op.raw(usual().to(torch.float64))


def test_out(backend: str) -> None:
    x = usual()
    base = torch.full((V * d + T * d,), 55.0, device=DEVICE)
    overlapping = x.replace(hidden=base[V * d - 1 : -1].view(T, d))

    def refuse(out: Any, error: type[Exception], message: str, x: Inputs = x) -> None:
        with pytest.raises(error, match=message):
            fk.head_fisher_weight_diagonal(x.hidden, x.weight, bias=x.bias, out=out)

    refuse([[0.0]], TypeError, "out must be a torch.Tensor, not list")
    refuse(x.weight.mT, ValueError, r"out has shape \[5, 7\]; expected \[7, 5\]")
    refuse(x.weight.double(), TypeError, "out has dtype torch.float64; expected torch.float32")
    refuse(x.weight.to("meta"), ValueError, "out is on meta; expected the device of hidden")
    refuse(x.weight[:1].expand(V, d), ValueError, "several of its elements share memory")
    leaf = torch.zeros_like(x.weight).requires_grad_()
    refuse(leaf, ValueError, "out= does not support autograd")
    before = x.weight.clone()
    refuse(x.weight, ValueError, "out overlaps weight in memory")
    assert torch.equal(x.weight, before)
    refuse(base[: V * d].view(V, d), ValueError, "out overlaps hidden in memory", overlapping)
    assert (base == 55).all()
