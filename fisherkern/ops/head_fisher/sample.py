"""Labels y ~ p and the gradients that they give in the hidden states (type-mc)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._library import define
from fisherkern.ops._values import sampling_seed
from fisherkern.ops.head_fisher._common import SCHEMA, check_head, head_of
from fisherkern.reference import HeadFisherSample

# ---- raw op -----------------------------------------------------------------------------------


def _outputs(hidden: Tensor) -> tuple[Tensor, Tensor]:
    labels = torch.empty(hidden.shape[:-1], dtype=torch.int64, device=hidden.device)
    return labels, torch.empty_like(hidden, memory_format=torch.contiguous_format)


def _sample(hidden: Tensor, weight: Tensor, seed: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    head, temperature = head_of((hidden, weight, *rest))
    labels, gradients = _outputs(hidden)
    y, g = labels.view(-1), gradients.view(head.hidden.shape)
    for part in head.chunks():
        for block in part.blocks():
            z = block.z
            # the label of a token does not depend on how tokens are divided into chunks
            own = torch.cat([seed[:1], seed[1:] + block.tokens.start])
            sampled = (block.weights, None, temperature, y[block.tokens], z[None])
            head.kernels.softmax_fisher_sample(z[None], own, *sampled)
            if block.slope is not None:
                z.mul_(block.slope)
        head.pull(part.z, g[part.tokens])
    head.silence(g)
    return labels, gradients


_sample_op = define(
    f"head_fisher_sample({SCHEMA.replace('Tensor weight', 'Tensor weight, Tensor seed')})"
    " -> (Tensor, Tensor)",
    _sample,
    lambda hidden, *_: _outputs(hidden),
    vmap="none",
)

# ---- public -----------------------------------------------------------------------------------


def head_fisher_sample(
    hidden: Tensor,
    weight: Tensor,
    generator: torch.Generator | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    workspace: int | None = None,
) -> HeadFisherSample:
    """Draw y ~ p for every token and give w Jᵀ (p − e_y) / τ, the gradient in its hidden state.

    For W without a soft-cap that is w (expected embedding − W_y) / τ, and E[g gᵀ] = w² M.

    Args:
        hidden: h [..., d], and the other arguments as in :func:`fisherkern.head_fisher_stats`.
        weight: W [V, d].
        generator: source of the seed, on the device type of `hidden`; None: the default one.
        bias: b [V].
        softcap: c > 0.
        temperature: τ > 0.
        mask: bool [...]; tokens that are False have label −100 and a gradient of exactly zero.
        weights: float [...] >= 0, instead of a mask; they multiply the gradient.
        workspace: bytes for logits; labels do not depend on it, but for rounding of the logits.

    Returns:
        HeadFisherSample: ``labels`` int64 [...] and ``gradients`` [..., d] in the dtype of
        `hidden`. Not differentiable. The same seed gives the same labels as
        :func:`fisherkern.softmax_fisher_sample` does for the logits.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: as :func:`fisherkern.softmax_fisher_sample`.

    >>> import torch, fisherkern
    >>> h, W = torch.ones(1, 1), torch.tensor([[0.0], [50.0], [0.0]])
    >>> fisherkern.head_fisher_sample(h, W, torch.Generator().manual_seed(0)).labels
    tensor([1])
    """
    h, W, *rest = check_head(hidden, weight, bias, softcap, temperature, mask, weights, workspace)
    seed = sampling_seed(h, checks.generator(generator, h))
    return HeadFisherSample(*_sample_op(h, W, seed, *rest))
