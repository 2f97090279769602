"""The CUDA back end: the ops of the extension, and covariance factors through cuBLAS.

A covariance update is packed, multiplied and averaged, some tokens at a time:

    panel   [G, T', P]  rows of G heads (or samples): T' tokens, P columns
    tile    [G, m, n]   leftᵀ right in float32, one product of torch
    factor  β factor + α tile

Packing and averaging are kernels of the extension (csrc/cuda/covariance.h), passed in as `native`:
the emulation has its own. Half precision is multiplied as it is, everything else in float32: six
products of bfloat16 terms, packed for tensor cores, took as long on an H200. The order of all sums
follows from shapes alone. Nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherkern.ops import _head_products
from fisherkern.ops._panel_products import Factor

# Bytes of panels and a tile together, where MIN_TOKENS fit.
WORKSPACE = 64 << 20
MIN_TOKENS = 64
# cuBLAS counts in 32 bits.
MAX_TOKENS = 1 << 30
# Rows, about, of one cuBLAS product of several that make up a lower triangle. A square of it is 128
# tiles of 256 × 128: one wave on 132 multiprocessors, two on 108. Smaller ones leave most idle.
BLOCK = 2048
# Columns in 16 bytes of bfloat16: rows of panels and blocks of factors are multiples of it.
_ALIGNED = 8

# Tokens of one product of half precision. Tensor cores cut off what they add to a sum: 1e-5 of it
# at 8192 tokens (H200), and at 256 still more than twice the error of plain float32. Between
# products float32 is added.
CHAIN_TOKENS = 128


def _whole(columns: int) -> int:
    return -(-columns // _ALIGNED) * _ALIGNED


class _PerToken(NamedTuple):
    """Which tokens [G, B, S] count, and how much; never both."""

    mask: Tensor | None = None
    weights: Tensor | None = None

    def _each(self, function: Callable[[Tensor], Tensor]) -> _PerToken:
        return _PerToken(*(None if t is None else function(t) for t in self))

    def view(self, *shape: int) -> _PerToken:
        return self._each(lambda t: t.view(shape))

    def expand(self, heads: int) -> _PerToken:
        return self._each(lambda t: t.expand(heads, -1, -1))

    def heads(self, first: int, last: int) -> _PerToken:
        return self._each(lambda t: t[first:last])

    def live(self) -> _PerToken:
        """The tokens that count, without their weights: a weight that is NaN does."""
        return self if self.weights is None else _PerToken(self.weights != 0)

    def all(self) -> bool:
        return self.mask is None and self.weights is None


@dataclass(frozen=True)
class _Operand:
    """One side of a product: x [G, B, S, d], and what is made of it on the way into a panel."""

    x: Tensor
    counts: _PerToken
    bias: bool
    squares: bool
    dtype: torch.dtype

    @property
    def tokens(self) -> int:
        return self.x.shape[1] * self.x.shape[2]

    @property
    def columns(self) -> int:
        """Of a panel."""
        return _whole(self.x.shape[3] + self.bias)

    @property
    def token_bytes(self) -> int:
        """Of a panel, per head."""
        return 0 if self.rows is not None else self.columns * self.dtype.itemsize

    @property
    def most_tokens(self) -> int:
        """Of one product."""
        return MAX_TOKENS if self.dtype == torch.float32 else CHAIN_TOKENS

    def heads(self, first: int, last: int) -> _Operand:
        """Those of G in [first, last)."""
        return replace(self, x=self.x[first:last], counts=self.counts.heads(first, last))

    @cached_property
    def rows(self) -> Tensor | None:
        """X itself as [G, T, d], where nothing is made of it and cuBLAS takes its strides."""
        x = self.x
        heads, batches, length, columns = x.shape
        plain = self.counts.all() and not self.bias and not self.squares
        if not plain or self.dtype != x.dtype:
            return None
        # two strides of tokens are no matrix, and rows that overlap (expanded ones) torch copies
        if batches > 1 and length > 1 and x.stride(1) != length * x.stride(2):
            return None
        rows = x.view(heads, self.tokens, columns)
        sizes = (x.data_ptr(), *(n * x.itemsize for n in (columns, *rows.stride()[:2])))
        aligned = all(size % 16 == 0 for size in sizes)
        return rows if aligned and rows.stride(2) == 1 and rows.stride(1) >= columns else None

    def panel(self, native: Any, first: int, tokens: int) -> Tensor:
        """[G, tokens, P] of the tokens from `first` on."""
        if self.rows is not None:
            return self.rows[:, first : first + tokens]
        shape = (len(self.x), tokens, self.columns)
        panel = torch.empty(shape, dtype=self.dtype, device=self.x.device)
        native.covariance_pack(self.x, *self.counts, self.bias, self.squares, first, panel)
        return panel


def _operands(
    left: Tensor, right: Tensor, counts: _PerToken, bias: tuple[bool, bool], squares: bool
) -> tuple[_Operand, _Operand]:
    """Left and right, where the left one has the weights; one and the same where they are equal."""
    weighted = counts.weights is not None
    dtype = torch.float32 if weighted or squares else left.dtype
    a = _Operand(left, counts, bias[0], squares, dtype)
    if left is right and not weighted:
        return a, a
    # zero times NaN is NaN: a token that does not count is left out of both
    return a, _Operand(right, counts.live(), bias[1], squares, dtype)


# ---- products -----------------------------------------------------------------------------------


@contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """TF32 in products of float32 if it was named, whatever the user chose for their own."""
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _product(left: Tensor, right: Tensor, precision: str) -> Tensor:
    """Leftᵀ right [G, m, n] in float32 for panels [G, k, m] and [G, k, n]."""
    # a hook runs under the autocast of the model, which would round the operands
    with torch.autocast(left.device.type, enabled=False):
        if left.dtype == torch.float32:
            with _float32_products(precision):
                return torch.bmm(left.mT, right)
        if left.is_cuda:
            return torch.bmm(left.mT, right, out_dtype=torch.float32)
        # the emulation: torch has no such product on the CPU
        return torch.bmm(left.float().mT, right.float())


def _tile_rows(rows: int, columns: int, budget: int, wanted: int | None = None) -> int:
    """Rows of a float32 tile: about `wanted` (all), and no more than fit into so many bytes.

    Equal shares: the one row that a bias adds is not worth a product. Aligned, as operands are.
    """
    most = max(_ALIGNED, budget // (4 * columns) // _ALIGNED * _ALIGNED)
    shares = max(1, round(rows / (wanted or rows)), -(-rows // most))
    return _whole(-(-rows // shares))


def _update(
    native: Any,
    left: _Operand,
    right: _Operand,
    alpha: Tensor,
    beta: float,
    factor: Tensor,
    lower: bool,
    precision: str,
) -> None:
    """Factor [G, m, n] ← β factor + α leftᵀ right; with `lower` where the column is ≤ the row."""
    heads, rows, columns = factor.shape
    block = BLOCK if lower else None
    step = _tile_rows(rows, right.columns, WORKSPACE // 2, block)
    tile_bytes = 4 * step * right.columns
    token_bytes = left.token_bytes + (0 if right is left else right.token_bytes)
    at_once = WORKSPACE // (tile_bytes + MIN_TOKENS * token_bytes)
    at_once = min(heads, max(1, at_once))
    room = WORKSPACE - at_once * tile_bytes
    chunk = max(MIN_TOKENS, room // (at_once * token_bytes)) if token_bytes else MAX_TOKENS
    chunk = min(chunk, left.most_tokens)
    for head in range(0, heads, at_once):
        a = left.heads(head, head + at_once)
        b = a if right is left else right.heads(head, head + at_once)
        for first in range(0, left.tokens, chunk):
            tokens = min(chunk, left.tokens - first)
            panel = a.panel(native, first, tokens)
            other = panel if b is a else b.panel(native, first, tokens)
            for row in range(0, rows, step):
                last = min(row + step, rows)
                width = last if lower else columns
                rows_of, columns_of = panel[..., row : _whole(last)], other[..., : _whole(width)]
                tile = _product(rows_of, columns_of, precision)
                native.factor_update(
                    tile[:, : last - row, :width],
                    alpha,
                    1.0 if first else beta,
                    row,
                    0,
                    lower,
                    False,
                    factor[head : head + at_once],
                )
                del tile  # before the next one is allocated
            del panel, other


def _update_samples(
    native: Any,
    left: _Operand,
    right: _Operand,
    alpha: Tensor,
    beta: float,
    factor: Tensor,
    precision: str,
) -> None:
    """Factor [1, m, n] ← β factor + α Σ over G of (leftᵀ right)², element by element."""
    samples, (_, rows, columns) = len(left.x), factor.shape
    # a tile, and the sums of a sample that does not fit into one panel
    step = _tile_rows(rows, right.columns, WORKSPACE // 4)
    tile_bytes = 4 * step * right.columns
    token_bytes = left.token_bytes + right.token_bytes
    chunk = max(MIN_TOKENS, WORKSPACE // 2 // token_bytes) if token_bytes else MAX_TOKENS
    chunk = min(chunk, left.most_tokens)
    at_once = max(1, WORKSPACE // (2 * tile_bytes + left.tokens * token_bytes))
    for row in range(0, rows, step):
        last = min(row + step, rows)
        band = replace(left, x=left.x[..., row:last])
        for sample in range(0, samples, at_once):
            a, b = (side.heads(sample, sample + at_once) for side in (band, right))
            products = _summed(native, a, b, chunk, precision)[:, : last - row, :columns]
            native.factor_update(
                products, alpha, 1.0 if sample else beta, row, 0, False, True, factor
            )
            del products


def _summed(native: Any, left: _Operand, right: _Operand, chunk: int, precision: str) -> Tensor:
    """Leftᵀ right [G, P, P'] in float32 over all tokens, at most `chunk` of them in a product."""
    total: Tensor | None = None
    for first in range(0, left.tokens, chunk):
        tokens = min(chunk, left.tokens - first)
        panels = (left.panel(native, first, tokens), right.panel(native, first, tokens))
        tile = _product(*panels, precision)
        if total is None:
            total = tile
        else:
            total += tile
    assert total is not None
    return total


# ---- the calling convention ---------------------------------------------------------------------


class Kernels:
    """The functions of ``_reference_kernels.py`` over the ops of the extension."""

    head_logits = staticmethod(_head_products.head_logits)
    head_pull = staticmethod(_head_products.head_pull)
    head_squares = staticmethod(_head_products.head_squares)

    def __init__(self, native: Any) -> None:
        self._native = native

    def __getattr__(self, name: str) -> Any:
        return getattr(self._native, name)

    def softmax_fisher_project(self, *operands: Any) -> None:
        """Uᵀ diag(scale) [y, 1] and the lower triangle of Uᵀ diag(scale) U."""
        Factor(self, *operands[:6]).project(*operands[6:])

    def softmax_fisher_expand(self, *operands: Any) -> None:
        """diag(y_scale) y + alpha diag(scale) U c."""
        Factor(self, *operands[:6]).expand(*operands[6:])

    def covariance_update(
        self,
        x: Tensor,
        mask: Tensor | None,
        weights: Tensor | None,
        alpha: Tensor,
        beta: float,
        bias: bool,
        precision: str,
        factor: Tensor,
    ) -> None:
        """Lower triangle of factor [H, D, D] ← β factor + α Σ w x̃ x̃ᵀ."""
        rows = x.permute(2, 0, 1, 3)
        tokens = _PerToken(mask, weights).view(1, *x.shape[:2]).expand(len(rows))
        sides = _operands(rows, rows, tokens, (bias, bias), False)
        _update(self._native, *sides, alpha, beta, factor, True, precision)

    def cross_update(
        self,
        x: Tensor,
        g: Tensor,
        mask: Tensor | None,
        weights: Tensor | None,
        alpha: Tensor,
        beta: float,
        bias: bool,
        form: str,
        precision: str,
        factor: Tensor,
    ) -> None:
        """Factor [d_out, D] ← β factor + α · the product of `form`."""
        samples = form == "samples"
        # samples take the place of heads
        rows, gradients = (t.unsqueeze(1 if samples else 0) for t in (x, g))
        tokens = _PerToken(mask, weights).view(*rows.shape[:3])
        squares = form == "squares"
        sides = _operands(gradients, rows, tokens, (False, bias), squares)
        if samples:
            _update_samples(self._native, *sides, alpha, beta, factor[None], precision)
        else:
            _update(self._native, *sides, alpha, beta, factor[None], False, precision)

    def mirror(self, factor: Tensor) -> None:
        """Copy the lower triangle of factor [H, D, D], any strides, onto the upper one."""
        self._native.mirror(factor)
