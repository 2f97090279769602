"""What the head Fisher ops share: checked arguments, and logits made some tokens at a time.

Of the logits [T, V] there is never more than a chunk, in memory of the size of the workspace, in
float32 at least, whatever the dtype of h and W. What is done to a chunk are the softmax Fisher
kernels of the back end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._kernels import kernels
from fisherkern.ops._rows import flat
from fisherkern.ops._values import checked_weights
from fisherkern.reference import accumulation_dtype, normalised

# Bytes for logits and what is made of them.
WORKSPACE = {"cpu": 64 << 20, "cuda": 512 << 20}
# Of it, what is left to products for their panels and partial sums.
_FOR_PRODUCTS = 0.125
# The slopes of a soft-cap are made for one in so many tokens of a chunk at a time.
_SLOPES = 16
# Products on CPUs multiply so many tokens at a time, or half of them.
_VECTOR = 16

SCHEMA = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor? weights, float? softcap, "
    "float temperature, int workspace"
)


class Arguments(NamedTuple):
    """The first arguments of every op, checked, in the order of the schema."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    weights: Tensor | None
    """[...] in the accumulation dtype, from a mask or weights; None: every token counts once."""
    softcap: float | None
    temperature: float
    workspace: int


def check_head(
    hidden: object,
    weight: object,
    bias: object,
    softcap: object,
    temperature: object,
    mask: object,
    weights: object,
    workspace: object,
) -> Arguments:
    """Check the arguments that every op has in common."""
    h = checks.activations("hidden", hidden, 1).detach()
    W = checks.head_weight(weight, h).detach()
    b = None if bias is None else checks.head_bias(bias, W).detach()
    cap = None if softcap is None else checks.softcap(softcap)
    tau = checks.temperature(temperature)
    m, w = checks.mask_or_weights(mask, weights, h, "hidden")
    dtype = accumulation_dtype(h.dtype)
    if m is not None:
        w = m.to(dtype)
    elif w is not None:
        w = checked_weights(w, dtype)
    return Arguments(h, W, b, w, cap, tau, checks.byte_count("workspace", workspace, WORKSPACE, h))


class Block(NamedTuple):
    """Some tokens of a chunk."""

    rows: slice
    """In the chunk."""
    tokens: slice
    """Of all."""
    z: Tensor
    """[t, V], which may be written over."""
    weights: Tensor | None
    """[t]."""
    slope: Tensor | None
    """∂z / ∂(W h + b) [t, V], if there is a soft-cap; the memory is that of the next block too."""


class Chunk(NamedTuple):
    """Some tokens, and their logits."""

    tokens: slice
    hidden: Tensor
    """[t, d]; zeros for tokens that do not count."""
    z: Tensor
    """[t, V], which may be written over."""
    weights: Tensor | None
    """[t]."""
    spare: Tensor | None
    """As much memory as z, if it was asked for."""
    softcap: float | None
    for_slopes: Tensor
    """[b, V], memory for the slopes of a block."""

    def blocks(self, most: int | None = None) -> Iterator[Block]:
        """All tokens, as many at a time as slopes are wanted for, and at most `most`.

        Slopes of a whole chunk would halve it, and leave the caches before they are used.
        """
        count = self.z.shape[0]
        size = count if self.softcap is None else self.for_slopes.shape[0]
        size = max(size if most is None else min(size, most), 1)
        for first in range(0, count, size):
            rows = slice(first, min(first + size, count))
            z, start = self.z[rows], self.tokens.start
            slope = None
            if self.softcap is not None:
                slope = self.for_slopes[: len(z)]
                torch.addcmul(z.new_ones(1), z, z, value=-1 / self.softcap**2, out=slope)
            w = None if self.weights is None else self.weights[rows]
            yield Block(rows, slice(start + rows.start, start + rows.stop), z, w, slope)


class Head:
    """z = softcap(W h + b) of the tokens [T], and products with W."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        weights: Tensor | None,
        softcap: float | None,
        workspace: int,
    ) -> None:
        self.weights = flat(weights)
        self.hidden = unit_stride(hidden.reshape(-1, hidden.shape[-1]))
        self.weight = unit_stride(weight)
        self.bias, self.softcap = bias, softcap
        self.dtype = accumulation_dtype(hidden.dtype)
        self.kernels = kernels(hidden)
        self.products = kernels(hidden, products=True)
        self.budget = int(workspace * (1 - _FOR_PRODUCTS))

    @property
    def tokens(self) -> int:
        """T."""
        return self.hidden.shape[0]

    @property
    def classes(self) -> int:
        """V."""
        return self.weight.shape[0]

    def new(self, *shape: int) -> Tensor:
        """Uninitialised memory in the accumulation dtype."""
        return torch.empty(shape, dtype=self.dtype, device=self.hidden.device)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in the accumulation dtype."""
        return torch.zeros(shape, dtype=self.dtype, device=self.hidden.device)

    def _rows(self, tokens: slice) -> Tensor:
        h = self.hidden[tokens]
        if self.weights is None:
            return h
        # a NaN of a token that does not count would reach others in products over tokens
        return torch.where((self.weights[tokens] == 0)[:, None], 0, h)

    def images(self, x: Tensor, out: Tensor) -> Tensor:
        """Write x Wᵀ [t, V] for x [t, d], in the dtype of W, to `out`."""
        self.kernels.head_logits(x, self.weight, None, None, out)
        return out

    def pull(self, rows: Tensor, out: Tensor) -> Tensor:
        """Write rows [t, V] times W to `out` [t, d], in its dtype."""
        result = out if out.dtype == self.dtype else self.new(*out.shape)
        self.kernels.head_pull(rows, self.weight, result)
        return out if result is out else out.copy_(result)

    def silence(self, values: Tensor) -> None:
        """Zero where the weight of a token is: 0 · NaN of a W that holds one is not."""
        if self.weights is not None:
            values.masked_fill_((self.weights == 0)[:, None], 0)

    def chunks(self, *, spare: bool = False, slopes: bool = True) -> Iterator[Chunk]:
        """All tokens, some at a time, and their logits; `spare`: with as much memory again."""
        T, V, buffers = self.tokens, self.classes, 2 if spare else 1
        row = V * self.dtype.itemsize * buffers
        if self.hidden.dtype != self.dtype:  # a product on tensor cores rounds what it multiplies
            row += V * self.hidden.dtype.itemsize * self.hidden.is_cuda
        slopes = slopes and self.softcap is not None
        if slopes:
            row += row // _SLOPES
        most = max(self.budget // row, 1)
        step = -(-T // max(-(-T // most), 1))
        if most >= _VECTOR:  # of whole vectors of tokens
            step = min(-(-step // _VECTOR), most // _VECTOR) * _VECTOR
        step = min(step, T)
        memory = self.new(buffers, step, V)
        for_slopes = self.new(-(-step // _SLOPES) if slopes else 0, V)
        for first in range(0, T, max(step, 1)):
            tokens = slice(first, min(first + step, T))
            z, *rest = memory[:, : tokens.stop - first]
            h = self._rows(tokens)
            self.kernels.head_logits(h, self.weight, self.bias, self.softcap, z)
            w = None if self.weights is None else self.weights[tokens]
            yield Chunk(tokens, h, z, w, rest[0] if rest else None, self.softcap, for_slopes)

    def tiles(self, budget: int) -> Iterator[tuple[slice, Tensor]]:
        """All classes, some at a time, and the logits [T, n] of all tokens for them."""
        T, V = self.tokens, self.classes
        step = min(max(budget // max(T * self.dtype.itemsize, 1), 1), V)
        memory = self.new(T * step)
        h = self._rows(slice(None))
        for first in range(0, V, step):
            classes = slice(first, min(first + step, V))
            n = classes.stop - first
            z = memory[: T * n].view(T, n)
            bias = None if self.bias is None else self.bias[classes]
            if T:
                self.kernels.head_logits(h, self.weight[classes], bias, self.softcap, z)
            yield classes, z


def unit_stride(x: Tensor) -> Tensor:
    """A matrix whose rows are contiguous, copied only if they are not."""
    return x if x.stride(1) == 1 else x.contiguous()


def head_of(arguments: tuple[Any, ...]) -> tuple[Head, float]:
    """The head and the temperature of the first arguments of an op."""
    hidden, weight, bias, weights, softcap, temperature, workspace = arguments
    return Head(hidden, weight, bias, weights, softcap, workspace), temperature


def new(hidden: Tensor, *shape: int) -> Tensor:
    """An uninitialised result in the accumulation dtype."""
    return torch.empty(shape, dtype=accumulation_dtype(hidden.dtype), device=hidden.device)


def with_reduction(arguments: Arguments, reduction: str) -> Arguments:
    """The same with the weights that turn a weighted sum into the reduction."""
    # hidden states stand in for logits: only the dimensions of the tokens matter
    return arguments._replace(weights=normalised(arguments.weights, arguments.hidden, reduction))
