"""The product of the Fisher of a hidden state, M = Jᵀ F J, with a vector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._library import define
from fisherkern.ops.head_fisher._common import SCHEMA, check_head, head_of, unit_stride

# ---- raw op -----------------------------------------------------------------------------------


def _matvec(hidden: Tensor, weight: Tensor, u: Tensor, *rest: Any) -> Tensor:
    head, temperature = head_of((hidden, weight, *rest))
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    shape = head.hidden.shape  # -1 is ambiguous where there are no tokens
    vectors, results = unit_stride(u.reshape(shape)), out.view(shape)
    for part in head.chunks(spare=True):
        assert part.spare is not None
        head.images(vectors[part.tokens], part.spare)
        for block in part.blocks():
            z, v = block.z, part.spare[block.rows]
            if block.slope is not None:
                v.mul_(block.slope)
            how = (block.weights, None, temperature)
            head.kernels.softmax_fisher_matvec(z[None], v[None], *how, z[None])
            if block.slope is not None:
                z.mul_(block.slope)
        head.pull(part.z, results[part.tokens])
    head.silence(results)
    return out


_matvec_op = define(
    f"head_fisher_matvec({SCHEMA.replace('Tensor weight', 'Tensor weight, Tensor u')}) -> Tensor",
    _matvec,
    lambda hidden, *_: torch.empty_like(hidden, memory_format=torch.contiguous_format),
    vmap="none",
)

# ---- public -----------------------------------------------------------------------------------


def head_fisher_matvec(
    hidden: Tensor,
    weight: Tensor,
    u: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    workspace: int | None = None,
) -> Tensor:
    """The product w M u for every token: M = Jᵀ F J [d, d] is the Fisher of its hidden state.

    J = ∂z / ∂h [V, d] is W, or with a soft-cap diag(∂z / ∂(W h + b)) W.

    Args:
        hidden: h [..., d], and the other arguments as in :func:`fisherkern.head_fisher_stats`.
        weight: W [V, d].
        u: [..., d], shape and dtype of `hidden`; or [d] for all tokens alike.
        bias: b [V].
        softcap: c > 0.
        temperature: τ > 0.
        mask: bool [...]; tokens that are False give exactly zero.
        weights: float [...] >= 0, instead of a mask.
        workspace: bytes for logits and J u.

    Returns:
        [..., d] in the dtype of `hidden`. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: the generalised Gauss-Newton product of Schraudolph 2002, "Fast curvature matrix-vector
    products for second-order gradient descent", of the last layer.

    >>> import torch, fisherkern
    >>> h, W = torch.zeros(1, 1), torch.tensor([[1.0], [-1.0]])
    >>> fisherkern.head_fisher_matvec(h, W, torch.ones(1, 1))
    tensor([[1.]])
    """
    h, W, *rest = check_head(hidden, weight, bias, softcap, temperature, mask, weights, workspace)
    return _matvec_op(h, W, checks.rows("u", u, h, "hidden").detach(), *rest)
