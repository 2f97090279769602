"""The calling convention of the kernels, the same for every back end, and the choice of one.

A kernel writes results into tensors it is given and allocates at most O(T + V) of its own:

========== ===================================================================================
operand    form
========== ===================================================================================
row        logits, v, grad, a row output: [B, S, V], strides (any, any, 1), T = B·S tokens;
           inputs may be expanded (stride 0); dtype float32, bfloat16, float16 (float64 on the CPU)
directions [B, S, K, V], strides (any, any, any, 1)
per token  weights, logsumexp, mask (bool), labels (int64), stats [T, 5], scalars [T], [T, K, K]:
           contiguous, in the accumulation dtype (float32; float64 for float64 logits)
per class  [V], contiguous, accumulation dtype
seed       int64, one element
========== ===================================================================================

T, V ≥ 1. Values are checked before a kernel runs. A row whose weight is 0 (whose mask is False) is
not read and its result is exactly zero; a weight that is NaN makes its row NaN. Where `logsumexp`
is given, p = exp(z / τ − logsumexp). In-place kernels get one tensor as both logits and out.

A back end is a namespace with the functions of ``_reference_kernels.py``, names and arguments
alike.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fisherkern import backends


def kernels(logits: Tensor) -> Any:
    """The kernels that serve these logits: a module, or an op namespace of the extension."""
    return backends.load(backends.select(logits.device.type, logits.dtype))
