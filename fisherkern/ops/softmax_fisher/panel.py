"""Panels of scaled probabilities: the factor U of the mean Fisher D̄ − U Uᵀ, a part at a time.

Products with U are matrix products whose operand is made where it is needed: some classes of it,
or all, in the layout that the product wants. The logits of these classes are a view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._kernels import kernels
from fisherkern.ops._library import define
from fisherkern.ops._rows import flat, token_rows, write_back
from fisherkern.ops._values import check_disjoint
from fisherkern.reference import accumulation_dtype

_ARGUMENTS = (
    "Tensor logits, Tensor reference, Tensor unit, Tensor? scale, float temperature, "
    "bool transposed"
)


def _empty(logits: Tensor, transposed: bool) -> Tensor:
    T, V = logits.shape[:-1].numel(), logits.shape[-1]
    shape = (V, T) if transposed else (T, V)
    return torch.empty(shape, dtype=accumulation_dtype(logits.dtype), device=logits.device)


def _into(
    logits: Tensor,
    reference: Tensor,
    unit: Tensor,
    scale: Tensor | None,
    temperature: float,
    transposed: bool,
    out: Tensor,
) -> None:
    if out.numel() == 0:
        return
    (z,) = token_rows(logits.ndim - 1, logits)
    result = out if out.stride(1) == 1 else out.contiguous()
    s = None if scale is None else scale.contiguous()
    kernel = kernels(logits).softmax_fisher_panel
    kernel(z, flat(reference), flat(unit), s, temperature, transposed, result)
    write_back(out, result)


def _panel(
    logits: Tensor,
    reference: Tensor,
    unit: Tensor,
    scale: Tensor | None,
    temperature: float,
    transposed: bool,
) -> Tensor:
    out = _empty(logits, transposed)
    _into(logits, reference, unit, scale, temperature, transposed, out)
    return out


def _panel_out(
    logits: Tensor,
    reference: Tensor,
    unit: Tensor,
    scale: Tensor | None,
    temperature: float,
    transposed: bool,
    *,
    out: Tensor,
) -> None:
    inputs = {"logits": logits, "reference": reference, "unit": unit, "scale": scale}
    check_disjoint(out, inputs)
    _into(logits, reference, unit, scale, temperature, transposed, out)


_panel_op = define(
    f"softmax_fisher_panel({_ARGUMENTS}) -> Tensor",
    _panel,
    lambda logits, *rest: _empty(logits, rest[-1]),
    vmap="loop",
)
_panel_out_op = define(
    f"softmax_fisher_panel.out({_ARGUMENTS}, *, Tensor(a!) out) -> ()",
    _panel_out,
    lambda *_, out: None,
    vmap="none",
)


def softmax_fisher_panel(
    logits: Tensor,
    reference: Tensor,
    unit: Tensor,
    *,
    temperature: float = 1.0,
    scale: Tensor | None = None,
    transposed: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Scaled probabilities u s exp((z − r) / τ), as a matrix for products.

    With r the largest logit of a token and u = √(w / N) max p / τ this is the factor Uᵀ of the mean
    Fisher D̄ / τ² − U Uᵀ. All classes of a row share r and u, so that any part of it can be made
    alone, of ``logits[..., begin:end]``.

    Args:
        logits: z [..., V]; float32, bfloat16, float16 or float64 (float64: CPU and reference).
            Slices of the classes are taken as they are, without a copy.
        reference: r [...], finite, in the accumulation dtype: float32, or float64 for float64
            logits. z − r must not overflow the exponential: take the maximum.
        unit: u [...], the same dtype; where it is zero the row is zero, whatever the logits hold.
        temperature: τ > 0.
        scale: s [V], the same dtype; None: ones.
        transposed: whether the result is [V, T] instead of [T, V].
        out: destination of the shape and dtype of the result.

    Returns:
        [T, V] or [V, T] with T tokens in the order of the leading dimensions, in the accumulation
        dtype: p ~ 1e-5 is a subnormal number in float16. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: the decomposition of the mean Fisher in :doc:`operators`.

    >>> import torch, fisherkern
    >>> z = torch.tensor([[0.0, 0.0], [0.0, 50.0]])
    >>> r, p = z.amax(-1), z.softmax(-1).amax(-1)
    >>> fisherkern.softmax_fisher_panel(z, r, p)
    tensor([[5.0000e-01, 5.0000e-01],
            [1.9287e-22, 1.0000e+00]])
    """
    z = checks.logits(logits).detach()
    dtype = accumulation_dtype(z.dtype)
    r = checks.token_values("reference", reference, z, dtype)
    u = checks.token_values("unit", unit, z, dtype)
    s = None if scale is None else checks.class_values("scale", scale, z, dtype)
    tau = checks.temperature(temperature)
    if out is None:
        return _panel_op(z, r, u, s, tau, transposed)
    T, V = z.shape[:-1].numel(), z.shape[-1]
    checks.out(out, (V, T) if transposed else (T, V), dtype, {"logits": z})
    _panel_out_op(z, r, u, s, tau, transposed, out=out)
    return out
