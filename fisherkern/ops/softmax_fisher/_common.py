"""What the softmax Fisher ops share: the token arguments, and the canonical operands of kernels."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._values import checked_weights
from fisherkern.reference import accumulation_dtype, normalised


class Tokens(NamedTuple):
    """The checked arguments that every op has in common."""

    weights: Tensor | None
    """[...] in the accumulation dtype, from a mask or weights; None: every token counts once."""
    logsumexp: Tensor | None
    temperature: float

    @property
    def valid(self) -> Tensor | None:
        """Bool [...], False where the weight is zero; None: every token is."""
        return None if self.weights is None else self.weights != 0


def check_tokens(
    logits: Tensor,
    temperature: object,
    mask: object,
    weights: object,
    logsumexp: object,
) -> Tokens:
    """Check the arguments that every op has in common."""
    dtype = accumulation_dtype(logits.dtype)
    tau = checks.temperature(temperature)
    m, w = checks.mask_or_weights(mask, weights, logits)
    lse = checks.logsumexp(logsumexp, logits, dtype)
    if m is not None:
        w = m.to(dtype)
    elif w is not None:
        w = checked_weights(w, dtype)
    return Tokens(w, lse, tau)


def reduce_tokens(values: Tensor, tokens: Tokens, logits: Tensor, reduction: str) -> Tensor:
    """Per-token values [<lead>, ...], already zero where masked, weighted and reduced."""
    w = normalised(tokens.weights, logits, reduction)
    lead = logits.ndim - 1
    if w is not None:
        # a weight of zero also removes the derivative, NaN included
        w = w.reshape((*w.shape, *(1,) * (values.ndim - lead)))
        values = torch.where(w == 0, 0.0, values * w)
    return values if reduction == "none" else values.flatten(0, lead - 1).sum(0) if lead else values


def row_output(logits: Tensor) -> Tensor:
    """A new tensor for one result per logit, contiguous whatever the strides of the logits."""
    return torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)


def per_class_output(logits: Tensor) -> Tensor:
    """A new [V] tensor in the accumulation dtype."""
    dtype = accumulation_dtype(logits.dtype)
    return torch.empty(logits.shape[-1:], dtype=dtype, device=logits.device)


def per_token_output(logits: Tensor, *trailing: int) -> Tensor:
    """A new tensor [<lead>, *trailing] in the accumulation dtype."""
    dtype = accumulation_dtype(logits.dtype)
    return torch.empty((*logits.shape[:-1], *trailing), dtype=dtype, device=logits.device)


def probabilities(logits: Tensor, weights: Tensor | None, temperature: float) -> Tensor:
    """Softmax for derivatives that have no kernel; uniform where the weight is zero."""
    x = logits.to(accumulation_dtype(logits.dtype)) / temperature
    return torch.softmax(x if weights is None else torch.where((weights == 0)[..., None], 0, x), -1)
