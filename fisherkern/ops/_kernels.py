"""The calling convention of the kernels, the same for every back end, and the choice of one.

A kernel writes results into tensors it is given and allocates at most O(T + V) of its own:

========== ===================================================================================
operand    form
========== ===================================================================================
row        logits, v, grad, a row output: [B, S, V], strides (any, any, 1), T = B·S tokens;
           inputs may be expanded (stride 0); dtype float32, bfloat16, float16 (float64 on the CPU)
directions [B, S, K, V], strides (any, any, any, 1)
per token  weights (≥ 0), logsumexp, mask (bool), labels (int64), stats [T, 5], scalars [T],
           [T, K, K]: contiguous, in the accumulation dtype (float32; float64 for float64 logits)
per class  [V], contiguous, accumulation dtype
seed       int64 [2]: the key, and the index of the first token among those that share the key
========== ===================================================================================
activation x, g: [B, S, H, d] or without heads [B, S, d], strides (any, .., 1), dtypes as for rows
factor     [H, D, D] or [d_out, D], strides (any, any, 1), float32 or float64; D = d, or d + 1 with
           ``bias``: a last coordinate of ones that is not in memory
alpha      [1], dtype of the factor; ``beta`` a float: factor ← beta · factor + alpha · Σ, where a
           beta of zero does not read the factor
========== ===================================================================================
head       hidden [T, d], weight [V, d], strides (any, 1), one dtype for both as for rows; bias [V]
           of any stride; results and what they are made of in the accumulation dtype
========== ===================================================================================

Products with the factor U of several batches take a list of logits, whose tokens are counted
through in ``reference``, ``unit``, ``labels`` and ``at_label`` [T]; a block of columns, y [V, K] or
c [T, K], has strides (any, 1).

T, V ≥ 1. Values are checked before a kernel runs. A row whose weight is 0 (whose mask is False) is
not read and its result is exactly zero; a weight that is NaN makes its row NaN. Where `logsumexp`
is given, p = exp(z / τ − logsumexp). In-place kernels get one tensor as both logits and out.

Of a symmetric factor only the lower triangle is read and written.

A back end is a namespace with the functions of ``_reference_kernels.py``, names and arguments
alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fisherkern import backends


def kernels(x: Tensor, dtype: torch.dtype | None = None, *, products: bool = False) -> Any:
    """The kernels that serve this tensor: a namespace of functions.

    A `dtype` stands in for that of x where an op only moves values; `products` is for those that
    multiply matrices.
    """
    return backends.load(backends.select(x.device.type, dtype or x.dtype, products))
