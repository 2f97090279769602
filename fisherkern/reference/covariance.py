"""The covariance ops by their definition.

Notation: x_t [d] is a row (activations a_t, or output gradients g_t), x̃ = [x; 1] with a bias and x
without, w token weights, N = Σ w; a token of weight 0 contributes exactly zero, whatever it holds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fisherkern.reference.tokens import accumulation_dtype


def _rows(x: Tensor, weights: Tensor | None, bias: bool) -> Tensor:
    """x̃ in float64, rows of weight zero replaced by zeros."""
    rows = x.double()
    if bias:
        rows = torch.cat([rows, torch.ones_like(rows[..., :1])], -1)
    if weights is None:
        return rows
    w = weights.view(*weights.shape, *(1,) * (rows.ndim - weights.ndim))
    return torch.where(w == 0, 0.0, rows)


def _token_weights(
    lead: Sequence[int], x: Tensor, mask: Tensor | None, weights: Tensor | None
) -> Tensor:
    w = mask if weights is None else weights
    if w is None:
        return torch.ones(lead, dtype=torch.float64, device=x.device)
    return w.double()


def _reduced(total: Tensor, count: Tensor, scale: float, reduction: str) -> Tensor:
    """`scale` times a sum, or its mean; zero where nothing counts."""
    if reduction == "mean":
        total = torch.where(count == 0, torch.zeros_like(total), total / count)
    return scale * total


def covariance(
    x: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    bias: bool = False,
    heads: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Scale · Σ w x̃ x̃ᵀ, or that over N: [D, D], with `heads` [H, D, D] for x [..., H, d]."""
    w = _token_weights(x.shape[: x.ndim - 1 - heads], x, mask, weights)
    rows = _rows(x, w, bias)
    rows = rows.reshape(w.numel(), x.shape[-2] if heads else 1, rows.shape[-1])
    total = torch.einsum("t,thi,thj->hij", w.reshape(-1), rows, rows)
    total = _reduced(total if heads else total[0], w.sum(), scale, reduction)
    return total.to(accumulation_dtype(x.dtype))


def covariance_update(
    factor: Tensor,
    x: Tensor,
    *,
    ema_decay: float | None,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    bias: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """The symmetric β A + (1 − β) C, with C = covariance(x) and A the lower triangle of `factor`.

    A + C where β is None.
    """
    c = covariance(
        x.double(),
        scale=scale,
        mask=mask,
        weights=weights,
        bias=bias,
        heads=factor.ndim == 3,
        reduction=reduction,
    )
    a = factor.double().tril()
    a = a + a.tril(-1).mT
    new = a + c if ema_decay is None else ema_decay * a + (1 - ema_decay) * c
    return new.to(factor.dtype)


def cross_covariance(
    g: Tensor,
    x: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    bias: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Scale · Σ w g x̃ᵀ [d_out, D_in], or that over N."""
    w = _token_weights(x.shape[:-1], x, mask, weights)
    left, right = _rows(g, w, False).flatten(0, -2), _rows(x, w, bias).flatten(0, -2)
    total = torch.einsum("t,to,ti->oi", w.reshape(-1), left, right)
    return _reduced(total, w.sum(), scale, reduction).to(accumulation_dtype(x.dtype))


def squared_gradient(
    x: Tensor,
    g: Tensor,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    bias: bool = False,
    per_sample: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Scale · Σ_t w (g²)(x̃²)ᵀ, per sample Σ_b (Σ_s w g x̃ᵀ)² for x [..., S, d]; or the mean.

    The mean is over N, per sample over the samples that have a token of weight other than zero.
    """
    w = _token_weights(x.shape[:-1], x, mask, weights)
    left, right = _rows(g, w, False), _rows(x, w, bias)
    if per_sample:
        samples = w.shape[:-1].numel()
        left, right = (r.reshape(samples, *r.shape[-2:]) for r in (left, right))
        w = w.reshape(samples, w.shape[-1])
        total = torch.einsum("bs,bso,bsi->boi", w, left, right).square().sum(0)
        count = (w != 0).any(-1).sum()
    else:
        left, right = left.flatten(0, -2), right.flatten(0, -2)
        total = torch.einsum("t,to,ti->oi", w.reshape(-1), left.square(), right.square())
        count = w.sum()
    return _reduced(total, count, scale, reduction).to(accumulation_dtype(x.dtype))


def convolution_covariance(
    x: Tensor,
    kernel_size: Sequence[int],
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    bias: bool = False,
    reduction: str = "mean",
) -> Tensor:
    """Covariance of the patches of images [B, C, H, W], with weights [B]; [G, ...] for G groups."""
    w = _token_weights(x.shape[:1], x, mask, weights)
    if not len(x):  # unfold wants an image: one that does not count
        x, w = x.new_zeros(1, *x.shape[1:]), w.new_zeros(1)
    patches = torch.nn.functional.unfold(
        x.double(), tuple(kernel_size), tuple(dilation), tuple(padding), tuple(stride)
    ).mT
    positions = patches.shape[:-1]
    patches = patches.reshape(*positions, groups, -1)
    c = covariance(
        patches,
        scale=scale,
        weights=w[:, None].expand(positions),
        bias=bias,
        heads=True,
        reduction=reduction,
    )
    return (c if groups > 1 else c[0]).to(accumulation_dtype(x.dtype))


def embedding_counts(
    indices: Tensor,
    num_embeddings: int,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Scale · Σ w e_index, or that over N: the diagonal of the input factor of an embedding."""
    w = _token_weights(indices.shape, indices, mask, weights).reshape(-1)
    chosen = indices.reshape(-1)[w != 0]
    one_hot = torch.nn.functional.one_hot(chosen, num_embeddings).double()
    total = (w[w != 0][:, None] * one_hot).sum(0)
    return _reduced(total, w.sum(), scale, reduction).float()
