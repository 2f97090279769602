"""Products with the factor U of the mean Fisher D̄ − U Uᵀ, made from logits where it is needed.

U [V, T] has a column per token. Ops underneath take a list of logits, whose tokens are counted
through: operators gather batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._kernels import kernels
from fisherkern.ops._library import define
from fisherkern.ops._rows import flat, token_rows
from fisherkern.ops.covariance._common import PRECISIONS
from fisherkern.reference import accumulation_dtype

# Bytes for parts of U and of what it is multiplied by.
WORKSPACE = {"cpu": 64 << 20, "cuda": 512 << 20}

_FACTOR = (
    "Tensor[] logits, Tensor reference, Tensor unit, Tensor? labels, Tensor? at_label, "
    "float temperature"
)


def _canonical(logits: Sequence[Tensor]) -> list[Tensor]:
    return [token_rows(z.ndim - 1, z)[0] for z in logits if z.numel()]


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _project(
    logits: Sequence[Tensor],
    reference: Tensor,
    unit: Tensor,
    labels: Tensor | None,
    at_label: Tensor | None,
    temperature: float,
    scale: Tensor | None,
    y: Tensor,
    ones: bool,
    gram: bool,
    precision: str,
    workspace: int,
) -> tuple[Tensor, Tensor]:
    out, products = _projections(reference, y, ones, gram)
    z = _canonical(logits)
    if not z or (out.numel() == 0 and products.numel() == 0):
        return out.zero_(), products
    kernels(z[0], products=True).softmax_fisher_project(
        z,
        flat(reference),
        flat(unit),
        flat(labels),
        flat(at_label),
        temperature,
        _contiguous(scale),
        _unit_stride(y),
        ones,
        precision,
        workspace,
        out,
        products if gram else None,
    )
    return out, products


def powers(
    logits: Tensor, weights: Tensor | None, logsumexp: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Σ w p [V], and r and u [T] of p = u exp((z − r) / τ), zero where the weight is."""
    dtype = accumulation_dtype(logits.dtype)
    sums = torch.zeros(logits.shape[-1], dtype=dtype, device=logits.device)
    reference = torch.zeros(logits.shape[:-1].numel(), dtype=dtype, device=logits.device)
    unit = torch.zeros_like(reference)
    if logits.numel():
        (z,) = token_rows(logits.ndim - 1, logits)
        how = (flat(weights), flat(logsumexp), temperature)
        kernels(z).softmax_fisher_powers(z, *how, sums, reference, unit)
    return sums, reference, unit


def _projections(reference: Tensor, y: Tensor, ones: bool, gram: bool) -> tuple[Tensor, Tensor]:
    tokens = reference.numel()
    # above the diagonal it stays zero
    products = y.new_zeros(tokens, tokens) if gram else y.new_zeros(0, 0)
    # torch 2.11 cannot add a bool to a symbolic size
    return y.new_empty(tokens, y.shape[1] + int(ones)), products


def expand_into(
    out: Tensor,
    logits: Sequence[Tensor],
    reference: Tensor,
    unit: Tensor,
    labels: Tensor | None,
    at_label: Tensor | None,
    temperature: float,
    scale: Tensor | None,
    c: Tensor,
    alpha: float,
    y: Tensor | None,
    y_scale: Tensor | None,
    precision: str,
    workspace: int,
) -> None:
    """Write diag(y_scale) y + alpha diag(scale) U c to a contiguous `out`, which may be y."""
    z = _canonical(logits)
    if out.numel() == 0 or not z:
        if y is None:
            out.zero_()
        else:
            out.copy_(y if y_scale is None else y * y_scale[:, None])
        return
    kernels(z[0], products=True).softmax_fisher_expand(
        z,
        flat(reference),
        flat(unit),
        flat(labels),
        flat(at_label),
        temperature,
        _contiguous(scale),
        _unit_stride(c),
        alpha,
        None if y is None else _unit_stride(y),
        _contiguous(y_scale),
        precision,
        workspace,
        out,
    )


def _expand(logits: Sequence[Tensor], *operands: Any) -> Tensor:
    out = _expansion(logits, operands[6])
    expand_into(out, logits, *operands)
    return out


def _expansion(logits: Sequence[Tensor], c: Tensor) -> Tensor:
    return c.new_empty(logits[0].shape[-1], c.shape[1])


project = define(
    f"softmax_fisher_project({_FACTOR}, Tensor? scale, Tensor y, bool ones, bool gram, "
    "str precision, int workspace) -> (Tensor, Tensor)",
    _project,
    lambda logits, reference, unit, labels, at_label, temperature, scale, y, ones, gram, *_: (
        _projections(reference, y, ones, gram)
    ),
    vmap="none",
)
expand = define(
    f"softmax_fisher_expand({_FACTOR}, Tensor? scale, Tensor c, float alpha, Tensor? y, "
    "Tensor? y_scale, str precision, int workspace) -> Tensor",
    _expand,
    lambda logits, reference, unit, labels, at_label, temperature, scale, c, *_: _expansion(
        logits, c
    ),
    vmap="none",
)


def _checked(
    logits: object,
    reference: object,
    unit: object,
    labels: object,
    at_label: object,
    temperature: object,
    scale: object,
    precision: object,
    workspace: object,
) -> tuple[tuple, Tensor | None, str, int]:
    """What both ops have in common, checked: the arguments of U, the scale, and how."""
    z = checks.logits(logits).detach()
    checks.classes(z, "a product with U")
    dtype = accumulation_dtype(z.dtype)
    r = checks.token_values("reference", reference, z, dtype)
    u = checks.token_values("unit", unit, z, dtype)
    if (labels is None) != (at_label is None):
        raise ValueError("labels and at_label belong together; one of them was given alone")
    ids = None if labels is None else checks.labels(labels, z)
    values = None if at_label is None else checks.token_values("at_label", at_label, z, dtype)
    s = None if scale is None else checks.class_values("scale", scale, z, dtype)
    tau = checks.temperature(temperature)
    how = checks.choice("precision", precision, PRECISIONS)
    return (
        ([z], r, u, ids, values, tau),
        s,
        how,
        checks.byte_count("workspace", workspace, WORKSPACE, z),
    )


def softmax_fisher_project(
    logits: Tensor,
    reference: Tensor,
    unit: Tensor,
    y: Tensor,
    *,
    temperature: float = 1.0,
    scale: Tensor | None = None,
    labels: Tensor | None = None,
    at_label: Tensor | None = None,
    ones: bool = False,
    gram: bool = False,
    precision: str = "tf32x3",
    workspace: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Uᵀ diag(s) Y, and Uᵀ diag(s) U if asked for, in one pass over the logits.

    A column of U [V, T] is u_t exp((z_t − r_t) / τ), but for `at_label` at the label.

    Args:
        logits: z [..., V]; float32, bfloat16, float16 or float64 (float64: CPU and reference).
        reference: r [...], finite, in the accumulation dtype: float32, or float64 for float64
            logits. z − r must not overflow the exponential: take the maximum.
        unit: u [...], the same dtype; where it is zero so is the column, whatever the logits hold.
        y: Y [V, k], the same dtype; k may be 0.
        temperature: τ > 0.
        scale: s [V] ≥ 0, the same dtype; None: ones.
        labels: int64 [...]; a label that is not in [0, V) changes nothing.
        at_label: [...], the same dtype: the element of a column at its label.
        ones: whether Y has a last column of ones that is not in memory.
        gram: whether to return the Gram matrix too.
        precision: of products on matrix units, see :func:`fisherkern.covariance_update_`.
        workspace: bytes for parts of U and Y; None: 64 MiB on the CPU, 512 MiB on a GPU.

    Returns:
        [T, k], or [T, k + 1] with `ones`, T tokens in the order of the leading dimensions; with
        `gram` also Uᵀ diag(s) U [T, T], its lower triangle, zero above. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: the Woodbury identity as in :doc:`operators`.

    >>> import torch, fisherkern
    >>> z, y = torch.zeros(2, 4), torch.arange(4.0)[:, None]
    >>> fisherkern.softmax_fisher_project(z, z.amax(-1), torch.tensor([0.25, 0.5]), y)
    tensor([[1.5000],
            [3.0000]])
    """
    factor, s, how, limit = _checked(
        logits, reference, unit, labels, at_label, temperature, scale, precision, workspace
    )
    z = factor[0][0]
    block = checks.class_block("y", y, z, accumulation_dtype(z.dtype))
    out, products = project(*factor, s, block, bool(ones), bool(gram), how, limit)
    return (out, products) if gram else out


def softmax_fisher_expand(
    logits: Tensor,
    reference: Tensor,
    unit: Tensor,
    c: Tensor,
    *,
    temperature: float = 1.0,
    scale: Tensor | None = None,
    labels: Tensor | None = None,
    at_label: Tensor | None = None,
    alpha: float = 1.0,
    y: Tensor | None = None,
    y_scale: Tensor | None = None,
    precision: str = "tf32x3",
    workspace: int | None = None,
) -> Tensor:
    """diag(s_y) Y + α diag(s) U C in one pass over the logits: the end of a Woodbury solve.

    Args:
        logits: z [..., V], and `reference`, `unit`, `temperature`, `labels`, `at_label`,
            `precision`, `workspace` as in :func:`softmax_fisher_project`.
        reference: r [...].
        unit: u [...].
        c: C [T, k] with a row per token, in the accumulation dtype.
        temperature: τ > 0.
        scale: s [V]; None: ones.
        labels: int64 [...].
        at_label: [...].
        alpha: α.
        y: Y [V, k]; None: nothing is added.
        y_scale: s_y [V]; None: ones.
        precision: of products on matrix units.
        workspace: bytes for parts of U and C.

    Returns:
        [V, k] in the accumulation dtype. Not differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: the Woodbury identity as in :doc:`operators`.

    >>> import torch, fisherkern
    >>> z, c = torch.zeros(2, 3), torch.tensor([[1.0], [2.0]])
    >>> fisherkern.softmax_fisher_expand(z, z.amax(-1), torch.ones(2), c).T
    tensor([[3., 3., 3.]])
    """
    factor, s, how, limit = _checked(
        logits, reference, unit, labels, at_label, temperature, scale, precision, workspace
    )
    z = factor[0][0]
    dtype = accumulation_dtype(z.dtype)
    rows = checks.tensor("c", c).detach()
    if rows.ndim != 2 or rows.shape[0] != factor[1].numel():
        raise ValueError(
            f"c has shape {list(rows.shape)}; expected [{factor[1].numel()}, k], a row per token"
        )
    if rows.dtype != dtype:
        raise TypeError(f"c has dtype {rows.dtype}; expected {dtype} for {z.dtype} logits")
    checks.device("c", rows, z)
    block = None if y is None else checks.class_block("y", y, z, dtype)
    if block is not None and block.shape[1] != rows.shape[1]:
        raise ValueError(
            f"y has shape {list(block.shape)}; expected {rows.shape[1]} columns, those of c"
        )
    if y_scale is not None and block is None:
        raise ValueError("y_scale was given without y, which it scales")
    s_y = None if y_scale is None else checks.class_values("y_scale", y_scale, z, dtype)
    return expand(
        *factor,
        s,
        rows,
        checks.number("alpha", alpha, -float("inf"), float("inf")),
        block,
        s_y,
        how,
        limit,
    )
