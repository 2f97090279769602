"""Products with the factor U of the mean Fisher, [V, T], whose entries never leave the registers.

u_t exp((z − r_t) / τ), but `at_label` at the label: a tile is made from the logits and multiplied
on the matrix units at once. Up to 128 columns of the other operand share one read of the logits; it
comes from L2, as programs side by side walk through it together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import Tensor

from fisherkern.kernels._common import exponential, rate, row_offset
from fisherkern.kernels._config import architecture, on_device
from fisherkern.kernels._factor_config import (
    ARITHMETIC,
    CLASSES_PER_SPLIT,
    LAUNCHES,
    LEAST_COLUMNS,
    MOST_COLUMNS,
    PROGRAMS,
    Launch,
)
from fisherkern.kernels._terms import terms_of
from fisherkern.kernels.covariance import covariance_update
from fisherkern.kernels.softmax_fisher_diagonals import softmax_fisher_mean_probs
from fisherkern.kernels.softmax_fisher_panel import softmax_fisher_panel
from fisherkern.kernels.softmax_fisher_stats import softmax_fisher_stats
from fisherkern.ops._panel_products import Factor, powers


@triton.jit
def units(reference_ptr, unit_ptr, token, tokens):
    """Reference and unit of tokens; both zero where the unit is, and past the last token."""
    unit = tl.load(unit_ptr + token, mask=token < tokens, other=0.0)
    reference = tl.load(reference_ptr + token, mask=token < tokens, other=0.0)
    # its rows are not read, and what a reference made of them must not reach the product
    return tl.where(unit == 0, 0.0, reference), unit


@triton.jit
def labels_of(labels_ptr, at_label_ptr, token, tokens, classes):
    """Label of each token, -1 where it is no class or there are none, and the entry there."""
    if labels_ptr is None:
        nothing = tl.zeros_like(token)
        return nothing - 1, nothing.to(tl.float32)
    else:
        label = tl.load(labels_ptr + token, mask=token < tokens, other=-1)
        label = tl.where((label >= 0) & (label < classes), label, -1).to(tl.int32)
        return label, tl.load(at_label_ptr + token, mask=token < tokens, other=0.0)


@triton.jit
def entries(z, reference, unit, labels_ptr, label, at_label, column, scale, scale_low):
    """U of a tile of logits; all that is per token or class has the orientation of the tile.

    Logits that were not read are −inf: their exponential, and so their entry, is zero.
    """
    u = exponential(z.to(tl.float32), reference, scale, scale_low) * unit
    if labels_ptr is not None:
        u = tl.where(column == label, at_label, u)
    return u


@triton.jit
def add_products(acc, u, at, plane, ARITHMETIC: tl.constexpr):
    """Acc + u x, where the terms of x lie at these pointers, a plane apart.

    The matrix units of sm_90 cut off what they add to an accumulator: a sum of all tokens that
    stayed there would be small by 1e-5. Theirs begins at zero in every step, with the small
    products; that of the steps is rounded.
    """
    if ARITHMETIC == "ieee":
        acc = tl.dot(u, tl.load(at), acc, input_precision="ieee")
    else:
        x0 = tl.load(at)
        x1 = tl.load(at + plane)
        u0 = u.to(tl.bfloat16)
        rest = u - u0.to(tl.float32)
        u1 = rest.to(tl.bfloat16)
        block = tl.dot(u1, x0)
        if ARITHMETIC == "bf16x6":
            u2 = (rest - u1.to(tl.float32)).to(tl.bfloat16)
            block = tl.dot(u1, x1)
            block = tl.dot(u2, x0, block)
            block = tl.dot(u0, tl.load(at + 2 * plane), block)
            block = tl.dot(u1, x0, block)
        block = tl.dot(u0, x1, block)
        # no dot with acc, as Triton makes of acc + dot(a, b): this one has its block to add to
        acc += tl.dot(u0, x0, block)
    return acc


@triton.jit
def project_kernel(
    z_ptr,
    reference_ptr,
    unit_ptr,
    labels_ptr,
    at_label_ptr,
    scale_ptr,
    terms_ptr,
    out_ptr,
    inner,
    z_outer,
    z_inner,
    tokens,
    classes,
    classes_per_split,
    width,
    terms_plane,
    terms_row,
    out_split,
    out_row,
    scale,
    scale_low,
    ONES: tl.constexpr,
    ARITHMETIC: tl.constexpr,
    TOKENS: tl.constexpr,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of Uᵀ [x, diag(scale) 1] for x in terms, summed over the classes of one split."""
    blocks = tl.maximum(tl.cdiv(width, COLUMNS), 1)
    # those that read the same logits are neighbours
    block = tl.program_id(0) % blocks
    split = tl.program_id(1)
    token = tl.program_id(0) // blocks * TOKENS + tl.arange(0, TOKENS)
    k = block * COLUMNS + tl.arange(0, COLUMNS)
    reference, unit = units(reference_ptr, unit_ptr, token, tokens)
    label, at_label = labels_of(labels_ptr, at_label_ptr, token, tokens, classes)
    row = z_ptr + row_offset(token, inner, z_outer, z_inner)
    tile = tl.arange(0, CLASSES)[:, None] * terms_row + k[None, :]
    first = split * classes_per_split
    last = tl.minimum(first + classes_per_split, classes)
    acc = tl.zeros([TOKENS, COLUMNS], tl.float32)
    sums = tl.zeros([TOKENS], tl.float32)
    for start in range(first, last, CLASSES):
        column = start + tl.arange(0, CLASSES)
        # a split is whole tiles: the bound that vector loads can have is that of all classes
        counts = (column < classes)[None, :] & (unit != 0)[:, None]
        z = tl.load(row[:, None] + column[None, :], mask=counts, other=float("-inf"))
        u = entries(
            z,
            reference[:, None],
            unit[:, None],
            labels_ptr,
            label[:, None],
            at_label[:, None],
            column[None, :],
            scale,
            scale_low,
        )
        if ONES:
            if scale_ptr is not None:
                weight = tl.load(scale_ptr + column, mask=column < classes, other=0.0)
                sums += tl.sum(u * weight[None, :], 1)
            else:
                sums += tl.sum(u, 1)
        at = terms_ptr + tl.cast(start, tl.int64) * terms_row + tile
        acc = add_products(acc, u, at, terms_plane, ARITHMETIC)
    to = out_ptr + split.to(tl.int64) * out_split + token.to(tl.int64) * out_row
    inside = (token < tokens)[:, None] & (k < width)[None, :]
    tl.store(to[:, None] + k[None, :], acc, mask=inside)
    if ONES and block == 0:
        tl.store(to + width, sums, mask=token < tokens)


@triton.jit
def expand_kernel(
    z_ptr,
    reference_ptr,
    unit_ptr,
    labels_ptr,
    at_label_ptr,
    scale_ptr,
    terms_ptr,
    y_ptr,
    y_scale_ptr,
    out_ptr,
    inner,
    z_outer,
    z_inner,
    tokens,
    classes,
    width,
    terms_plane,
    terms_row,
    y_row,
    out_row,
    alpha,
    scale,
    scale_low,
    ARITHMETIC: tl.constexpr,
    TOKENS: tl.constexpr,
    CLASSES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of diag(y_scale) y + alpha diag(scale) U x for x in terms; y may be out."""
    blocks = tl.cdiv(width, COLUMNS)
    column = tl.program_id(0) // blocks * CLASSES + tl.arange(0, CLASSES)
    k = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    tile = tl.arange(0, TOKENS)[:, None] * terms_row + k[None, :]
    acc = tl.zeros([CLASSES, COLUMNS], tl.float32)
    for start in range(0, tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        reference, unit = units(reference_ptr, unit_ptr, token, tokens)
        label, at_label = labels_of(labels_ptr, at_label_ptr, token, tokens, classes)
        row = z_ptr + row_offset(token, inner, z_outer, z_inner)
        # in the orientation of the product: tl.trans of the other one would go through registers
        counts = (column < classes)[:, None] & (unit != 0)[None, :]
        z = tl.load(row[None, :] + column[:, None], mask=counts, other=float("-inf"))
        u = entries(
            z,
            reference[None, :],
            unit[None, :],
            labels_ptr,
            label[None, :],
            at_label[None, :],
            column[:, None],
            scale,
            scale_low,
        )
        at = terms_ptr + tl.cast(start, tl.int64) * terms_row + tile
        acc = add_products(acc, u, at, terms_plane, ARITHMETIC)
    acc *= alpha
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + column, mask=column < classes, other=0.0)[:, None]
    inside = (column < classes)[:, None] & (k < width)[None, :]
    wide = column[:, None].to(tl.int64)
    if y_ptr is not None:
        y = tl.load(y_ptr + wide * y_row + k[None, :], mask=inside, other=0.0)
        if y_scale_ptr is not None:
            y *= tl.load(y_scale_ptr + column, mask=column < classes, other=0.0)[:, None]
        acc += y
    tl.store(out_ptr + wide * out_row + k[None, :], acc, mask=inside)


# ---- host ---------------------------------------------------------------------------------------


def _columns(family: str, width: int) -> int:
    """Columns of a program."""
    return min(max(triton.next_power_of_2(width), LEAST_COLUMNS), MOST_COLUMNS[family])


def _launch(family: str, arithmetic: str, logits: Tensor, columns: int) -> Launch:
    launches = LAUNCHES[architecture(logits.device)][family]
    rules = launches[arithmetic]
    # as the kernels are specialised: by 16 elements
    sizes = (logits.shape[-1], *logits.stride()[:2])
    if logits.data_ptr() % 16 or any(size % 16 for size in sizes):
        rules = launches.get(f"{arithmetic} unaligned", rules)
    return next(rule.launch for rule in rules if columns <= rule.columns)


def _class_splits(classes: int, tiles: int, step: int, device: torch.device) -> tuple[int, int]:
    """The number of splits, and how many classes are in each: whole steps."""
    key = architecture(device)
    wanted = max(1, min(PROGRAMS[key] // tiles, classes // CLASSES_PER_SPLIT[key]))
    each = triton.cdiv(triton.cdiv(classes, wanted), step) * step
    return triton.cdiv(classes, each), each


def _batches(
    logits: Sequence[Tensor],
    reference: Tensor,
    unit: Tensor,
    labels: Tensor | None,
    at_label: Tensor | None,
) -> Iterator[tuple[Tensor, slice, tuple[Tensor | None, ...]]]:
    """Logits of each batch, which tokens they are, and what the kernels take of these."""
    first = 0
    for z in logits:
        here = slice(first, first + z.shape[0] * z.shape[1])
        first = here.stop
        values = (reference, unit, labels, at_label)
        yield z, here, tuple(None if x is None else x[here] for x in values)


def softmax_fisher_powers(
    logits: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    sums: Tensor,
    reference: Tensor,
    unit: Tensor,
) -> None:
    """Sums [V] = Σ w p; reference and unit [T] with p = unit exp((z − reference) / τ)."""
    kernels = SimpleNamespace(
        softmax_fisher_mean_probs=softmax_fisher_mean_probs,
        softmax_fisher_stats=softmax_fisher_stats,
    )
    powers(kernels, logits, weights, logsumexp, temperature, sums, reference, unit)


def softmax_fisher_project(
    logits: Sequence[Tensor],
    reference: Tensor,
    unit: Tensor,
    labels: Tensor | None,
    at_label: Tensor | None,
    temperature: float,
    scale: Tensor | None,
    y: Tensor,
    ones: bool,
    precision: str,
    workspace: int,
    out: Tensor,
    gram: Tensor | None,
) -> None:
    """Out [T, K (+ 1)] = Uᵀ diag(scale) [y, 1]; lower triangle of gram = Uᵀ diag(scale) U."""
    if gram is not None:
        # as many columns as tokens: each entry of U is used often enough to be written
        kernels = SimpleNamespace(
            softmax_fisher_panel=softmax_fisher_panel, covariance_update=covariance_update
        )
        factor = Factor(kernels, logits, reference, unit, labels, at_label, temperature)
        factor.project(scale, y[:, :0], False, precision, workspace, out[:, :0], gram)
    if not out.shape[1]:
        return
    classes, width = y.shape
    arithmetic, columns = ARITHMETIC[precision], _columns("project", width)
    with on_device(y):
        terms = terms_of(y, scale, columns, arithmetic)
    for z, here, values in _batches(logits, reference, unit, labels, at_label):
        step, tile, warps, stages = _launch("project", arithmetic, z, columns)
        rows = out[here]
        tokens = rows.shape[0]
        tiles = triton.cdiv(tokens, step) * max(1, triton.cdiv(width, columns))
        splits, per_split = _class_splits(classes, tiles, tile, z.device)
        partial = rows[None] if splits == 1 else rows.new_empty(splits, *rows.shape)
        with on_device(z):
            project_kernel[(tiles, splits)](
                z,
                *values,
                scale,
                terms,
                partial,
                z.shape[1],
                *z.stride()[:2],
                tokens,
                classes,
                per_split,
                width,
                *terms.stride()[:2],
                *partial.stride()[:2],
                *rate(temperature),
                ONES=ones,
                ARITHMETIC=arithmetic,
                TOKENS=step,
                CLASSES=tile,
                COLUMNS=columns,
                num_warps=warps,
                num_stages=stages,
                enable_fp_fusion=True,
            )
        if splits > 1:
            torch.sum(partial, 0, out=rows)


def softmax_fisher_expand(
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
    out: Tensor,
) -> None:
    """Out [V, K] = diag(y_scale) y + alpha diag(scale) U c."""
    classes, width = out.shape
    arithmetic, columns = ARITHMETIC[precision], _columns("expand", width)
    for z, here, values in _batches(logits, reference, unit, labels, at_label):
        step, tile, warps, stages = _launch("expand", arithmetic, z, columns)
        tiles = triton.cdiv(classes, tile) * triton.cdiv(width, columns)
        with on_device(z):
            terms = terms_of(c[here], None, columns, arithmetic)
            expand_kernel[(tiles,)](
                z,
                *values,
                scale,
                terms,
                y,
                y_scale,
                out,
                z.shape[1],
                *z.stride()[:2],
                z.shape[0] * z.shape[1],
                classes,
                width,
                *terms.stride()[:2],
                0 if y is None else y.stride(0),
                out.stride(0),
                alpha,
                *rate(temperature),
                ARITHMETIC=arithmetic,
                TOKENS=step,
                CLASSES=tile,
                COLUMNS=columns,
                num_warps=warps,
                num_stages=stages,
                enable_fp_fusion=True,
            )
        # the tokens that follow add to it
        y, y_scale = out, None


# the first with all operands, the others with as few as there can be
_NO_LABELS = {"labels_ptr": None, "at_label_ptr": None, "scale_ptr": None}
AOT = (
    (project_kernel, "project", ({"ONES": True}, {"ONES": False, **_NO_LABELS})),
    (expand_kernel, "expand", ({}, {**_NO_LABELS, "y_ptr": None, "y_scale_ptr": None})),
)
