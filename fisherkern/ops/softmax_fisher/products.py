"""F times a vector and its square root times a vector, per token.

F = (diag p − p pᵀ) / τ² with p = softmax(z / τ) is the Fisher information of the logits z of a
categorical distribution at temperature τ; it is also the Hessian of the cross-entropy in z
(Martens 2020, "New insights and perspectives on the natural gradient method", section 9.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._kernels import kernels
from fisherkern.ops._library import define, differentiable
from fisherkern.ops._rows import flat, token_rows, write_back
from fisherkern.ops._values import check_disjoint
from fisherkern.ops.softmax_fisher._common import (
    check_tokens,
    probabilities,
    row_output,
)

Needs = Sequence[bool]

# ---- the raw ops of one row operand: F v, L v, Lᵀ v ------------------------------------------


def _define_product(name: str) -> tuple[Any, Any]:
    """The functional op and its out variant."""

    def into(
        logits: Tensor,
        v: Tensor,
        weights: Tensor | None,
        logsumexp: Tensor | None,
        temperature: float,
        out: Tensor,
    ) -> None:
        if out.numel() == 0:
            return
        z, rows, result = token_rows(logits.ndim - 1, logits, v, out)
        kernel = getattr(kernels(logits), name)
        kernel(z, rows, flat(weights), flat(logsumexp), temperature, result)
        write_back(out, result)

    def functional(
        logits: Tensor,
        v: Tensor,
        weights: Tensor | None,
        logsumexp: Tensor | None,
        temperature: float,
    ) -> Tensor:
        out = row_output(logits)
        into(logits, v, weights, logsumexp, temperature, out)
        return out

    def checked_into(
        logits: Tensor,
        v: Tensor,
        weights: Tensor | None,
        logsumexp: Tensor | None,
        temperature: float,
        *,
        out: Tensor,
    ) -> None:
        check_disjoint(out, {"logits": logits, "v": v, "logsumexp": logsumexp})
        into(logits, v, weights, logsumexp, temperature, out)

    arguments = "Tensor logits, Tensor v, Tensor? weights, Tensor? logsumexp, float temperature"
    op = define(f"{name}({arguments}) -> Tensor", functional, lambda logits, *_: row_output(logits))
    out_op = define(
        f"{name}.out({arguments}, *, Tensor(a!) out) -> ()",
        checked_into,
        lambda *_, out: None,
        vmap="none",
    )
    return op, out_op


_matvec_op, _matvec_out = _define_product("softmax_fisher_matvec")
_sqrt_matvec_op, _sqrt_matvec_out = _define_product("softmax_fisher_sqrt_matvec")
_sqrt_rmatvec_op, _sqrt_rmatvec_out = _define_product("softmax_fisher_sqrt_rmatvec")


def _matvec_backward(
    logits: Tensor,
    v: Tensor,
    grad: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
) -> Tensor:
    out = row_output(logits)
    if out.numel():
        z, rows, grads, result = token_rows(logits.ndim - 1, logits, v, grad, out)
        kernels(logits).softmax_fisher_matvec_backward(
            z, rows, grads, flat(weights), flat(logsumexp), temperature, result
        )
        write_back(out, result)
    return out


_matvec_backward_op = define(
    "softmax_fisher_matvec_backward(Tensor logits, Tensor v, Tensor grad, Tensor? weights, "
    "Tensor? logsumexp, float temperature) -> Tensor",
    _matvec_backward,
    lambda logits, *_: row_output(logits),
)

# ---- derivatives: each is written with differentiable functions ------------------------------


def _unit(weights: Tensor) -> Tensor:
    """Weights of one where there is any. With them an op gives its derivative in the weights."""
    return (weights != 0).to(weights.dtype)


def _matvec_vjp(inputs: Sequence[Any], _: Tensor, grad: Tensor, needs: Needs) -> list[Any]:
    logits, v, weights, logsumexp, temperature = inputs
    common = (weights, logsumexp, temperature)
    g_logits = matvec_backward(logits, v, grad, *common) if needs[0] else None
    g_v = matvec(logits, grad, *common) if needs[1] else None
    g_weights = None
    if needs[2]:
        rows = matvec(logits, v, _unit(weights), logsumexp, temperature)
        g_weights = (rows * grad).sum(-1, dtype=weights.dtype)
    return [g_logits, g_v, g_weights, None, None]


def _matvec_jvp(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor:
    logits, v, weights, logsumexp, temperature = inputs
    common = (weights, logsumexp, temperature)
    result = torch.zeros_like(output)
    if tangents[0] is not None:
        result = result + matvec_backward(logits, v, tangents[0], *common)
    if tangents[1] is not None:
        result = result + matvec(logits, tangents[1], *common)
    if tangents[2] is not None:
        rows = matvec(logits, v, _unit(weights), logsumexp, temperature)
        result = result + rows * tangents[2][..., None].to(rows.dtype)
    return result


def _fourth_cumulant(
    logits: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    weights: Tensor | None,
    temperature: float,
) -> Tensor:
    """Derivative of ⟨c, matvec_backward(z, a, b)⟩ in z; only second derivatives come here."""
    p = probabilities(logits, weights, temperature)
    a, b, c = (x - (p * x).sum(-1, keepdim=True) for x in (a, b, c))

    def mean(x: Tensor) -> Tensor:
        return (p * x).sum(-1, keepdim=True)

    product = a * b * c
    rows = product - mean(product) - a * mean(b * c) - b * mean(a * c) - c * mean(a * b)
    rows = p * rows / temperature**4
    if weights is not None:
        rows = torch.where((weights == 0)[..., None], 0, rows * weights[..., None])
    return rows.to(logits.dtype)


def _matvec_backward_vjp(inputs: Sequence[Any], _: Tensor, grad: Tensor, needs: Needs) -> list[Any]:
    logits, v, g, weights, logsumexp, temperature = inputs
    common = (weights, logsumexp, temperature)
    g_logits = _fourth_cumulant(logits, v, g, grad, weights, temperature) if needs[0] else None
    g_v = matvec_backward(logits, g, grad, *common) if needs[1] else None
    g_g = matvec_backward(logits, v, grad, *common) if needs[2] else None
    g_weights = None
    if needs[3]:
        rows = matvec_backward(logits, v, g, _unit(weights), logsumexp, temperature)
        g_weights = (rows * grad).sum(-1, dtype=weights.dtype)
    return [g_logits, g_v, g_g, g_weights, None, None]


def _matvec_backward_jvp(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor:
    logits, v, g, weights, logsumexp, temperature = inputs
    common = (weights, logsumexp, temperature)
    result = torch.zeros_like(output)
    if tangents[0] is not None:
        result = result + _fourth_cumulant(logits, v, g, tangents[0], weights, temperature)
    if tangents[1] is not None:
        result = result + matvec_backward(logits, tangents[1], g, *common)
    if tangents[2] is not None:
        result = result + matvec_backward(logits, v, tangents[2], *common)
    if tangents[3] is not None:
        rows = matvec_backward(logits, v, g, _unit(weights), logsumexp, temperature)
        result = result + rows * tangents[3][..., None].to(rows.dtype)
    return result


def _root_gradient(
    inputs: Sequence[Any], right: Tensor, left: Tensor, dtype: torch.dtype
) -> Tensor:
    """Derivative of ⟨left, √w L right⟩ in z, in plain PyTorch (L of fisherkern.reference)."""
    logits, _, weights, _, temperature = inputs
    p = probabilities(logits, weights, temperature)
    root = p.sqrt()
    centred = left - (p * left).sum(-1, keepdim=True)
    rows = root * right * centred / 2 - p * left * (root * right).sum(-1, keepdim=True)
    rows = (rows - p * rows.sum(-1, keepdim=True)) / temperature**2
    if weights is not None:
        rows = torch.where((weights == 0)[..., None], 0, rows * weights[..., None])
    return rows.to(dtype)


def _sqrt_matvec_vjp(inputs: Sequence[Any], _: Tensor, grad: Tensor, needs: Needs) -> list[Any]:
    logits, v, *common = inputs
    g_logits = _root_gradient(inputs, v, grad, logits.dtype) if needs[0] else None
    return [g_logits, sqrt_rmatvec(logits, grad, *common) if needs[1] else None, None, None, None]


def _sqrt_rmatvec_vjp(inputs: Sequence[Any], _: Tensor, grad: Tensor, needs: Needs) -> list[Any]:
    logits, v, *common = inputs
    g_logits = _root_gradient(inputs, grad, v, logits.dtype) if needs[0] else None
    return [g_logits, sqrt_matvec(logits, grad, *common) if needs[1] else None, None, None, None]


def _root_tangent(inputs: Sequence[Any], direction: Tensor, *, transposed: bool) -> Tensor:
    """Derivative of √w L v (or √w Lᵀ v) in z along `direction`, in plain PyTorch."""
    logits, v, weights, _, temperature = inputs
    p = probabilities(logits, weights, temperature)
    root = p.sqrt()
    centred = (direction - (p * direction).sum(-1, keepdim=True)) / temperature
    d_p, d_root = p * centred, root * centred / 2
    if transposed:
        mean = (p * v).sum(-1, keepdim=True)
        rows = d_root * (v - mean) - root * (d_p * v).sum(-1, keepdim=True)
    else:
        rows = d_root * v - d_p * (root * v).sum(-1, keepdim=True)
        rows = rows - p * (d_root * v).sum(-1, keepdim=True)
    rows = rows / temperature
    if weights is not None:
        rows = torch.where((weights == 0)[..., None], 0, rows * weights[..., None])
    return rows.to(logits.dtype)


def _sqrt_matvec_jvp(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor:
    logits, _, *common = inputs
    result = torch.zeros_like(output)
    if tangents[0] is not None:
        result = result + _root_tangent(inputs, tangents[0], transposed=False)
    if tangents[1] is not None:
        result = result + sqrt_matvec(logits, tangents[1], *common)
    return result


def _sqrt_rmatvec_jvp(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor:
    logits, _, *common = inputs
    result = torch.zeros_like(output)
    if tangents[0] is not None:
        result = result + _root_tangent(inputs, tangents[0], transposed=True)
    if tangents[1] is not None:
        result = result + sqrt_rmatvec(logits, tangents[1], *common)
    return result


matvec = differentiable(_matvec_op, vjp=_matvec_vjp, jvp=_matvec_jvp)
matvec_backward = differentiable(
    _matvec_backward_op, vjp=_matvec_backward_vjp, jvp=_matvec_backward_jvp
)
sqrt_matvec = differentiable(_sqrt_matvec_op, vjp=_sqrt_matvec_vjp, jvp=_sqrt_matvec_jvp)
sqrt_rmatvec = differentiable(_sqrt_rmatvec_op, vjp=_sqrt_rmatvec_vjp, jvp=_sqrt_rmatvec_jvp)

# ---- public -----------------------------------------------------------------------------------


def _product(
    function: Any,
    out_op: Any,
    logits: Tensor,
    v: Tensor,
    temperature: float,
    mask: Tensor | None,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    out: Tensor | None,
    *,
    root: bool,
) -> Tensor:
    z = checks.logits(logits)
    rows = checks.rows("v", v, z)
    if out is not None:
        checks.out(out, z.shape, z.dtype, {"logits": z, "v": rows})
    w, lse, tau = check_tokens(z, temperature, mask, weights, logsumexp)
    if root and weights is not None and w is not None:
        w = w.sqrt()
    if out is None:
        return function(z, rows, w, lse, tau)
    out_op(z, rows, w, lse, tau, out=out)
    return out


def softmax_fisher_matvec(
    logits: Tensor,
    v: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Fisher-vector product of every token: w F v = w p ⊙ (v − ⟨p, v⟩) / τ².

    Args:
        logits: z [..., V]; float32, bfloat16, float16 or float64 (float64: CPU and reference).
        v: vectors [..., V] of the dtype of the logits, or one [V] for all tokens.
        temperature: τ > 0; p = softmax(z / τ).
        mask: bool [...]; a token that is False has a result of exactly zero whatever its row holds.
        weights: float [...] >= 0, instead of a mask; each result is multiplied by its weight.
        logsumexp: logsumexp(z / τ) [...] in float32 (float64 for float64 logits), if at hand: it
            saves one pass over the logits. Treated as a cached function of the logits.
        out: destination [..., V] of the dtype of the logits; no autograd.

    Returns:
        [..., V] in the dtype of the logits, accumulated in float32 (float64 for float64).
        Differentiable in `logits` and `v`, any number of times, in both modes (but forward mode
        inside forward mode, which raises NotImplementedError).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value; or an
            `out` that overlaps an input. Nothing is written.

    Source: Schraudolph 2002, "Fast curvature matrix-vector products for second-order gradient
    descent", section 3.

    >>> import torch, fisherkern
    >>> z, v = torch.zeros(2, 4), torch.tensor([1.0, 0.0, 0.0, 0.0])
    >>> fisherkern.softmax_fisher_matvec(z, v)[0]
    tensor([ 0.1875, -0.0625, -0.0625, -0.0625])
    """
    arguments = (logits, v, temperature, mask, weights, logsumexp, out)
    return _product(matvec, _matvec_out, *arguments, root=False)


def softmax_fisher_sqrt_matvec(
    logits: Tensor,
    v: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Square root of the Fisher times a vector: √w L v = √w (√p ⊙ v − p ⟨√p, v⟩) / τ.

    L = (diag √p − p √pᵀ) / τ, so that L Lᵀ = F: v ~ N(0, I) gives a sample with covariance w F.
    Weights enter as their square root, so that the factor of w F is what is applied.

    Args:
        logits: z [..., V].
        v: vectors [..., V] of the dtype of the logits, or one [V] for all tokens.
        temperature: τ > 0.
        mask: bool [...].
        weights: float [...] >= 0, instead of a mask.
        logsumexp: logsumexp(z / τ) [...], if at hand.
        out: destination [..., V]; no autograd.

    Returns:
        [..., V] in the dtype of the logits. Differentiable in `logits` and `v`; in
        `logits` with temporaries of their size.

    Raises:
        TypeError, ValueError: as :func:`softmax_fisher_matvec`.

    Source: Botev, Ritter & Barber 2017, "Practical Gauss-Newton optimisation for deep learning",
    appendix A.

    >>> import torch, fisherkern
    >>> z = torch.zeros(1, 4)
    >>> fisherkern.softmax_fisher_sqrt_matvec(z, torch.ones(4)).abs().max() < 1e-6
    tensor(True)
    """
    arguments = (logits, v, temperature, mask, weights, logsumexp, out)
    return _product(sqrt_matvec, _sqrt_matvec_out, *arguments, root=True)


def softmax_fisher_sqrt_rmatvec(
    logits: Tensor,
    v: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Transposed square root of the Fisher times a vector: √w Lᵀ v = √w √p ⊙ (v − ⟨p, v⟩) / τ.

    The transpose of :func:`softmax_fisher_sqrt_matvec`; ‖Lᵀ v‖² = vᵀ F v.

    Args:
        logits: z [..., V].
        v: vectors [..., V] of the dtype of the logits, or one [V] for all tokens.
        temperature: τ > 0.
        mask: bool [...].
        weights: float [...] >= 0, instead of a mask.
        logsumexp: logsumexp(z / τ) [...], if at hand.
        out: destination [..., V]; no autograd.

    Returns:
        [..., V] in the dtype of the logits. Differentiable in `logits` and `v`; in
        `logits` with temporaries of their size.

    Raises:
        TypeError, ValueError: as :func:`softmax_fisher_matvec`.

    Source: Botev, Ritter & Barber 2017, appendix A.

    >>> import torch, fisherkern
    >>> z, v = torch.zeros(1, 4), torch.tensor([1.0, 0.0, 0.0, 0.0])
    >>> fisherkern.softmax_fisher_sqrt_rmatvec(z, v).square().sum()
    tensor(0.1875)
    """
    arguments = (logits, v, temperature, mask, weights, logsumexp, out)
    return _product(sqrt_rmatvec, _sqrt_rmatvec_out, *arguments, root=True)
