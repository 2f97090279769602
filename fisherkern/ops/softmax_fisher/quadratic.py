"""Quadratic forms vᵀ F v of every token, F = (diag p − p pᵀ) / τ², and K×K covariances."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._kernels import kernels
from fisherkern.ops._library import define, differentiable
from fisherkern.ops._rows import flat, token_rows
from fisherkern.ops.softmax_fisher._common import (
    check_tokens,
    per_token_output,
    reduce_tokens,
)
from fisherkern.ops.softmax_fisher.products import matvec, matvec_backward
from fisherkern.reference import accumulation_dtype

# ---- raw op and its derivatives ---------------------------------------------------------------


def _quadratic(
    logits: Tensor,
    v: Tensor,
    mask: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
) -> Tensor:
    out = per_token_output(logits, v.shape[-2], v.shape[-2])
    if logits.numel() == 0:
        return out.zero_()
    if out.numel():
        z, rows = token_rows(logits.ndim - 1, logits, v)
        kernels(logits).softmax_fisher_quadratic(
            z, rows, flat(mask), flat(logsumexp), temperature, out.view(-1, *out.shape[-2:])
        )
    return out


_quadratic_op = define(
    "softmax_fisher_quadratic(Tensor logits, Tensor v, Tensor? mask, Tensor? logsumexp, "
    "float temperature) -> Tensor",
    _quadratic,
    lambda logits, v, *_: per_token_output(logits, v.shape[-2], v.shape[-2]),
)


def _per_direction(inputs: Sequence[Any]) -> tuple[Tensor, Tensor | None, Tensor | None, float]:
    """The logits and per-token tensors expanded to one row per direction."""
    logits, v, mask, logsumexp, temperature = inputs
    lead = v.shape[:-1]
    dtype = accumulation_dtype(logits.dtype)
    weights = None if mask is None else mask[..., None].expand(lead).to(dtype)
    lse = None if logsumexp is None else logsumexp[..., None].expand(lead)
    return logits[..., None, :].expand(v.shape), weights, lse, temperature


def _quadratic_vjp(
    inputs: Sequence[Any], _: Tensor, grad: Tensor, needs: Sequence[bool]
) -> list[Any]:
    v = inputs[1]
    z, valid, lse, temperature = _per_direction(inputs)
    symmetric = grad + grad.mT
    g_logits = g_v = None
    if v.shape[-2] == 1:
        # one direction: its scalar is the weight of the row, and no scaled copy of v is made
        scale = symmetric[..., 0] if valid is None else symmetric[..., 0] * valid
        if needs[0]:
            g_logits = matvec_backward(z, v, v, scale / 2, lse, temperature).squeeze(-2)
        if needs[1]:
            g_v = matvec(z, v, scale, lse, temperature)
    else:
        mixed = (symmetric @ v.to(symmetric.dtype)).to(v.dtype)
        if needs[0]:
            g_logits = matvec_backward(z, v, mixed, valid, lse, temperature).sum(-2) / 2
        if needs[1]:
            g_v = matvec(z, mixed, valid, lse, temperature)
    return [g_logits, g_v, None, None, None]


def _quadratic_jvp(inputs: Sequence[Any], output: Tensor, tangents: Sequence[Any]) -> Tensor:
    v = inputs[1]
    expanded = _per_direction(inputs)
    z, common = expanded[0], expanded[1:]
    result = torch.zeros_like(output)
    if tangents[0] is not None:
        direction = tangents[0][..., None, :].expand(v.shape)
        result = (
            result
            + v.to(output.dtype) @ matvec_backward(z, v, direction, *common).to(output.dtype).mT
        )
    if tangents[1] is not None:
        half = tangents[1].to(output.dtype) @ matvec(z, v, *common).to(output.dtype).mT
        result = result + half + half.mT
    return result


quadratic = differentiable(_quadratic_op, vjp=_quadratic_vjp, jvp=_quadratic_jvp)

# ---- public -----------------------------------------------------------------------------------


def softmax_fisher_quadratic(
    logits: Tensor,
    v: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    reduction: str = "none",
) -> Tensor:
    """Quadratic form of every token, w vᵀ F v = w Var_p(v) / τ², centred before it is squared.

    Args:
        logits: z [..., V].
        v: directions [..., V] of the dtype of the logits, or one [V] for all tokens; or K of them
            per token, [..., K, V] (expand to share them), which give their K×K covariance.
        temperature: τ > 0.
        mask: bool [...].
        weights: float [...] >= 0, instead of a mask.
        logsumexp: logsumexp(z / τ) [...], if at hand.
        reduction: "none", "sum" (Σ w …) or "mean" (Σ w … / Σ w, and zero where Σ w = 0).

    Returns:
        float32 (float64 for float64 logits): [...] or [..., K, K], without the leading dimensions
        if reduced. Differentiable in `logits` and `v`.

    Raises:
        TypeError, ValueError: as :func:`softmax_fisher_matvec`.

    Source: Amari 1998, "Natural gradient works efficiently in learning", for a categorical.

    >>> import torch, fisherkern
    >>> fisherkern.softmax_fisher_quadratic(torch.zeros(1, 4), torch.tensor([1.0, 0, 0, 0]))
    tensor([0.1875])
    """
    z = checks.logits(logits)
    d = checks.directions("v", v, z)
    checks.reduction(reduction, ("none", "mean", "sum"))
    tokens = check_tokens(z, temperature, mask, weights, logsumexp)
    several = d.ndim > z.ndim
    rows = d if several else d.unsqueeze(-2)
    result = quadratic(z, rows, tokens.valid, tokens.logsumexp, tokens.temperature)
    result = result if several else result.squeeze(-1).squeeze(-1)
    return reduce_tokens(result, tokens, z, reduction)
