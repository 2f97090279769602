"""Over classes: the mean of p, the exact Fisher diagonal of W and b, the Gram matrix of U."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._library import define
from fisherkern.ops._rows import write_back
from fisherkern.ops._values import check_disjoint
from fisherkern.ops.covariance._common import PRECISIONS
from fisherkern.ops.head_fisher._common import (
    SCHEMA,
    Head,
    check_head,
    head_of,
    new,
    unit_stride,
    with_reduction,
)
from fisherkern.reference import HeadFisherWeightDiagonal, accumulation_dtype

# ---- raw ops ----------------------------------------------------------------------------------


def powers(head: Head, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Σ w p [V], and r and u [T] of p = u exp((z − r) / τ), zero where the weight is."""
    total, sums = head.zeros(head.classes), head.new(head.classes)
    reference, unit = head.zeros(head.tokens), head.zeros(head.tokens)
    for part in head.chunks(slopes=False):
        z, w, tokens = part.z[None], part.weights, part.tokens
        of_tokens = (reference[tokens], unit[tokens])
        head.kernels.softmax_fisher_powers(z, w, None, temperature, sums, *of_tokens)
        total += sums
    return total, reference, unit


def _mean_probs(*arguments: Any) -> Tensor:
    head, temperature = head_of(arguments)
    total, sums = head.zeros(head.classes), head.new(head.classes)
    for part in head.chunks(slopes=False):
        z, w = part.z[None], part.weights
        head.kernels.softmax_fisher_mean_probs(z, w, None, temperature, sums)
        total += sums
    return total


def _weight_diagonal_into(arguments: Any, out: Tensor) -> Tensor:
    head, temperature = head_of(arguments)
    weight, bias = unit_stride(out), head.zeros(head.classes)
    if head.tokens == 0:
        weight.zero_()
    for part in head.chunks():
        for block in part.blocks():
            z = block.z[None]
            head.kernels.softmax_fisher_diagonal(z, block.weights, None, temperature, z)
            if block.slope is not None:
                block.z.mul_(block.slope).mul_(block.slope)
        head.kernels.head_squares(part.z, part.hidden, 1.0 if part.tokens.start else 0.0, weight)
        bias += part.z.sum(0)
    write_back(out, weight)
    return bias


def _weight_diagonal(*arguments: Any) -> tuple[Tensor, Tensor]:
    out = new(arguments[0], *arguments[1].shape)
    return out, _weight_diagonal_into(arguments, out)


def _weight_diagonal_out(*arguments: Any, out: Tensor) -> Tensor:
    named = zip(("hidden", "weight", "bias", "weights"), arguments, strict=False)
    check_disjoint(out, dict(named))
    return _weight_diagonal_into(arguments, out)


def _gram(*arguments: Any) -> Tensor:
    *common, damping, precision = arguments
    head, temperature = head_of(tuple(common))
    sums, reference, unit = powers(head, temperature)
    scale = 1 / (sums / temperature**2 + damping)
    if head.weights is not None:
        unit *= head.weights.sqrt()
    unit /= temperature
    T, half = head.tokens, head.budget // 2
    gram = head.zeros(T, T)
    if T == 0:
        return gram
    part, nothing = torch.zeros_like(gram), head.new(head.classes, 0)
    for classes, z in head.tiles(half):
        factor = ([z[None]], reference, unit, None, None, temperature, scale[classes])
        how = (nothing[classes], False, precision, half, head.new(T, 0), part)
        head.products.softmax_fisher_project(*factor, *how)
        gram += part
    head.kernels.mirror(gram[None])
    for side in (gram, gram.mT):  # a token that does not count may meet a NaN of one that does
        head.silence(side)
    return gram


def _new_gram(hidden: Tensor, *_: Any) -> Tensor:
    tokens = hidden.shape[:-1].numel()
    return new(hidden, tokens, tokens)


_mean_probs_op = define(
    f"head_fisher_mean_probs({SCHEMA}) -> Tensor",
    _mean_probs,
    lambda hidden, weight, *_: new(hidden, weight.shape[0]),
    vmap="none",
)
_weight_diagonal_op = define(
    f"head_fisher_weight_diagonal({SCHEMA}) -> (Tensor, Tensor)",
    _weight_diagonal,
    lambda hidden, weight, *_: (new(hidden, *weight.shape), new(hidden, weight.shape[0])),
    vmap="none",
)
_weight_diagonal_out_op = define(
    f"head_fisher_weight_diagonal.out({SCHEMA}, *, Tensor(a!) out) -> Tensor",
    _weight_diagonal_out,
    lambda hidden, weight, *_, out: new(hidden, weight.shape[0]),
    vmap="none",
)
_gram_op = define(
    f"head_fisher_gram({SCHEMA}, float damping, str precision) -> Tensor",
    _gram,
    _new_gram,
    vmap="none",
)

# ---- public -----------------------------------------------------------------------------------


def head_fisher_mean_probs(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    workspace: int | None = None,
) -> Tensor:
    """D̄ = Σ w p / N, the diagonal part of the mean Fisher of the logits (τ = 1).

    Args:
        hidden: h [..., d], and the other arguments as in :func:`fisherkern.head_fisher_stats`.
        weight: W [V, d].
        bias: b [V].
        softcap: c > 0.
        temperature: τ > 0.
        mask: bool [...]; tokens that are False contribute exactly zero.
        weights: float [...] >= 0, instead of a mask.
        reduction: "mean" divides by N = Σ w (zeros where N = 0), "sum" does not.
        workspace: bytes for logits.

    Returns:
        [V], float32 (float64 for float64 inputs). Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: as :func:`fisherkern.softmax_fisher_mean_probs`.

    >>> import torch, fisherkern
    >>> fisherkern.head_fisher_mean_probs(torch.zeros(3, 2), torch.randn(4, 2))
    tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    how = checks.reduction(reduction, ("mean", "sum"))
    arguments = check_head(hidden, weight, bias, softcap, temperature, mask, weights, workspace)
    return _mean_probs_op(*with_reduction(arguments, how))


def head_fisher_weight_diagonal(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    workspace: int | None = None,
    out: Tensor | None = None,
) -> HeadFisherWeightDiagonal:
    """The diagonal of the true Fisher of W and b, exact: Σ w p (1 − p) h² / τ² and without h².

    No label is sampled. With a soft-cap, each term is multiplied by (∂z / ∂(W h + b))².

    Args:
        hidden: h [..., d], and the other arguments as in :func:`fisherkern.head_fisher_stats`.
        weight: W [V, d].
        bias: b [V]; the diagonal of a bias is returned whether or not there is one.
        softcap: c > 0.
        temperature: τ > 0.
        mask: bool [...]; tokens that are False contribute exactly zero.
        weights: float [...] >= 0, instead of a mask.
        reduction: "mean" divides by N = Σ w (zeros where N = 0), "sum" does not.
        workspace: bytes for logits.
        out: destination of the diagonal of W, of its shape and dtype: it spares the page faults of
            a new tensor as large as W.

    Returns:
        HeadFisherWeightDiagonal: ``weight`` [V, d] and ``bias`` [V], float32 (float64 for float64
        inputs). Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value, or an
            `out` that overlaps an input. Nothing is written.

    Source: the Fisher of a layer that is linear in its parameters, Martens 2020, "New insights and
    perspectives on the natural gradient method", section 9.2.

    >>> import torch, fisherkern
    >>> h, W = torch.tensor([[2.0, 0.0]]), torch.zeros(4, 2)
    >>> fisherkern.head_fisher_weight_diagonal(h, W).weight[0]
    tensor([0.7500, 0.0000])
    """
    how = checks.reduction(reduction, ("mean", "sum"))
    arguments = check_head(hidden, weight, bias, softcap, temperature, mask, weights, workspace)
    h, W = arguments[:2]
    if out is not None:
        checks.out(out, W.shape, accumulation_dtype(W.dtype), {"hidden": h})
    arguments = with_reduction(arguments, how)
    if out is None:
        return HeadFisherWeightDiagonal(*_weight_diagonal_op(*arguments))
    return HeadFisherWeightDiagonal(out, _weight_diagonal_out_op(*arguments, out=out))


def head_fisher_gram(
    hidden: Tensor,
    weight: Tensor,
    damping: float,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    precision: str = "tf32x3",
    workspace: int | None = None,
) -> Tensor:
    """Γ = Uᵀ (D̄ / τ² + λ)⁻¹ U of the mean Fisher D̄ / τ² − U Uᵀ, U = √(w / N) p / τ in columns.

    I − Γ is what the Woodbury identity inverts; :class:`fisherkern.HeadFisher` solves with it, in
    a form that does not cancel.

    Args:
        hidden: h [..., d], and the other arguments as in :func:`fisherkern.head_fisher_stats`.
        weight: W [V, d].
        damping: λ > 0.
        bias: b [V].
        softcap: c > 0.
        temperature: τ > 0.
        mask: bool [...]; tokens that are False have rows and columns of exactly zero.
        weights: float [...] >= 0, instead of a mask.
        reduction: "mean" divides by N = Σ w, "sum" does not.
        precision: of products on matrix units, see :func:`fisherkern.covariance_update_`.
        workspace: bytes for logits and parts of U.

    Returns:
        [T, T], T tokens in the order of the leading dimensions, symmetric; float32 (float64 for
        float64 inputs). Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: the Woodbury identity as in :doc:`operators`.

    >>> import torch, fisherkern
    >>> fisherkern.head_fisher_gram(torch.zeros(1, 2), torch.randn(4, 2), damping=0.75)
    tensor([[0.2500]])
    """
    how = checks.reduction(reduction, ("mean", "sum"))
    arguments = check_head(hidden, weight, bias, softcap, temperature, mask, weights, workspace)
    lam = checks.damping(damping)
    arithmetic = checks.choice("precision", precision, PRECISIONS)
    return _gram_op(*with_reduction(arguments, how), lam, arithmetic)
