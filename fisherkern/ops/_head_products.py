"""Products of a head by those of PyTorch: what back ends of GPUs have in common.

Half precision is multiplied as it is on tensor cores, which add in float32; float32 follows the
precision that the user chose for their own products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Out ← a b in the dtype of `out`."""
    # a hook runs under the autocast of the model, which would round the operands
    with torch.autocast(a.device.type, enabled=False):
        if a.dtype == out.dtype:
            torch.mm(a, b, out=out)
        elif a.is_cuda:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        else:  # the emulation and the interpreter: torch has no such product on the CPU
            torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def head_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, out: Tensor
) -> None:
    """Out [T, V] = c tanh((h Wᵀ + b) / c), without a soft-cap c: h Wᵀ + b."""
    _multiply(hidden, weight.mT, out)
    if bias is not None:
        out += bias
    if softcap is not None:
        out.div_(softcap).tanh_().mul_(softcap)


def head_pull(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """Out [T, d] = rows [T, V] times W [V, d]."""
    if weight.dtype != torch.float16 or rows.dtype == torch.float16:
        _multiply(rows.to(weight.dtype), weight, out)
        return
    # weights and temperatures are in the rows: the range of float16 is left to their shape
    size = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True)
    size = torch.where(size > 0, size, 1)
    narrow = torch.empty_like(rows, dtype=torch.float16)
    _multiply(torch.div(rows, size, out=narrow), weight, out)
    out *= size


def head_squares(rows: Tensor, hidden: Tensor, beta: float, out: Tensor) -> None:
    """Out [V, d] = β out + the transpose of rows [T, V] times h² [T, d]."""
    squares = hidden.to(out.dtype).square()
    with torch.autocast(rows.device.type, enabled=False):
        if hidden.dtype == out.dtype or not rows.is_cuda:
            out.addmm_(rows.mT, squares, beta=beta)
        else:  # squares of float16 may be larger than it holds
            how: dict[str, Any] = {"beta": beta, "out_dtype": out.dtype, "out": out}
            torch.addmm(out, rows.mT.bfloat16(), squares.bfloat16(), **how)
