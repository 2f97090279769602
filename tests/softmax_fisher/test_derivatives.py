"""Derivatives in float64, under autograd, torch.func and torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import fisherkern as fk
from conftest import DEVICE, SLOW
from fisherkern import reference
from softmax_fisher import cases

T, V = 3, 5
WEIGHTS = torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
LABELS = torch.tensor([1, -100, 4])


def ops(module: Any) -> dict[str, Callable[..., Any]]:
    """Functions of the logits (and v) alone, weighted, at a temperature."""
    common = {"temperature": 1.3, "weights": WEIGHTS}

    def bind(name: str, **options: Any) -> Callable[..., Any]:
        function = getattr(module, f"softmax_fisher_{name}")
        return lambda *tensors: function(*tensors, **common, **options)

    return {
        "matvec": bind("matvec"),
        "quadratic": bind("quadratic"),
        "quadratic-k": bind("quadratic", reduction="sum"),
        "trace": bind("trace"),
        "trace-mean": bind("trace", reduction="mean"),
        "stats": lambda z: torch.stack(bind("stats")(z), -1),
        "diagonal": bind("diagonal"),
        "diagonal-mean": bind("diagonal", reduction="mean"),
        "mean_probs": bind("mean_probs"),
        "gradient": lambda z: bind("gradient")(z, LABELS),
        "sqrt_matvec": bind("sqrt_matvec"),
        "sqrt_rmatvec": bind("sqrt_rmatvec"),
    }


NAMES = list(ops(fk))


def inputs(name: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    z = cases.logits((T, V), dtype, 1.0).cpu()
    if name.startswith(("matvec", "sqrt", "quadratic")):
        shape = (T, 2, V) if name == "quadratic-k" else (T, V)
        return z, cases.logits(shape, dtype, 1.0, seed=5).cpu()
    return (z,)


def leaves(name: str) -> tuple[Tensor, ...]:
    return tuple(x.clone().requires_grad_() for x in inputs(name))


needs_float64 = pytest.mark.skipif(
    SLOW or DEVICE != "cpu", reason="gradcheck needs float64: the CPU back ends, in the main run"
)


@needs_float64
@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(backend: str, name: str) -> None:
    assert gradcheck(ops(fk)[name], leaves(name), check_forward_ad=True, check_batched_grad=True)


@needs_float64
@pytest.mark.parametrize("name", NAMES)
def test_gradgradcheck(backend: str, name: str) -> None:
    assert gradgradcheck(ops(fk)[name], leaves(name))


@needs_float64
@pytest.mark.parametrize("name", NAMES)
def test_torch_func(backend: str, name: str) -> None:
    """Reverse, forward, and per-example derivatives of a scalar function, against the reference."""
    ours, theirs, tensors = ops(fk)[name], ops(reference)[name], inputs(name)

    def close(a: Any, b: Any) -> None:
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)

    def scalar(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *x: function(*x).sin().sum()

    arguments = tuple(range(len(tensors)))
    close(
        torch.func.grad(scalar(ours), arguments)(*tensors),
        torch.func.grad(scalar(theirs), arguments)(*tensors),
    )
    close(torch.func.jacrev(ours)(*tensors), torch.func.jacrev(theirs)(*tensors))
    directions = tuple(torch.randn_like(x) for x in tensors)
    close(
        torch.func.jvp(ours, tensors, directions)[1],
        torch.func.jvp(theirs, tensors, directions)[1],
    )
    close(torch.func.jacfwd(ours)(*tensors), torch.func.jacfwd(theirs)(*tensors))
    stacked = tuple(torch.stack([x, 2 * x]) for x in tensors)
    close(torch.func.vmap(ours)(*stacked), torch.func.vmap(theirs)(*stacked))
    close(
        torch.func.vmap(torch.func.grad(scalar(ours)))(*stacked),
        torch.func.vmap(torch.func.grad(scalar(theirs)))(*stacked),
    )


@needs_float64
@pytest.mark.parametrize("name", NAMES)
def test_hessian_by_forward_over_reverse(backend: str, name: str) -> None:
    def scalar(module: Any) -> Callable[..., Tensor]:
        return lambda *x: ops(module)[name](*x).sin().sum()

    tensors = inputs(name)
    torch.testing.assert_close(
        torch.func.hessian(scalar(fk))(*tensors),
        torch.func.hessian(scalar(reference))(*tensors),
        rtol=1e-8,
        atol=1e-11,
    )


@needs_float64
@pytest.mark.parametrize("name", ["diagonal", "mean_probs", "trace", "quadratic"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_forward_mode_of_one_token(backend: str, name: str, reduction: str) -> None:
    z, t, v = cases.logits((3, V), torch.float64, 1.0).cpu()
    operands = (v,) if name == "quadratic" else ()

    def of(module: Any) -> Callable[[Tensor], Tensor]:
        function = getattr(module, f"softmax_fisher_{name}")
        return lambda z: function(z, *operands, reduction=reduction)

    def one(z: Tensor) -> Tensor:
        return of(reference)(z[None] if name != "quadratic" else z)

    found = torch.func.jvp(of(fk), (z,), (t,))
    torch.testing.assert_close(found, torch.func.jvp(one, (z,), (t,)), rtol=1e-9, atol=1e-12)


@needs_float64
@pytest.mark.parametrize("name", NAMES)
def test_tangents_of_tangents_are_refused(backend: str, name: str) -> None:
    """An autograd.Function has none, and torch makes zeros of them without a word."""
    function, tensors = ops(fk)[name], inputs(name)

    def along(f: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *x: torch.func.jvp(f, x, tensors)[1]

    def scalar(*x: Tensor) -> Tensor:
        return along(function)(*x).sum()

    for nested in (along(along(function)), along(torch.func.grad(scalar))):
        with pytest.raises(NotImplementedError, match="forward mode inside forward mode"):
            nested(*tensors)
    torch.func.grad(scalar)(*tensors)


@needs_float64
@pytest.mark.parametrize("name", ["matvec", "trace", "stats", "diagonal-mean", "mean_probs"])
def test_forward_mode_inside_a_compiled_function(backend: str, name: str) -> None:
    function, tensors = ops(fk)[name], inputs(name)

    def along(*x: Tensor) -> Tensor:
        return torch.func.jvp(function, x, tensors)[1]

    torch.compiler.reset()
    found = torch.compile(along, backend="aot_eager")(*tensors)
    torch.testing.assert_close(found, along(*tensors))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("name", NAMES)
def test_backward_on_the_back_end(backend: str, name: str, dtype: torch.dtype) -> None:
    """The fused backward kernels in the dtypes that models use, masked NaN rows included."""
    tensors = [x.to(DEVICE).requires_grad_() for x in inputs(name, dtype)]
    with torch.no_grad():
        tensors[0][1] = torch.nan
    weights = WEIGHTS.to(DEVICE)
    common = {"temperature": 1.3, "weights": weights}
    function = getattr(fk, f"softmax_fisher_{name.partition('-')[0]}")
    extra = [LABELS.to(DEVICE)] if name == "gradient" else []
    result = (
        torch.stack(function(*tensors, *extra, **common), -1)
        if name == "stats"
        else (function(*tensors, *extra, **common))
    )
    cotangent = cases.logits(result.shape, result.dtype, 1.0, seed=9)
    found = torch.autograd.grad(result, tensors, cotangent)

    doubles = [x.detach().double().requires_grad_() for x in tensors]
    truth_function = getattr(reference, f"softmax_fisher_{name.partition('-')[0]}")
    truth = truth_function(*doubles, *extra, **common)
    truth = torch.stack(truth, -1) if name == "stats" else truth
    expected = torch.autograd.grad(truth, doubles, cotangent.double())
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype
        assert (a[1] == 0).all()
        assert cases.error(a, b.nan_to_num()) <= 8 * cases.SLACK[dtype] * cases.EPSILON[dtype]


def test_gradient_is_the_derivative_of_cross_entropy(backend: str) -> None:
    z = cases.logits((T, V), torch.float32).requires_grad_()
    labels = LABELS.to(DEVICE)
    loss = torch.nn.functional.cross_entropy(z, labels, reduction="sum")
    (expected,) = torch.autograd.grad(loss, z)
    assert cases.error(fk.softmax_fisher_gradient(z.detach(), labels), expected) < 1e-6


def test_accumulated_and_retained_graphs(backend: str) -> None:
    z = cases.logits((T, V), torch.float32).requires_grad_()
    trace = fk.softmax_fisher_trace(z).sum()
    trace.backward(retain_graph=True)
    once = z.grad.clone()
    trace.backward()
    assert torch.equal(z.grad, 2 * once)


def test_autocast_leaves_the_dtypes_alone(backend: str) -> None:
    z = cases.logits((T, V), torch.float32)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert fk.softmax_fisher_matvec(z, z).dtype == torch.float32


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_slope_of_the_largest_probability_of_a_peaked_row(backend: str, dtype: torch.dtype) -> None:
    """P (1 − P) at the star, where P is nearly one: no difference of rounded numbers."""
    z = torch.zeros(1, 64, dtype=dtype, device=DEVICE)
    z[0, 5] = 12.0
    z.requires_grad_()
    (slope,) = torch.autograd.grad(fk.softmax_fisher_stats(z).max_probability.sum(), z)
    p = torch.softmax(z.detach().double(), -1)
    truth = -p[0, 5] * p
    truth[0, 5] = p[0, 5] * (p[0, :5].sum() + p[0, 6:].sum())
    # P itself is a float32 number, and 1 − P inherits its rounding
    assert (slope - truth).abs().max() <= 2 * cases.EPSILON[torch.float32] + (
        cases.EPSILON[dtype] * truth.abs().max()
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 65536.0])
@pytest.mark.parametrize("op", ["mean_probs", "diagonal"])
def test_the_gradient_of_a_reduced_result_fits_into_half_precision(
    backend: str, op: str, scale: float, dtype: torch.dtype
) -> None:
    """Losses are scaled by 65536 and more where half precision is trained in, and F 1 = 0."""
    z = (2 * torch.randn(64, 20, generator=cases.generator(0))).to(DEVICE, dtype)
    w = torch.rand(64, generator=cases.generator(1)).to(DEVICE)
    name = f"softmax_fisher_{op}"
    options = {"weights": w, "temperature": 0.7}

    def gradient(module: Any, x: Tensor, **how: Any) -> Tensor:
        x = x.clone().requires_grad_()
        result = getattr(module, name)(x, **options, **how)
        # most of the cotangent is a constant, which is nothing to F
        ((10 - (result + 1e-3).log()) * result).sum().mul(scale).backward()
        assert x.grad is not None
        return x.grad

    found = gradient(fk, z, reduction="mean").double()
    exact = gradient(reference, z.double(), reduction="mean")
    exact = exact.to(dtype).double()
    # an element of half precision is rounded once on the way in and once on the way out
    eps = torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).smallest_normal
    assert torch.isfinite(found).all()
    assert (found - exact).abs().max() <= 2 * eps * exact.abs().max() + tiny
