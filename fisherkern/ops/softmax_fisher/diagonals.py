"""The diagonal of F = (diag p − p pᵀ) / τ², per token or over tokens; the mean probabilities."""

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
    per_class_output,
    probabilities,
    row_output,
)
from fisherkern.ops.softmax_fisher.products import matvec
from fisherkern.reference import accumulation_dtype, normalised

_ARGUMENTS = "Tensor logits, Tensor? weights, Tensor? logsumexp, float temperature"

# ---- raw ops ----------------------------------------------------------------------------------


def _diagonal_into(
    logits: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> None:
    if out.numel() == 0:
        return
    z, result = token_rows(logits.ndim - 1, logits, out)
    kernel = kernels(logits).softmax_fisher_diagonal
    kernel(z, flat(weights), flat(logsumexp), temperature, result)
    write_back(out, result)


def _diagonal(
    logits: Tensor, weights: Tensor | None, logsumexp: Tensor | None, temperature: float
) -> Tensor:
    out = row_output(logits)
    _diagonal_into(logits, weights, logsumexp, temperature, out)
    return out


def _diagonal_out(
    logits: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    *,
    out: Tensor,
) -> None:
    check_disjoint(out, {"logits": logits, "logsumexp": logsumexp})
    _diagonal_into(logits, weights, logsumexp, temperature, out)


_diagonal_op = define(
    f"softmax_fisher_diagonal({_ARGUMENTS}) -> Tensor",
    _diagonal,
    lambda logits, *_: row_output(logits),
)
_diagonal_out_op = define(
    f"softmax_fisher_diagonal.out({_ARGUMENTS}, *, Tensor(a!) out) -> ()",
    _diagonal_out,
    lambda *_, out: None,
    vmap="none",
)


def _define_token_sum(name: str) -> tuple[Any, Any]:
    """An op [..., V] → [V] that sums weighted rows, and its out variant."""

    def into(
        logits: Tensor,
        weights: Tensor | None,
        logsumexp: Tensor | None,
        temperature: float,
        out: Tensor,
    ) -> None:
        if logits.numel() == 0:
            out.zero_()
            return
        (z,) = token_rows(logits.ndim - 1, logits)
        result = out if out.is_contiguous() else torch.empty_like(out).contiguous()
        kernel = getattr(kernels(logits), name)
        kernel(z, flat(weights), flat(logsumexp), temperature, result)
        write_back(out, result)

    def functional(
        logits: Tensor, weights: Tensor | None, logsumexp: Tensor | None, temperature: float
    ) -> Tensor:
        out = per_class_output(logits)
        into(logits, weights, logsumexp, temperature, out)
        return out

    def checked_into(
        logits: Tensor,
        weights: Tensor | None,
        logsumexp: Tensor | None,
        temperature: float,
        *,
        out: Tensor,
    ) -> None:
        check_disjoint(out, {"logits": logits, "logsumexp": logsumexp})
        into(logits, weights, logsumexp, temperature, out)

    op = define(
        f"{name}({_ARGUMENTS}) -> Tensor",
        functional,
        lambda logits, *_: per_class_output(logits),
        vmap="loop",
    )
    out_op = define(
        f"{name}.out({_ARGUMENTS}, *, Tensor(a!) out) -> ()",
        checked_into,
        lambda *_, out: None,
        vmap="none",
    )
    return op, out_op


_diagonal_sum_op, _diagonal_sum_out = _define_token_sum("softmax_fisher_diagonal_sum")
_mean_probs_op, _mean_probs_out = _define_token_sum("softmax_fisher_mean_probs")

# ---- derivatives ------------------------------------------------------------------------------


def _over_tokens(rows: Tensor, output: Tensor) -> Tensor:
    return rows.reshape(rows.shape[:-1].numel(), rows.shape[-1]).sum(0, dtype=output.dtype)


def _slope(inputs: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """p, and ∂(p (1 − p)) / ∂p / τ² = (1 − 2p) / τ² in plain PyTorch: no fused backward here."""
    logits, weights, _, temperature = inputs
    p = probabilities(logits, weights, temperature)
    return p, (1 - 2 * p) / temperature**2


def _matvec(inputs: Sequence[Any], v: Tensor, centre: Tensor) -> Tensor:
    """F v [..., V] for v in the accumulation dtype: `matvec` takes it in that of the logits.

    A cotangent of a float32 result may not fit into half precision, and F takes differences of it
    (F 1 = 0): of v − centre the digits that count are left, and its size is put into the weights.
    """
    logits, weights, logsumexp, temperature = inputs
    if logits.dtype != v.dtype:
        v = v - centre.detach()
        size = v.detach().abs().amax(-1, keepdim=True)
        size = torch.where(size == 0, 1, size)
        v, size = v / size, size[..., 0].expand(logits.shape[:-1])
        weights = size if weights is None else weights * size
    v = v.to(logits.dtype).expand(logits.shape)
    return matvec(logits, v, weights, logsumexp, temperature)


def _mean_probs_vjp(inputs: Sequence[Any], output: Tensor, grad: Tensor, needs: Any) -> list[Any]:
    v, temperature = grad.to(output.dtype), inputs[3]
    centre = (output * v).sum() / output.sum().clamp_min(torch.finfo(output.dtype).tiny)
    return [_matvec(inputs, temperature * v, temperature * centre), None, None, None]


def _mean_probs_jvp(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor:
    logits, weights, logsumexp, temperature = inputs
    rows = matvec(logits, temperature * tangents[0], weights, logsumexp, temperature)
    return _over_tokens(rows, output)


def _diagonal_vjp(inputs: Sequence[Any], _: Tensor, grad: Tensor, needs: Any) -> list[Any]:
    p, slope = _slope(inputs)
    v = inputs[3] * grad * slope
    return [_matvec(inputs, v, (p * v).sum(-1, keepdim=True)), None, None, None]


def _diagonal_jvp(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor:
    logits, weights, logsumexp, temperature = inputs
    rows = matvec(logits, temperature * tangents[0], weights, logsumexp, temperature)
    rows = rows * _slope(inputs)[1]
    return rows.to(output.dtype) if output.shape == rows.shape else _over_tokens(rows, output)


mean_probs = differentiable(_mean_probs_op, vjp=_mean_probs_vjp, jvp=_mean_probs_jvp, vmap="loop")
diagonal = differentiable(_diagonal_op, vjp=_diagonal_vjp, jvp=_diagonal_jvp)
diagonal_sum = differentiable(_diagonal_sum_op, vjp=_diagonal_vjp, jvp=_diagonal_jvp, vmap="loop")

# ---- public -----------------------------------------------------------------------------------


def _check_out(out: object, z: Tensor, reduction: str) -> None:
    if out is None:
        return
    if reduction == "none":
        checks.out(out, z.shape, z.dtype, {"logits": z})
    else:
        checks.out(out, z.shape[-1:], accumulation_dtype(z.dtype), {"logits": z})


def softmax_fisher_diagonal(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    reduction: str = "none",
    out: Tensor | None = None,
) -> Tensor:
    """Diagonal of the Fisher, w p (1 − p) / τ², per token or reduced over tokens in one pass.

    Args:
        logits: z [..., V]; float32, bfloat16, float16 or float64 (float64: CPU and reference).
        temperature: τ > 0; p = softmax(z / τ).
        mask: bool [...]; tokens that are False contribute exactly zero.
        weights: float [...] >= 0, instead of a mask.
        logsumexp: logsumexp(z / τ) [...], if at hand.
        reduction: "none" → [..., V]; "sum" → Σ w p (1 − p) / τ² [V]; "mean" divides it by N = Σ w
            (zeros where N = 0). Reduced results need no [T, V] memory and add in a fixed order.
        out: destination of the shape and dtype of the result; no autograd.

    Returns:
        Per token: the dtype of the logits. Reduced: float32 (float64 for float64 logits).
        Differentiable in `logits`; the derivative makes temporaries of the size of the logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: Martens 2020, "New insights and perspectives on the natural gradient method".

    >>> import torch, fisherkern
    >>> fisherkern.softmax_fisher_diagonal(torch.zeros(3, 2), reduction="mean")
    tensor([0.2500, 0.2500])
    """
    z = checks.logits(logits)
    checks.reduction(reduction, ("none", "mean", "sum"))
    _check_out(out, z, reduction)
    w, lse, tau = check_tokens(z, temperature, mask, weights, logsumexp)
    w = normalised(w, z, reduction)
    function, out_op = (
        (diagonal, _diagonal_out_op) if reduction == "none" else (diagonal_sum, _diagonal_sum_out)
    )
    if out is None:
        return function(z, w, lse, tau)
    out_op(z, w, lse, tau, out=out)
    return out


def softmax_fisher_mean_probs(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    reduction: str = "mean",
    out: Tensor | None = None,
) -> Tensor:
    """Mean probabilities D̄ = Σ w p / N: at τ = 1 the diagonal part of the mean Fisher D̄ − U Uᵀ.

    Args:
        logits: z [..., V].
        temperature: τ > 0; p = softmax(z / τ).
        mask: bool [...]; tokens that are False contribute exactly zero.
        weights: float [...] >= 0, instead of a mask.
        logsumexp: logsumexp(z / τ) [...], if at hand.
        reduction: "mean" (divide by N = Σ w; zeros where N = 0) or "sum".
        out: destination [V] of the dtype of the result; no autograd.

    Returns:
        [V] in float32 (float64 for float64 logits): probabilities of a vocabulary underflow in
        float16. The order of addition is fixed. Differentiable in `logits` without temporaries.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: the diagonal part of Woodbury's form of the mean Fisher, docs/conventions.md.

    >>> import torch, fisherkern
    >>> fisherkern.softmax_fisher_mean_probs(torch.zeros(3, 4))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    z = checks.logits(logits)
    checks.reduction(reduction, ("mean", "sum"))
    _check_out(out, z, reduction)
    w, lse, tau = check_tokens(z, temperature, mask, weights, logsumexp)
    w = normalised(w, z, reduction)
    if out is None:
        return mean_probs(z, w, lse, tau)
    _mean_probs_out(z, w, lse, tau, out=out)
    return out
