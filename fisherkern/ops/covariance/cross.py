"""Products of two kinds of rows: cross-covariance, and the squared gradients of EKFAC."""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._kernels import kernels
from fisherkern.ops._library import define
from fisherkern.ops._rows import flat, token_rows
from fisherkern.ops._values import check_disjoint
from fisherkern.ops.covariance._common import (
    Tokens,
    check_options,
    check_tokens,
    check_update,
    coordinates,
    new_factor,
    token_count,
)


def _update(
    factor: Tensor,
    x: Tensor,
    g: Tensor,
    mask: Tensor | None,
    weights: Tensor | None,
    alpha: Tensor,
    beta: float,
    bias: bool,
    form: str,
    precision: str,
) -> None:
    check_disjoint(factor, {"x": x, "g": g}, name="factor")
    if x.numel() == 0:
        factor.mul_(beta) if beta else factor.zero_()
        return
    if form == "samples":
        # [..., S, d]: the kernels need to know where a sample ends
        samples, length = x.shape[:-2].numel(), x.shape[-2]
        rows = [t.reshape(samples, length, t.shape[-1]) for t in (x, g)]
        rows = [t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous() for t in rows]
    else:
        rows = token_rows(x.ndim - 1, x, g)
    target = factor if factor.stride(-1) == 1 or factor.shape[-1] == 1 else factor.contiguous()
    kernels(x, products=True).cross_update(
        *rows,
        flat(mask),
        flat(weights),
        alpha,
        beta,
        bias,
        form,
        precision,
        target,
    )
    if target is not factor:
        factor.copy_(target)


_update_op = define(
    "cross_update_(Tensor(a!) factor, Tensor x, Tensor g, Tensor? mask, Tensor? weights, "
    "Tensor alpha, float beta, bool bias, str form, str precision) -> ()",
    _update,
    lambda *_: None,
    vmap="none",
)


def _sample_count(x: Tensor, tokens: Tokens) -> Tensor | int:
    if tokens.either is None:
        return x.shape[:-2].numel() if x.shape[-2] else 0
    return (tokens.either != 0).any(-1).sum(dtype=torch.float64)


# ---- public -----------------------------------------------------------------------------------


def cross_covariance(
    g: Tensor,
    x: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    bias: bool = False,
    reduction: str = "mean",
    precision: str = "tf32x3",
) -> Tensor:
    """Scale · Σ w g x̃ᵀ / N: for output gradients g and inputs x, the gradient of a linear layer.

    Args:
        g: [..., d_out], of the dtype of x.
        x: [..., d_in]; float32, bfloat16, float16, or float64 on the CPU and the reference.
        scale: factor of the result.
        mask: bool [...] over the tokens; False contributes exactly zero.
        weights: float [...] >= 0, instead of a mask.
        bias: append the homogeneous coordinate 1 to every row of x.
        reduction: "mean" (divide by N = Σ w; zeros where N = 0) or "sum".
        precision: of float32 products on CUDA, see :func:`covariance_update_`.

    Returns:
        [d_out, d_in], one column more with `bias`, in float32 (float64 for float64 inputs). Not
        differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: Martens and Grosse 2015, section 2.1.

    >>> import torch, fisherkern
    >>> g, x = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> fisherkern.cross_covariance(g, x, bias=True, reduction="sum")
    tensor([[3., 8., 3.]])
    """
    z = checks.activations("x", x, 1).detach()
    y = checks.paired("g", g, z).detach()
    check_options(None, scale, reduction, precision)
    tokens = check_tokens(mask, weights, z, z.ndim - 1)
    factor = new_factor(z, y.shape[-1], coordinates(z.shape[-1], bias))
    update = check_update(
        factor,
        token_count(z, tokens, z.ndim - 1),
        ema_decay=0.0,
        scale=scale,
        reduction=reduction,
    )
    _update_op(factor, z, y, tokens.mask, tokens.weights, *update, bool(bias), "product", precision)
    return factor


def squared_gradient_update_(
    factor: Tensor,
    x: Tensor,
    g: Tensor,
    *,
    ema_decay: float | None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    bias: bool = False,
    per_sample: bool = False,
    reduction: str = "mean",
    precision: str = "tf32x3",
) -> Tensor:
    """D ← β D + (1 − β) · scale · Σ (gradients)² / N in place, the diagonal of EKFAC.

    With inputs and gradients already rotated into the eigenbases of A and G, D is the second moment
    of the gradient there; without, it is the diagonal of the (empirical or sampled) Fisher of a
    linear layer.

    Args:
        factor: D [d_out, d_in], one column more with `bias`; float32, or float64 (which float64
            inputs need).
        x: inputs [..., d_in], with `per_sample` [..., S, d_in].
        g: output gradients [..., d_out], of the dtype of x.
        ema_decay: β in [0, 1], the weight of the old value; None adds to D instead. At 0 the old
            value is not read, at 1 D stays as it is.
        scale: factor of the new term.
        mask: bool [...] over the tokens; False contributes exactly zero.
        weights: float [...] >= 0, instead of a mask.
        bias: append the homogeneous coordinate 1 to every row of x.
        per_sample: False squares the gradient of every token, Σ_t w_t (g_t²)(x̃_t²)ᵀ ("expand").
            True squares that of every sample, Σ_b (Σ_s w g x̃ᵀ)², positions summed first, without
            storing [B, d_out, d_in].
        reduction: "mean" divides by N (Σ w; per sample the number of samples that have a token of
            weight other than zero), "sum" does not. N = 0 gives a new term of zero.
        precision: of float32 products on CUDA, see :func:`covariance_update_`.

    Returns:
        `factor`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value;
            `factor` is untouched then.

    Source: George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis", equation 9.

    >>> import torch, fisherkern
    >>> D = torch.zeros(1, 2)
    >>> g, x = torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    >>> fisherkern.squared_gradient_update_(D, x, g, ema_decay=None, reduction="sum")
    tensor([[ 9., 64.]])
    """
    z = checks.activations("x", x, 2 if per_sample else 1).detach()
    y = checks.paired("g", g, z).detach()
    check_options(ema_decay, scale, reduction, precision)
    d = checks.factor(factor, [y.shape[-1], coordinates(z.shape[-1], bias)], z)
    tokens = check_tokens(mask, weights, z, z.ndim - 1)
    if ema_decay == 1:
        return factor
    count = _sample_count(z, tokens) if per_sample else token_count(z, tokens, z.ndim - 1)
    update = check_update(d, count, ema_decay=ema_decay, scale=scale, reduction=reduction)
    form = "samples" if per_sample else "squares"
    _update_op(d, z, y, tokens.mask, tokens.weights, *update, bool(bias), form, precision)
    return factor
