"""Statistics of p = softmax(z / τ), z = W h + b, and the expected embedding."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherkern.ops._library import define
from fisherkern.ops.head_fisher._common import SCHEMA, check_head, head_of, new
from fisherkern.reference import SoftmaxFisherStats

_FIELDS = len(SoftmaxFisherStats._fields)
_MAX = SoftmaxFisherStats._fields.index("max_probability")


class HeadFisherStats(NamedTuple):
    """Per-token statistics, each of the leading shape of the hidden states."""

    logsumexp: Tensor
    """log Σ exp(z / τ), in nats."""
    entropy: Tensor
    """−Σ p log p, in nats."""
    trace: Tensor
    """tr F = Σ p (1 − p) / τ²."""
    trace_squared: Tensor
    """tr F²."""
    max_probability: Tensor
    """max p."""
    expected_embedding: Tensor | None
    """Σ_v p_v W_v [..., d], if asked for."""


def _outputs(hidden: Tensor, embedding: bool) -> tuple[Tensor, Tensor]:
    lead, width = hidden.shape[:-1], hidden.shape[-1] if embedding else 0
    return new(hidden, *lead, _FIELDS), new(hidden, *lead, width)


def _stats(*arguments: Any) -> tuple[Tensor, Tensor]:
    *common, embedding = arguments
    head, temperature = head_of(tuple(common))
    stats, expected = _outputs(common[0], embedding)
    fields, rows = stats.view(-1, _FIELDS), expected.view(head.tokens, expected.shape[-1])
    for part in head.chunks(slopes=False):
        z, w = part.z[None], part.weights
        valid = None if w is None else w != 0
        here = fields[part.tokens]
        head.kernels.softmax_fisher_stats(z, valid, None, temperature, here)
        if embedding:
            unit = here[:, _MAX].contiguous()
            panel = (part.z.amax(-1), unit, None, temperature, False, part.z)
            head.kernels.softmax_fisher_panel(z, *panel)
            head.pull(part.z, rows[part.tokens])
    if head.weights is not None:
        w = head.weights[:, None]
        for values in (fields, rows):
            values.copy_(torch.where(w == 0, 0, values * w))
    return stats, expected


_stats_op = define(
    f"head_fisher_stats({SCHEMA}, bool embedding) -> (Tensor, Tensor)",
    _stats,
    lambda hidden, *rest: _outputs(hidden, rest[-1]),
    vmap="none",
)


def head_fisher_stats(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    expected_embedding: bool = False,
    workspace: int | None = None,
) -> HeadFisherStats:
    """Logsumexp, entropy, tr F, tr F², largest probability and expected embedding of every token.

    Args:
        hidden: h [..., d]; float32, bfloat16, float16 or float64 (float64: CPU and reference).
        weight: W [V, d] of the head, as of ``nn.Linear``, in the dtype of `hidden`.
        bias: b [V], the same dtype.
        softcap: c of z = c tanh((W h + b) / c), as Gemma has it; None: z = W h + b.
        temperature: τ > 0; p = softmax(z / τ), F = (diag p − p pᵀ) / τ².
        mask: bool [...]; tokens that are False give exactly zero in every field.
        weights: float [...] >= 0, instead of a mask; every field is multiplied by the weight.
        expected_embedding: whether to return Σ_v p_v W_v too: another product with W.
        workspace: bytes for logits, of at least one token; None: 64 MiB on the CPU, 512 MiB on a
            GPU.

    Returns:
        HeadFisherStats: tensors [...] in float32 (float64 for float64 inputs), and [..., d] or
        None. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: as :func:`fisherkern.softmax_fisher_stats`; without the logits, as the cross-entropy of
    Wijmans et al. 2025, "Cut your losses in large-vocabulary language models".

    >>> import torch, fisherkern
    >>> fisherkern.head_fisher_stats(torch.zeros(1, 2), torch.randn(4, 2)).entropy
    tensor([1.3863])
    """
    arguments = check_head(hidden, weight, bias, softcap, temperature, mask, weights, workspace)
    values, expected = _stats_op(*arguments, bool(expected_embedding))
    fields: list[Tensor | None] = [*values.unbind(-1), expected if expected_embedding else None]
    return HeadFisherStats._make(fields)
