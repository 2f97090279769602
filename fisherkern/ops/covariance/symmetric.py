"""covariance, covariance_update_ and mirror_: A ← β A + (1 − β) C in one pass over the activations.

Kernels compute, read and write the lower triangle alone. The public ops mirror it, at d² memory
traffic beside T·d² arithmetic, unless ``mirror=False`` says that the caller will.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._kernels import kernels
from fisherkern.ops._library import define
from fisherkern.ops._rows import flat, token_rows
from fisherkern.ops._values import check_disjoint
from fisherkern.ops.covariance._common import (
    check_options,
    check_tokens,
    check_update,
    coordinates,
    new_factor,
    token_count,
)


def _mirror(factor: Tensor) -> None:
    if factor.ndim > 3:
        for part in factor:
            _mirror(part)
    elif factor.numel():
        heads = factor if factor.ndim == 3 else factor.unsqueeze(0)
        kernels(factor, torch.float32).mirror(heads)


def _update(
    factor: Tensor,
    x: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    alpha: Tensor,
    beta: float,
    bias: bool,
    precision: str,
    mirror: bool,
) -> None:
    heads = factor.ndim == 3
    check_disjoint(factor, {"x": x}, name="factor")
    if x.numel() == 0:
        lower = torch.ones_like(factor, dtype=torch.bool).tril()
        # a beta of zero does not let a NaN through
        factor.copy_(torch.where(lower, beta * factor if beta else 0.0, factor))
    else:
        lead = x.ndim - 1 - heads
        (rows,) = token_rows(lead, x if heads else x.unsqueeze(-2))
        # a factor without unit stride goes through a copy
        target = factor if factor.stride(-1) == 1 or factor.shape[-1] == 1 else factor.contiguous()
        kernels(x, products=True).covariance_update(
            rows,
            flat(mask),
            flat(weights),
            alpha,
            beta,
            bias,
            precision,
            target if heads else target.unsqueeze(0),
        )
        if target is not factor:
            lower = torch.ones_like(target, dtype=torch.bool).tril()
            factor.copy_(torch.where(lower, target, factor))
    if mirror:
        _mirror(factor)


_update_op = define(
    "covariance_update_(Tensor(a!) factor, Tensor x, Tensor? mask, Tensor? weights, Tensor alpha, "
    "float beta, bool bias, str precision, bool mirror) -> ()",
    _update,
    lambda *_: None,
    vmap="none",
)
_mirror_op = define("mirror_(Tensor(a!) factor) -> ()", _mirror, lambda _: None, vmap="none")

# ---- public -----------------------------------------------------------------------------------


def mirror_(factor: Tensor) -> Tensor:
    """Copy the lower triangle of each matrix onto its upper triangle, in place.

    Args:
        factor: [..., D, D], float32 or float64; its upper triangle may hold anything.

    Returns:
        `factor`, now exactly symmetric.

    Raises:
        TypeError, ValueError: `factor` is no tensor of these dtypes, not square, or requires grad.

    Source: the convention of BLAS for symmetric results (syrk): one triangle is computed.

    >>> import torch, fisherkern
    >>> fisherkern.mirror_(torch.tensor([[1.0, float("nan")], [2.0, 3.0]]))
    tensor([[1., 2.],
            [2., 3.]])
    """
    a = checks.activations("factor", factor, 2)
    checks.factor(a, [*a.shape[:-2], a.shape[-1], a.shape[-1]], a)
    _mirror_op(a)
    return factor


def covariance_update_(
    factor: Tensor,
    x: Tensor,
    *,
    ema_decay: float | None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    bias: bool = False,
    reduction: str = "mean",
    precision: str = "tf32x3",
    mirror: bool = True,
) -> Tensor:
    """A ← β A + (1 − β) · scale · Σ w x̃ x̃ᵀ / N in place: one fused, masked, symmetric update.

    Half the arithmetic of X.T @ X, and no copy of X: masking, weights, the bias coordinate, the
    conversion to float32 and the moving average are part of the product.

    Args:
        factor: A [D, D] with D = d, plus one with `bias`; or [H, D, D], one factor per head of
            x [..., H, d]. float32, or float64 (which float64 inputs need). Only its lower triangle
            is read.
        x: [..., d] or [..., H, d]: activations a for A, output gradients g for G; float32,
            bfloat16, float16, or float64 on the CPU and the reference back end. Not differentiated.
        ema_decay: β in [0, 1], the weight of the old value; None adds to A instead: A + C. At 0 the
            old value is not read, at 1 A stays as it is.
        scale: factor of the new term, such as N² where g is the gradient of a mean-reduced loss.
        mask: bool [...] over the tokens; False contributes exactly zero, whatever the row holds.
        weights: float [...] >= 0, instead of a mask. Applied in float32, as w on one side or
            as its root on both.
        bias: append the homogeneous coordinate 1 to every row, without storing it.
        reduction: "mean" divides by N = Σ w (where N = 0 the new term is zero), "sum" does not.
        precision: of float32 products on CUDA tensor cores: "tf32x3" (three TF32 products) or
            "bf16x6" (six bfloat16 products), both with an error about that of float32; "tf32" (one
            product, relative error up to 1e-3); "ieee" (float32 units, slow). On the CPU all but
            "ieee" may use matrix units for bfloat16.
        mirror: copy the lower triangle onto the upper one afterwards. With False the upper triangle
            keeps what it held: call :func:`mirror_` before anyone reads it.

    Returns:
        `factor`, exactly symmetric (with `mirror`).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value;
            `factor` is untouched then.

    Source: Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored approximate
    curvature", section 5 (moving averages) and 2.3 (homogeneous coordinate).

    >>> import torch, fisherkern
    >>> A = torch.eye(2)
    >>> x = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
    >>> fisherkern.covariance_update_(A, x, ema_decay=0.5)
    tensor([[1.5000, 0.0000],
            [0.0000, 4.5000]])
    """
    heads = isinstance(factor, Tensor) and factor.ndim == 3
    z = checks.activations("x", x, 2 if heads else 1).detach()
    check_options(ema_decay, scale, reduction, precision)
    width = coordinates(z.shape[-1], bias)
    a = checks.factor(factor, [*z.shape[-2:-1], width, width] if heads else [width, width], z)
    lead = z.ndim - 1 - heads
    tokens = check_tokens(mask, weights, z, lead)
    if ema_decay == 1:
        return mirror_(a) if mirror else a
    update = check_update(
        a, token_count(z, tokens, lead), ema_decay=ema_decay, scale=scale, reduction=reduction
    )
    _update_op(a, z, tokens.mask, tokens.weights, *update, bool(bias), precision, bool(mirror))
    return factor


def covariance(
    x: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    bias: bool = False,
    heads: bool = False,
    reduction: str = "mean",
    precision: str = "tf32x3",
) -> Tensor:
    """C = scale · Σ w x̃ x̃ᵀ / N, a Kronecker factor of one batch.

    Args:
        x: [..., d], or [..., H, d] with `heads`.
        scale: factor of the result.
        mask: bool [...] over the tokens; False contributes exactly zero.
        weights: float [...] >= 0, instead of a mask.
        bias: append the homogeneous coordinate 1 to every row.
        heads: one covariance per head.
        reduction: "mean" (divide by N = Σ w; zeros where N = 0) or "sum".
        precision: of float32 products on CUDA, see :func:`covariance_update_`.

    Returns:
        [D, D] or [H, D, D] in float32 (float64 for float64 inputs), exactly symmetric. Not
        differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: Martens and Grosse 2015; Grosse and Martens 2016 for weights shared by positions.

    >>> import torch, fisherkern
    >>> fisherkern.covariance(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), reduction="sum")
    tensor([[10., 14.],
            [14., 20.]])
    """
    z = checks.activations("x", x, 2 if heads else 1)
    width = coordinates(z.shape[-1], bias)
    return covariance_update_(
        new_factor(z, *(z.shape[-2:-1] if heads else ()), width, width),
        z,
        ema_decay=0.0,
        scale=scale,
        mask=mask,
        weights=weights,
        bias=bias,
        reduction=reduction,
        precision=precision,
    )
