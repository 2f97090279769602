"""Gradients of the outputs whose backward passes add up to the Fisher: type-2 and type-mc.

Each is a tensor of the shape of the outputs. Positions of a sample share parameters and, in
attention, each other, so their gradients mix on the way down; labels are independent, so in the
Fisher they do not. Sampled gradients are independent by nature. The columns of a root are made so
by a sign per sample, position and column, so that products of different positions cancel on
average; or one position is pulled back at a time, and there are none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fisherkern.ops.head_fisher import head_fisher_pullback_root, head_fisher_sample
from fisherkern.ops.softmax_fisher import softmax_fisher_sample, softmax_fisher_sqrt_matvec

FISHER_TYPES = ("type-2", "mc", "empirical")


def sampled(
    logits: Tensor, mask: Tensor | None, samples: int, generator: torch.Generator | None
) -> Iterator[Tensor]:
    """The p − e_y of `samples` draws of y ~ p."""
    for _ in range(samples):
        yield softmax_fisher_sample(logits, generator, mask=mask).gradients


def columns(logits: Tensor, mask: Tensor | None, positions: Positions) -> Iterator[Tensor]:
    """The V columns of L = diag √p − p √pᵀ, for every token at once."""
    V = logits.shape[-1]
    unit = logits.new_zeros(V)
    for j in range(V):
        unit[j] = 1
        yield from positions.apart(softmax_fisher_sqrt_matvec(logits, unit, mask=mask), j)
        unit[j] = 0


def sampled_of_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
    samples: int,
    generator: torch.Generator | None,
) -> Iterator[Tensor]:
    """Jᵀ (p − e_y) for `samples` draws of y ~ p, the logits of no more than a few tokens stored."""
    for _ in range(samples):
        yield head_fisher_sample(
            hidden, weight, generator, bias=bias, softcap=softcap, mask=mask
        ).gradients


def columns_of_hidden(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    mask: Tensor | None,
    positions: Positions,
) -> Iterator[Tensor]:
    """The d columns of the root of Jᵀ F J, for every token at once; T d² of memory."""
    root = head_fisher_pullback_root(
        hidden, weight, bias=bias, softcap=softcap, mask=mask, reduction="none"
    )
    for j in range(hidden.shape[-1]):
        column = root[..., j].to(hidden.dtype)
        if bool(column.any()):
            yield from positions.apart(column, j)


class Positions(NamedTuple):
    """How gradients of different positions of a sample are kept from mixing."""

    first: int
    """The number of the first sample of the batch, which signs depend on."""
    exact: bool = False
    """One position at a time."""

    def apart(self, gradient: Tensor, column: int) -> Iterator[Tensor]:
        """Gradients to pull back for a column [B, *positions, d] of a root."""
        count = gradient.shape[1:-1].numel()
        if count < 2:
            yield gradient
        elif self.exact:
            flat = gradient.flatten(1, -2)
            for position in range(count):
                alone = torch.zeros_like(flat)
                alone[:, position] = flat[:, position]
                yield alone.view(gradient.shape)
        else:
            signs = _signs(len(gradient), count, column, self.first)
            shape = (*gradient.shape[:-1], 1)
            yield gradient * signs.view(shape).to(gradient.device, gradient.dtype)


def _signs(samples: int, positions: int, column: int, first: int) -> Tensor:
    """±1 [B, S], a hash of sample, position and column: the same on every device, in any batch."""
    sample = torch.arange(first, first + samples).unsqueeze(1)
    position = torch.arange(positions)
    mixed = _mix(_mix(_mix(sample) + position) + column)
    return 1 - 2 * (mixed & 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of SplitMix64 on int64, whose products wrap (Steele, Lea and Flood 2014)."""
    x = x + _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _shifted(x, shift)) * _signed(factor)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shifted right as if it had no sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """A word of 64 bits as an int64."""
    return word - (1 << 64) if word >> 63 else word
