"""Token weights: what masks, weights and reductions mean, the same for every op."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 logits, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def token_weights(logits: Tensor, mask: Tensor | None, weights: Tensor | None) -> Tensor | None:
    """Weights [...] in the accumulation dtype, or None where every token counts once."""
    if weights is None:
        weights = mask
    return None if weights is None else weights.to(accumulation_dtype(logits.dtype))


def normalised(weights: Tensor | None, logits: Tensor, reduction: str) -> Tensor | None:
    """The weights that turn a weighted sum into `reduction`; N = 0 gives zeros, a NaN stays NaN."""
    if reduction != "mean":
        return weights
    lead = logits.shape[:-1]
    if weights is None:
        dtype = accumulation_dtype(logits.dtype)
        # torch.Size.numel, or a quotient to fill with, would fix the number under torch.export
        return torch.ones(lead, dtype=dtype, device=logits.device) / max(math.prod(lead), 1)
    total = weights.sum(dtype=torch.float64)  # of float32 weights the sum may be too large for it
    return torch.where(total == 0, 0.0, weights.double() / total).to(weights.dtype)
