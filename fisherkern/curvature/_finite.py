"""Whether tensors are finite, in one pass over each and one wait for the device."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether none of them holds NaN or infinity."""
    # the largest element, which NaN wins; isfinite() would write a mask, and all() read it again
    wanted = [t.detach() for t in tensors if t.is_floating_point() and t.numel()]
    norms = torch._foreach_norm(wanted, float("inf")) if wanted else ()
    if not norms:
        return True
    device = norms[0].device  # a model may be spread over devices
    joined = torch.stack([norm.to(device, torch.float64) for norm in norms])
    return bool(joined.isfinite().all())
