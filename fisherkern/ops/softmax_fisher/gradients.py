"""Gradients of the cross-entropy in the logits: at given labels, and at labels y ~ p (type-mc)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._kernels import kernels
from fisherkern.ops._library import define, differentiable
from fisherkern.ops._rows import flat, token_rows, write_back
from fisherkern.ops._values import check_disjoint, check_labels, sampling_seed
from fisherkern.ops.softmax_fisher._common import check_tokens, row_output
from fisherkern.ops.softmax_fisher.products import matvec
from fisherkern.reference import IGNORE_INDEX, accumulation_dtype


class SoftmaxFisherSample(NamedTuple):
    """Labels drawn from the model and the gradients they give."""

    labels: Tensor
    """int64 [...]; −100 for masked tokens and rows that hold NaN."""
    gradients: Tensor
    """w (p − e_label) / τ [..., V], in the dtype of the logits."""


# ---- raw ops ----------------------------------------------------------------------------------

_GRADIENT = "Tensor labels, Tensor? weights, Tensor? logsumexp, float temperature, int ignore_index"
_SAMPLE = "Tensor seed, Tensor? weights, Tensor? logsumexp, float temperature"


def _without_ignored(
    logits: Tensor, labels: Tensor, weights: Tensor | None, ignore_index: int
) -> Tensor:
    valid = labels != ignore_index
    if weights is None:
        return valid.to(accumulation_dtype(logits.dtype))
    return torch.where(valid, weights, 0.0)


def _gradient_into(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    ignore_index: int,
    out: Tensor,
) -> None:
    check_labels(labels, logits.shape[-1], ignore_index)
    if out.numel() == 0:
        return
    weights = _without_ignored(logits, labels, weights, ignore_index)
    z, result = _rows_of(logits, out)
    kernel = kernels(logits).softmax_fisher_gradient
    kernel(z, flat(labels), flat(weights), flat(logsumexp), temperature, result)
    write_back(out, result)


def _sample_into(
    logits: Tensor,
    seed: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    out: Tensor,
) -> Tensor:
    labels = torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    if out.numel() == 0:
        return labels
    z, result = _rows_of(logits, out)
    kernel = kernels(logits).softmax_fisher_sample
    kernel(z, seed, flat(weights), flat(logsumexp), temperature, labels.view(-1), result)
    write_back(out, result)
    return labels


def _rows_of(logits: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Row views of both; one and the same tensor when the op works in place."""
    if out is logits:
        (z,) = token_rows(logits.ndim - 1, logits)
        return z, z
    z, result = token_rows(logits.ndim - 1, logits, out)
    return z, result


def _gradient(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    out = row_output(logits)
    _gradient_into(logits, labels, weights, logsumexp, temperature, ignore_index, out)
    return out


def _gradient_inplace(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    ignore_index: int,
) -> None:
    _gradient_into(logits, labels, weights, logsumexp, temperature, ignore_index, logits)


def _gradient_out(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    ignore_index: int,
    *,
    out: Tensor,
) -> None:
    hint = " (softmax_fisher_gradient_ writes over the logits)"
    check_disjoint(out, {"logits": logits, "labels": labels, "logsumexp": logsumexp}, hint)
    _gradient_into(logits, labels, weights, logsumexp, temperature, ignore_index, out)


def _sample(
    logits: Tensor,
    seed: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    out = row_output(logits)
    return _sample_into(logits, seed, weights, logsumexp, temperature, out), out


def _sample_inplace(
    logits: Tensor,
    seed: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
) -> Tensor:
    return _sample_into(logits, seed, weights, logsumexp, temperature, logits)


def _sample_out(
    logits: Tensor,
    seed: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    *,
    out: Tensor,
) -> Tensor:
    hint = " (softmax_fisher_sample_ writes over the logits)"
    check_disjoint(out, {"logits": logits, "logsumexp": logsumexp}, hint)
    return _sample_into(logits, seed, weights, logsumexp, temperature, out)


def _fake_labels(logits: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.empty(logits.shape[:-1], dtype=torch.int64, device=logits.device)


_gradient_op = define(
    f"softmax_fisher_gradient(Tensor logits, {_GRADIENT}) -> Tensor",
    _gradient,
    lambda logits, *_: row_output(logits),
)
_gradient_inplace_op = define(
    f"softmax_fisher_gradient_(Tensor(a!) logits, {_GRADIENT}) -> ()",
    _gradient_inplace,
    lambda *_: None,
    vmap="none",
)
_gradient_out_op = define(
    f"softmax_fisher_gradient.out(Tensor logits, {_GRADIENT}, *, Tensor(a!) out) -> ()",
    _gradient_out,
    lambda *_, out: None,
    vmap="none",
)
_sample_op = define(
    f"softmax_fisher_sample(Tensor logits, {_SAMPLE}) -> (Tensor, Tensor)",
    _sample,
    lambda logits, *_: (_fake_labels(logits), row_output(logits)),
    vmap="none",
)
_sample_inplace_op = define(
    f"softmax_fisher_sample_(Tensor(a!) logits, {_SAMPLE}) -> Tensor",
    _sample_inplace,
    _fake_labels,
    vmap="none",
)
_sample_out_op = define(
    f"softmax_fisher_sample.out(Tensor logits, {_SAMPLE}, *, Tensor(a!) out) -> Tensor",
    _sample_out,
    _fake_labels,
    vmap="none",
)

# ---- derivative: the Hessian of the cross-entropy is F ----------------------------------------


def _gradient_vjp(inputs: Sequence[Any], _: Tensor, grad: Tensor, needs: Any) -> list[Any]:
    logits, labels, weights, logsumexp, temperature, ignore_index = inputs
    w = _without_ignored(logits, labels, weights, ignore_index)
    return [matvec(logits, grad, w, logsumexp, temperature), None, None, None, None, None]


def _gradient_jvp(inputs: Sequence[Any], _: Tensor, tangents: Sequence[Any]) -> Tensor:
    logits, labels, weights, logsumexp, temperature, ignore_index = inputs
    w = _without_ignored(logits, labels, weights, ignore_index)
    return matvec(logits, tangents[0], w, logsumexp, temperature)


gradient = differentiable(_gradient_op, vjp=_gradient_vjp, jvp=_gradient_jvp)

# ---- public -----------------------------------------------------------------------------------


def softmax_fisher_gradient(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    out: Tensor | None = None,
) -> Tensor:
    """Gradient of Σ w · cross-entropy(z / τ, label) in the logits: w (p − e_label) / τ.

    The gradient of the SUM-reduced loss (scale it by 1/N for a mean). Weights multiply it; for a
    weighted covariance of gradients give the weights to the covariance instead.

    Args:
        logits: z [..., V]; float32, bfloat16, float16 or float64 (float64: CPU and reference).
        labels: int64 [...], 0 <= label < V, or `ignore_index`.
        temperature: τ > 0; p = softmax(z / τ).
        mask: bool [...]; tokens that are False give exactly zero.
        weights: float [...] >= 0, instead of a mask.
        logsumexp: logsumexp(z / τ) [...], if at hand.
        ignore_index: the label of tokens without one; their gradient is exactly zero.
        out: destination [..., V]; no autograd.

    Returns:
        [..., V] in the dtype of the logits. Differentiable in `logits`; its Jacobian is w F.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value; a label
            out of range (on a GPU, where that check would stall, the row is NaN instead).

    Source: the empirical Fisher of Kunstner, Balles & Hennig 2019, "Limitations of the empirical
    Fisher approximation for natural gradient descent", equation 3.

    >>> import torch, fisherkern
    >>> fisherkern.softmax_fisher_gradient(torch.zeros(1, 4), torch.tensor([2]))
    tensor([[ 0.2500,  0.2500, -0.7500,  0.2500]])
    """
    z = checks.logits(logits)
    y = checks.labels(labels, z)
    checks.integer("ignore_index", ignore_index)
    if out is not None:
        checks.out(out, z.shape, z.dtype, {"logits": z})
    w, lse, tau = check_tokens(z, temperature, mask, weights, logsumexp)
    if out is None:
        return gradient(z, y, w, lse, tau, ignore_index)
    _gradient_out_op(z, y, w, lse, tau, ignore_index, out=out)
    return out


def softmax_fisher_gradient_(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """:func:`softmax_fisher_gradient` written over the logits, which are returned.

    Args:
        logits: z [..., V], overwritten; must not require grad while grad mode is on.
        labels: int64 [...].
        temperature: τ > 0.
        mask: bool [...].
        weights: float [...] >= 0, instead of a mask.
        logsumexp: logsumexp(z / τ) [...], if at hand.
        ignore_index: the label of tokens without one.

    Returns:
        The same tensor `logits`, now holding the gradient.

    Raises:
        TypeError, ValueError: as :func:`softmax_fisher_gradient`, before anything is written.

    Source: as :func:`softmax_fisher_gradient`.

    >>> import torch, fisherkern
    >>> z = torch.zeros(1, 2)
    >>> fisherkern.softmax_fisher_gradient_(z, torch.tensor([0])) is z
    True
    """
    z = checks.overwritable(logits)
    y = checks.labels(labels, z)
    checks.integer("ignore_index", ignore_index)
    w, lse, tau = check_tokens(z, temperature, mask, weights, logsumexp)
    _gradient_inplace_op(z, y, w, lse, tau, ignore_index)
    return z


def softmax_fisher_sample(
    logits: Tensor,
    generator: torch.Generator | None = None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
    out: Tensor | None = None,
) -> SoftmaxFisherSample:
    """Draw y ~ softmax(z / τ) for every token and give g = w (p − e_y) / τ, fused: E[g gᵀ] = w² F.

    The cumulative sum is inverted at one 53-bit uniform number per token (Philox-4x32-10 keyed by a
    seed drawn from the generator, counted by the token), so that classes far below the resolution
    of float32 keep their probability, and no noise of the size of the logits is made.

    Args:
        logits: z [..., V], V >= 1; float32, bfloat16, float16 or float64 (CPU and reference).
        generator: source of the seed, on the device type of the logits; None: the default one.
        temperature: τ > 0.
        mask: bool [...]; tokens that are False have label −100 and a gradient of exactly zero.
        weights: float [...] >= 0, instead of a mask; they multiply the gradient.
        logsumexp: logsumexp(z / τ) [...], if at hand.
        out: destination [..., V] of the gradients.

    Returns:
        SoftmaxFisherSample: ``labels`` int64 [...] and ``gradients`` [..., V] in the dtype of the
        logits. Neither is attached to the autograd graph. The same seed gives the same bits on the
        same back end, and the same labels on all of them up to rounding of the cumulative sum.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: type-mc Fisher of Martens & Grosse 2015, "Optimizing neural networks with
    Kronecker-factored approximate curvature", section 5; Philox of Salmon et al. 2011.

    >>> import torch, fisherkern
    >>> z = torch.tensor([[0.0, 50.0, 0.0]])
    >>> fisherkern.softmax_fisher_sample(z, torch.Generator().manual_seed(0)).labels
    tensor([1])
    """
    z = checks.logits(logits).detach()
    checks.classes(z, "softmax_fisher_sample")
    if out is not None:
        checks.out(out, z.shape, z.dtype, {"logits": z})
    w, lse, tau = check_tokens(z, temperature, mask, weights, logsumexp)
    seed = sampling_seed(z, checks.generator(generator, z))
    if out is None:
        return SoftmaxFisherSample(*_sample_op(z, seed, w, lse, tau))
    return SoftmaxFisherSample(_sample_out_op(z, seed, w, lse, tau, out=out), out)


def softmax_fisher_sample_(
    logits: Tensor,
    generator: torch.Generator | None = None,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    logsumexp: Tensor | None = None,
) -> SoftmaxFisherSample:
    """:func:`softmax_fisher_sample` with the gradients written over the logits.

    Args:
        logits: z [..., V], overwritten; must not require grad while grad mode is on.
        generator: source of the seed.
        temperature: τ > 0.
        mask: bool [...].
        weights: float [...] >= 0, instead of a mask.
        logsumexp: logsumexp(z / τ) [...], if at hand.

    Returns:
        SoftmaxFisherSample whose ``gradients`` is the tensor `logits`.

    Raises:
        TypeError, ValueError: as :func:`softmax_fisher_sample`, before anything is written.

    Source: as :func:`softmax_fisher_sample`.

    >>> import torch, fisherkern
    >>> z = torch.zeros(2, 3)
    >>> fisherkern.softmax_fisher_sample_(z).gradients is z
    True
    """
    z = checks.overwritable(logits)
    checks.classes(z, "softmax_fisher_sample_")
    w, lse, tau = check_tokens(z, temperature, mask, weights, logsumexp)
    labels = _sample_inplace_op(z, sampling_seed(z, checks.generator(generator, z)), w, lse, tau)
    return SoftmaxFisherSample(labels, z)
