"""Per-token scalars of F = (diag p − p pᵀ) / τ² in one read of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkern import checks, reference
from fisherkern.ops._kernels import kernels
from fisherkern.ops._library import define, differentiable
from fisherkern.ops._rows import flat, token_rows, write_back
from fisherkern.ops.softmax_fisher._common import (
    check_tokens,
    per_token_output,
    reduce_tokens,
    row_output,
)
from fisherkern.reference import SoftmaxFisherStats

_ARGUMENTS = "Tensor logits, Tensor? mask, Tensor? logsumexp, float temperature"
_FIELDS = len(SoftmaxFisherStats._fields)
_TRACE = SoftmaxFisherStats._fields.index("trace")

# ---- raw ops ----------------------------------------------------------------------------------


def _trace(
    logits: Tensor, mask: Tensor | None, logsumexp: Tensor | None, temperature: float
) -> Tensor:
    out = per_token_output(logits)
    if logits.numel() == 0:
        return out.zero_()
    (z,) = token_rows(logits.ndim - 1, logits)
    kernels(logits).softmax_fisher_trace(z, flat(mask), flat(logsumexp), temperature, out.view(-1))
    return out


def _stats(
    logits: Tensor, mask: Tensor | None, logsumexp: Tensor | None, temperature: float
) -> Tensor:
    out = per_token_output(logits, _FIELDS)
    if logits.numel() == 0:
        # no classes: an empty sum of exponentials, and nothing else
        out.zero_()
        out[..., 0] = -torch.inf if mask is None else torch.where(mask, -torch.inf, 0.0)
        return out
    (z,) = token_rows(logits.ndim - 1, logits)
    result = out.view(-1, _FIELDS)
    kernels(logits).softmax_fisher_stats(z, flat(mask), flat(logsumexp), temperature, result)
    return out


def _stats_backward(
    logits: Tensor, stats: Tensor, grad: Tensor, mask: Tensor | None, temperature: float
) -> Tensor:
    out = row_output(logits)
    if out.numel():
        z, result = token_rows(logits.ndim - 1, logits, out)
        per_token = (x.reshape(-1, _FIELDS).contiguous() for x in (stats, grad))
        kernel = kernels(logits).softmax_fisher_stats_backward
        kernel(z, *per_token, flat(mask), temperature, result)
        write_back(out, result)
    return out


_trace_op = define(
    f"softmax_fisher_trace({_ARGUMENTS}) -> Tensor",
    _trace,
    lambda logits, *_: per_token_output(logits),
)
_stats_op = define(
    f"softmax_fisher_stats({_ARGUMENTS}) -> Tensor",
    _stats,
    lambda logits, *_: per_token_output(logits, _FIELDS),
)
_stats_backward_op = define(
    "softmax_fisher_stats_backward(Tensor logits, Tensor stats, Tensor grad, Tensor? mask, "
    "float temperature) -> Tensor",
    _stats_backward,
    lambda logits, *_: row_output(logits),
)

# ---- derivatives ------------------------------------------------------------------------------


def _through_reference(function: Any, primals: Sequence[Any]) -> tuple[Any, list[int]]:
    """`function` of its floating-point tensors alone, and their positions."""
    positions = [
        i for i, x in enumerate(primals) if isinstance(x, Tensor) and x.is_floating_point()
    ]

    def of_tensors(*tensors: Tensor) -> Tensor:
        arguments = list(primals)
        for i, x in zip(positions, tensors, strict=True):
            arguments[i] = x
        return function(*arguments)

    return of_tensors, positions


def _backward_reference(
    logits: Tensor, stats: Tensor, grad: Tensor, mask: Tensor | None, temperature: float
) -> Tensor:
    return reference.softmax_fisher_stats_backward(
        logits, stats, grad, mask=mask, temperature=temperature
    )


def _stats_backward_vjp(inputs: Sequence[Any], _: Tensor, grad: Tensor, needs: Any) -> list[Any]:
    # second derivatives go through plain PyTorch, with temporaries of the size of the logits
    function, positions = _through_reference(_backward_reference, inputs)
    pullback = torch.func.vjp(function, *(inputs[i] for i in positions))[1]
    result: list[Any] = [None] * len(inputs)
    for i, value in zip(positions, pullback(grad), strict=True):
        result[i] = value
    return result


def _stats_backward_jvp(inputs: Sequence[Any], _: Tensor, tangents: Sequence[Any]) -> Tensor:
    function, positions = _through_reference(_backward_reference, inputs)
    primals = tuple(inputs[i] for i in positions)
    directions = tuple(
        torch.zeros_like(inputs[i]) if tangents[i] is None else tangents[i] for i in positions
    )
    return torch.func.jvp(function, primals, directions)[1]


stats_backward = differentiable(
    _stats_backward_op, vjp=_stats_backward_vjp, jvp=_stats_backward_jvp
)


def _stats_vjp(inputs: Sequence[Any], output: Tensor, grad: Tensor, needs: Any) -> list[Any]:
    logits, mask, _, temperature = inputs
    return [stats_backward(logits, output, grad, mask, temperature), None, None, None]


def _stats_jvp(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor:
    # the tangent of field i is ⟨∂ field i / ∂z, dz⟩: one fused pass per field
    logits, mask, _, temperature = inputs
    unit = torch.eye(_FIELDS, dtype=output.dtype, device=output.device)
    columns = [
        (stats_backward(logits, output, row.expand_as(output), mask, temperature) * tangents[0])
        for row in unit
    ]
    return torch.stack([column.sum(-1, dtype=output.dtype) for column in columns], -1)


stats = differentiable(_stats_op, vjp=_stats_vjp, jvp=_stats_jvp)


def _trace_slope(inputs: Sequence[Any], grad: Tensor) -> Tensor:
    logits, mask, logsumexp, temperature = inputs
    fields = torch.nn.functional.pad(grad[..., None], (_TRACE, _FIELDS - 1 - _TRACE))
    return stats_backward(
        logits, stats(logits, mask, logsumexp, temperature), fields, mask, temperature
    )


def _trace_vjp(inputs: Sequence[Any], _: Tensor, grad: Tensor, needs: Any) -> list[Any]:
    return [_trace_slope(inputs, grad), None, None, None]


def _trace_jvp(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor:
    slope = _trace_slope(inputs, torch.ones_like(output))
    return (slope * tangents[0]).sum(-1, dtype=output.dtype)


trace = differentiable(_trace_op, vjp=_trace_vjp, jvp=_trace_jvp)

# ---- public -----------------------------------------------------------------------------------


def softmax_fisher_trace(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """Trace of the Fisher of every token, w Σ p (1 − p) / τ² (0 certain, → 1 / τ² uniform).

    1 − p of the most likely class is summed from the other classes, so that a confident token keeps
    its relative accuracy where 1 − Σ p² would cancel.

    Args:
        logits: z [..., V]; float32, bfloat16, float16 or float64 (float64: CPU and reference).
        temperature: τ > 0; p = softmax(z / τ).
        mask: bool [...]; tokens that are False give exactly zero.
        weights: float [...] >= 0, instead of a mask.
        logsumexp: logsumexp(z / τ) [...], if at hand.
        reduction: "none" → [...]; "sum"; "mean" divides by N = Σ w (zero where N = 0).

    Returns:
        float32 (float64 for float64 logits). Differentiable in `logits`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: Martens 2020, "New insights and perspectives on the natural gradient method".

    >>> import torch, fisherkern
    >>> fisherkern.softmax_fisher_trace(torch.zeros(1, 4))
    tensor([0.7500])
    """
    z = checks.logits(logits)
    checks.reduction(reduction, ("none", "mean", "sum"))
    tokens = check_tokens(z, temperature, mask, weights, logsumexp)
    values = trace(z, tokens.valid, tokens.logsumexp, tokens.temperature)
    return reduce_tokens(values, tokens, z, reduction)


def softmax_fisher_stats(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> SoftmaxFisherStats:
    """Logsumexp, entropy, tr F, tr F² and largest probability of every token, in one read.

    Args:
        logits: z [..., V]; float32, bfloat16, float16 or float64 (float64: CPU and reference).
        temperature: τ > 0; p = softmax(z / τ), F = (diag p − p pᵀ) / τ².
        mask: bool [...]; tokens that are False give exactly zero in every field.
        weights: float [...] >= 0, instead of a mask; every field is multiplied by the weight.
        logsumexp: logsumexp(z / τ) [...], if at hand.

    Returns:
        SoftmaxFisherStats: five tensors [...] in float32 (float64 for float64 logits):
        ``logsumexp`` and ``entropy`` in nats, ``trace``, ``trace_squared`` = tr F²,
        ``max_probability``. Differentiable in `logits` (ties share the derivative of the largest
        probability evenly).

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: docs/softmax_fisher.md derives the forms without cancellation.

    >>> import torch, fisherkern
    >>> fisherkern.softmax_fisher_stats(torch.zeros(1, 4)).entropy
    tensor([1.3863])
    """
    z = checks.logits(logits)
    tokens = check_tokens(z, temperature, mask, weights, logsumexp)
    values = stats(z, tokens.valid, tokens.logsumexp, tokens.temperature)
    values = reduce_tokens(values, tokens, z, "none")
    return SoftmaxFisherStats(*values.unbind(-1))
