"""Input factors of layers that share weights or select rows: convolutions and embeddings."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fisherkern import checks
from fisherkern.ops._library import define
from fisherkern.ops._values import check_disjoint, checked_weights
from fisherkern.ops.covariance._common import (
    check_options,
    check_tokens,
    check_update,
    coordinates,
    token_count,
)
from fisherkern.ops.covariance.symmetric import _mirror_op, _update_op, mirror_


def _sizes(name: str, value: object, dims: int, least: int) -> tuple[int, ...]:
    """One int for all spatial dimensions, or one for each."""
    values = (value,) * dims if isinstance(value, int) else value
    if not isinstance(values, Sequence) or len(values) != dims:
        raise ValueError(f"{name} is {value!r}; expected an int or {dims} of them")
    sizes = tuple(checks.integer(name, v) for v in values)
    if min(sizes) < least:
        raise ValueError(f"{name} is {value!r}; allowed are ints >= {least}")
    return sizes


def _positions(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _patches(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Tensor:
    """A view [B, *positions, C, *kernel] of padded images [B, C, *spatial]."""
    dims = len(kernel)
    for axis, (k, s, d) in enumerate(zip(kernel, stride, dilation, strict=True), start=2):
        x = x.unfold(axis, d * (k - 1) + 1, s)
    for axis, d in enumerate(dilation):
        index = (*(slice(None),) * (2 + dims + axis), slice(None, None, d))
        x = x[index]
    return x.movedim(1, 1 + dims)


# ---- public -----------------------------------------------------------------------------------


def convolution_covariance_update_(
    factor: Tensor,
    x: Tensor,
    kernel_size: int | Sequence[int],
    *,
    ema_decay: float | None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    bias: bool = False,
    reduction: str = "mean",
    precision: str = "tf32x3",
    mirror: bool = True,
    workspace: int = 16 << 20,
) -> Tensor:
    """The input factor of a Conv1d or Conv2d, without the unfolded tensor.

    Patches are copied a few images, or a few of their rows, at a time. Every position of every
    image is a token.

    Args:
        factor: [D, D] with D = C · Π kernel_size, plus one with `bias`, in the order of
            ``weight.flatten(1)``; with G > 1 groups [G, D, D], D = C / G · Π kernel_size. float32,
            or float64 (which float64 inputs need). Only its lower triangle is read.
        x: input of the layer, [B, C, L] (Conv1d) or [B, C, H, W] (Conv2d).
        kernel_size: of the layer, an int or one per spatial dimension.
        ema_decay: β in [0, 1], the weight of the old value; None adds instead.
        stride: as kernel_size.
        padding: as kernel_size, with zeros.
        dilation: as kernel_size.
        groups: of the convolution.
        scale: factor of the new term.
        mask: bool [B] over the images; False contributes exactly zero.
        weights: float [B] >= 0, instead of a mask.
        bias: append the homogeneous coordinate 1 to every patch.
        reduction: "mean" divides by N = Σ w · positions, "sum" does not (Grosse and Martens leave
            the sum over positions in: pass their number as `scale` to "mean").
        precision: of float32 products on CUDA, see :func:`covariance_update_`.
        mirror: copy the lower triangle onto the upper one afterwards.
        workspace: bytes of patches that exist at a time (at least one row of one image).

    Returns:
        `factor`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value;
            `factor` is untouched then.

    Source: Grosse and Martens 2016, "A Kronecker-factored approximate Fisher matrix for convolution
    layers", section 3.

    >>> import torch, fisherkern
    >>> A = torch.zeros(2, 2)
    >>> x = torch.tensor([[[1.0, 2.0, 3.0]]])
    >>> fisherkern.convolution_covariance_update_(A, x, 2, ema_decay=0.0, reduction="sum")
    tensor([[ 5.,  8.],
            [ 8., 13.]])
    """
    z = checks.activations("x", x, 3).detach()
    if z.ndim not in (3, 4):
        raise ValueError(f"x has shape {list(z.shape)}; expected [B, C, L] or [B, C, H, W]")
    dims = z.ndim - 2
    kernel = _sizes("kernel_size", kernel_size, dims, 1)
    steps = _sizes("stride", stride, dims, 1)
    pads = _sizes("padding", padding, dims, 0)
    spread = _sizes("dilation", dilation, dims, 1)
    channels = z.shape[1]
    if checks.integer("groups", groups) < 1 or channels % groups:
        raise ValueError(f"groups is {groups}; expected a divisor of the {channels} channels of x")
    if checks.integer("workspace", workspace) < 1:
        raise ValueError(f"workspace is {workspace}; expected a number of bytes >= 1")
    positions = [
        _positions(*sizes) for sizes in zip(z.shape[2:], kernel, steps, pads, spread, strict=True)
    ]
    if min(positions) < 1:
        raise ValueError(
            f"kernel_size is {kernel_size!r}; with this dilation it exceeds the padded input, "
            f"x of shape {list(z.shape)}"
        )
    check_options(ema_decay, scale, reduction, precision)
    inner = channels // groups * math.prod(kernel)
    width = coordinates(inner, bias)
    a = checks.factor(factor, [*([groups] if groups > 1 else []), width, width], z)
    tokens = check_tokens(mask, weights, z, 1)
    if not torch.compiler.is_compiling():  # its addresses are known in the op alone, for x
        check_disjoint(a, {"x": z}, name="factor")
    if ema_decay == 1:
        return mirror_(a) if mirror else a
    count = token_count(z, tokens, 1) * math.prod(positions)
    update = check_update(a, count, ema_decay=ema_decay, scale=scale, reduction=reduction)

    row_bytes = math.prod(positions[1:]) * channels * math.prod(kernel) * z.element_size()
    rows = max(1, min(workspace // row_bytes, positions[0]))
    images = max(1, workspace // (row_bytes * rows)) if rows == positions[0] else 1
    beta = update.beta
    edges = [side for pad in reversed(pads) for side in (pad, pad)]
    for first in range(0, max(z.shape[0], 1), images):
        chosen = slice(first, first + images)
        patches = _patches(functional.pad(z[chosen], edges), kernel, steps, spread)
        for row in range(0, positions[0], rows):
            part = patches[:, row : row + rows]
            part = part.reshape(*part.shape[: 1 + dims], groups, inner)
            over = part.shape[: 1 + dims]
            per_patch = [
                None if t is None else t[chosen].view(-1, *(1,) * dims).expand(over).contiguous()
                for t in tokens
            ]
            _update_op(
                a,
                part if groups > 1 else part.squeeze(-2),
                *per_patch,
                update.alpha,
                beta,
                bool(bias),
                precision,
                False,
            )
            beta = 1.0
    if mirror:
        _mirror_op(a)
    return factor


def _embedding_counts(indices: Tensor, weights: Tensor | None, num_embeddings: int) -> Tensor:
    i = indices.reshape(-1)
    w = None if weights is None else weights.reshape(-1)
    valid = torch.ones_like(i, dtype=torch.bool) if w is None else w != 0
    if i.device.type == "cpu":
        bad = valid & ((i < 0) | (i >= num_embeddings))
        if bool(bad.any()):
            raise ValueError(
                f"indices holds {int(i[bad][0])}; allowed are 0 to {num_embeddings - 1}"
            )
    # float64 sums of at most 2^29 float32 weights are exact to float32: the order does not matter
    counts = torch.zeros(num_embeddings, dtype=torch.float64, device=i.device)
    values = valid.double() if w is None else torch.where(valid, w.double(), 0.0)
    return counts.index_put_((torch.where(valid, i, 0),), values, accumulate=True)


_embedding_counts_op = define(
    "embedding_counts(Tensor indices, Tensor? weights, int num_embeddings) -> Tensor",
    _embedding_counts,
    lambda indices, weights, num_embeddings: indices.new_empty(
        (num_embeddings,), dtype=torch.float64
    ),
    vmap="none",
)


def embedding_counts(
    indices: Tensor,
    num_embeddings: int,
    *,
    scale: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Scale · Σ w e_index / N: the input factor of an embedding, which is diagonal, as a vector.

    The inputs of an embedding are one-hot, so that A = diag(counts) / N.

    Args:
        indices: int64 [...], each in [0, num_embeddings) where the token counts.
        num_embeddings: V, rows of the embedding.
        scale: factor of the result.
        mask: bool [...]; False contributes nothing, whatever the index.
        weights: float [...] >= 0, instead of a mask.
        reduction: "mean" (divide by N = Σ w; zeros where N = 0) or "sum".

    Returns:
        [V] in float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value;
            an index out of range (on a GPU that is an error of the device).

    Source: the covariance of one-hot inputs; Martens and Grosse 2015, section 2.1.

    >>> import torch, fisherkern
    >>> fisherkern.embedding_counts(torch.tensor([0, 2, 2, 1]), 4)
    tensor([0.2500, 0.2500, 0.5000, 0.0000])
    """
    i = checks.tensor("indices", indices)
    if i.dtype != torch.int64:
        raise TypeError(f"indices has dtype {i.dtype}; allowed is int64")
    if checks.integer("num_embeddings", num_embeddings) < 1:
        raise ValueError(f"num_embeddings is {num_embeddings}; expected an int >= 1")
    check_options(None, scale, reduction, "ieee")
    m, w = checks.mask_or_weights(mask, weights, i, "indices", i.ndim)
    if w is not None:
        w = checked_weights(w, torch.float32)
    given = m if w is None else w
    counts = _embedding_counts_op(i, given, num_embeddings)
    if reduction == "mean":
        total = i.numel() if given is None else given.sum(dtype=torch.float64)
        counts = torch.where(torch.as_tensor(total) == 0, 0.0, counts / total)
    return (scale * counts).float()
