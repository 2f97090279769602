"""The Fisher of hidden states, M = Jᵀ F J [d, d]: summed over tokens, per token, and its root.

With J_v = s_v W_v, s = ∂z / ∂(W h + b), M is the covariance of J_v under v ~ p:

    Σ w M = Wᵀ diag(Σ w p s²) W − Σ w μ μᵀ,   μ = Σ p_v J_v

The classes of all tokens share one product with W. On a peaked row, p = 1 − ε at x = J_star, the
two terms are nearly equal. Without the star, μ' = Σ' p_v J_v, what remains of it is of order ε:

    M = Σ' p_v J_v J_vᵀ − μ' μ'ᵀ − (1 − ε) (x μ''ᵀ + μ'' xᵀ),   μ'' = μ' − ε x / 2
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._library import define
from fisherkern.ops.covariance._common import PRECISIONS
from fisherkern.ops.head_fisher._common import (
    SCHEMA,
    Block,
    Chunk,
    Head,
    check_head,
    head_of,
    new,
    with_reduction,
)

ACCURACIES = ("standard", "high")

# ---- raw op -----------------------------------------------------------------------------------


class _Sum(NamedTuple):
    """Σ w M, its lower triangle, to which terms are added."""

    head: Head
    scale: float
    """1 / τ²."""
    precision: str
    out: Tensor

    def add_classes(self, density: Tensor) -> None:
        """Add Wᵀ diag(density) W, density [V]."""
        self._covariance(self.head.weight, density, 1.0)

    def add_tokens(self, tokens: _Tokens) -> None:
        """Subtract what is μ μᵀ without stars."""
        w, means = tokens.weights, tokens.means
        self._covariance(means, w, -1.0)
        if tokens.stars is None or tokens.epsilon is None:
            return
        e = tokens.epsilon
        within = (1 - e) if w is None else w * (1 - e)
        others = means - e[:, None] / 2 * tokens.stars
        product, one = self.head.new(*self.out.shape), self.head.new(1).fill_(1)
        how = (None, within, one, 0.0, False, "product", self.precision)
        self.head.products.cross_update(tokens.stars[None], others[None], *how, product)
        self.out.sub_(product + product.mT, alpha=self.scale)

    def _covariance(self, rows: Tensor, weights: Tensor | None, sign: float) -> None:
        alpha = self.head.new(1).fill_(sign * self.scale)
        how = (None, weights, alpha, 1.0, False, self.precision, self.out[None])
        self.head.products.covariance_update(rows[None, :, None], *how)


class _Tokens(NamedTuple):
    """What M of some tokens is made of beside its density over classes, Σ w p s²."""

    means: Tensor
    """μ, or μ' [t, d]."""
    weights: Tensor | None
    """[t]."""
    stars: Tensor | None = None
    """x [t, d] if they were left out."""
    epsilon: Tensor | None = None
    """[t] if they were left out."""

    def split(self) -> Iterator[_Tokens]:
        """One by one."""
        for t in range(len(self.means)):
            yield _Tokens(*(None if x is None else x[t : t + 1] for x in self))  # type: ignore[arg-type]


def _without_star(head: Head, block: Block, star: Tensor) -> tuple[Tensor, Tensor]:
    """Leave the star [t, 1] out of p; x, and ε summed from the other classes."""
    block.z.scatter_(1, star, 0)
    stars = head.weight[star[:, 0]].to(head.dtype)
    if block.slope is not None:
        stars *= block.slope.gather(1, star)
    return stars, block.z.sum(-1)


def _add_density(block: Block, density: Tensor) -> None:
    """Add Σ w p s² [V]; p becomes p s."""
    p, slope = block.z, block.slope
    if slope is not None:
        p.mul_(slope)
        p = slope.mul_(p)
    density.addmv_(p.mT, p.new_ones(len(p)) if block.weights is None else block.weights)


def _add_chunk(
    head: Head,
    part: Chunk,
    temperature: float,
    high: bool,
    sums: list[_Sum],
    density: Tensor | None,
    memory: Tensor,
) -> None:
    """Add the tokens of a chunk to the sum and Σ w p s² [V]; without that, to a sum for each.

    `memory` [V] is written over.
    """
    each = density is None
    count, stars, epsilons = len(part.z), [], []
    reference, unit = head.new(count), head.new(count)
    powers = (part.weights, None, temperature, memory, reference, unit)
    head.kernels.softmax_fisher_powers(part.z[None], *powers)
    for block in part.blocks(1 if each else None):
        z, rows = block.z, block.rows
        star = z.argmax(-1, keepdim=True) if high else None
        panel = (reference[rows], unit[rows], None, temperature, False, z)
        head.kernels.softmax_fisher_panel(z[None], *panel)
        if star is not None:
            x, epsilon = _without_star(head, block, star)
            stars.append(x)
            epsilons.append(epsilon)
        if density is None:
            _add_density(block, memory.zero_())
            sums[block.tokens.start].add_classes(memory)
        elif star is None and block.slope is None:
            density += memory  # Σ w p
        else:
            _add_density(block, density)
    means = head.pull(part.z, head.new(count, head.weight.shape[1]))
    tokens = _Tokens(means, part.weights)
    if stars:
        tokens = tokens._replace(stars=torch.cat(stars), epsilon=torch.cat(epsilons))
    if each:
        for total, one in zip(sums[part.tokens], tokens.split(), strict=True):
            total.add_tokens(one)
    else:
        sums[0].add_tokens(tokens)


def _pullback(*arguments: Any) -> Tensor:
    *common, each, high, precision = arguments
    head, temperature = head_of(tuple(common))
    out = _new_pullback(*arguments).zero_()
    matrices = out.view(-1, *out.shape[-2:])
    sums = [_Sum(head, 1 / temperature**2, precision, matrix) for matrix in matrices]
    density, memory = None if each else head.zeros(head.classes), head.new(head.classes)
    for part in head.chunks():
        _add_chunk(head, part, temperature, high, sums, density, memory)
        del part  # the product with W needs its memory
    if density is not None:
        sums[0].add_classes(density)
    if out.numel():
        head.kernels.mirror(matrices)
    return out


def _new_pullback(hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    d = weight.shape[1]
    lead = hidden.shape[:-1] if rest[-3] else ()
    return new(hidden, *lead, d, d)


_pullback_op = define(
    f"head_fisher_pullback({SCHEMA}, bool each, bool high, str precision) -> Tensor",
    _pullback,
    _new_pullback,
    vmap="none",
)

# ---- public -----------------------------------------------------------------------------------


def head_fisher_pullback(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    accuracy: str = "standard",
    precision: str = "tf32x3",
    workspace: int | None = None,
) -> Tensor:
    """Σ w M / N, M = Jᵀ F J [d, d]: the exact (type-2) Fisher of the hidden states.

    With a root R of it, M = R Rᵀ, d vector-Jacobian products give the exact Fisher of the layers
    below, instead of V.

    Args:
        hidden: h [..., d], and the other arguments as in :func:`fisherkern.head_fisher_stats`.
        weight: W [V, d].
        bias: b [V].
        softcap: c > 0; J = ∂z / ∂h is diag(∂z / ∂(W h + b)) W with one, and W without.
        temperature: τ > 0.
        mask: bool [...]; tokens that are False contribute exactly zero.
        weights: float [...] >= 0, instead of a mask.
        reduction: "mean" divides by N = Σ w (zeros where N = 0), "sum" does not; "none" gives a
            matrix per token, at the cost of a product with W for each: for chosen tokens.
        accuracy: "high" leaves the most likely class out of both terms of the difference that M is
            and adds it in a form that does not cancel: for peaked rows, at little cost.
        precision: of products on matrix units, see :func:`fisherkern.covariance_update_`.
        workspace: bytes for logits.

    Returns:
        [d, d], or [..., d, d] for "none"; symmetric, float32 (float64 for float64 inputs). Not
        differentiable.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: Martens 2020, "New insights and perspectives on the natural gradient method", section 9;
    docs/head_fisher.md derives the form without cancellation.

    >>> import torch, fisherkern
    >>> W = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> fisherkern.head_fisher_pullback(torch.zeros(1, 2), W).round(decimals=5)
    tensor([[1., 0.],
            [0., 0.]])
    """
    how = checks.reduction(reduction, ("none", "mean", "sum"))
    high = checks.choice("accuracy", accuracy, ACCURACIES) == "high"
    arithmetic = checks.choice("precision", precision, PRECISIONS)
    arguments = check_head(hidden, weight, bias, softcap, temperature, mask, weights, workspace)
    if how != "none":
        arguments = with_reduction(arguments, how)
    return _pullback_op(*arguments, how == "none", high, arithmetic)


def head_fisher_pullback_root(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: str = "mean",
    accuracy: str = "high",
    precision: str = "tf32x3",
    workspace: int | None = None,
) -> Tensor:
    """R with R Rᵀ = :func:`fisherkern.head_fisher_pullback`, columns by decreasing eigenvalue.

    Args:
        hidden: h [..., d], and the other arguments as in :func:`fisherkern.head_fisher_pullback`.
        weight: W [V, d].
        bias: b [V].
        softcap: c > 0.
        temperature: τ > 0.
        mask: bool [...].
        weights: float [...] >= 0, instead of a mask.
        reduction: "mean", "sum" or "none".
        accuracy: "high" or "standard".
        precision: of products on matrix units.
        workspace: bytes for logits.

    Returns:
        [d, d], or [..., d, d] for "none": eigenvectors times the roots of their eigenvalues, from
        float64; an eigenvalue below zero, which is rounding, counts as zero. The first columns are
        the best factor of their rank.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: as :func:`fisherkern.head_fisher_pullback`.

    >>> import torch, fisherkern
    >>> W = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    >>> fisherkern.head_fisher_pullback_root(torch.zeros(1, 2), W).abs().round(decimals=5)
    tensor([[1., 0.],
            [0., 0.]])
    """
    M = head_fisher_pullback(
        hidden,
        weight,
        bias=bias,
        softcap=softcap,
        temperature=temperature,
        mask=mask,
        weights=weights,
        reduction=reduction,
        accuracy=accuracy,
        precision=precision,
        workspace=workspace,
    )
    # eigh raises on a NaN, which has to stay in the matrix of its token
    good = M.isfinite().all(-1).all(-1)[..., None, None]
    values, vectors = torch.linalg.eigh(torch.where(good, M, 0).double())
    R = (vectors * values.clamp(min=0).sqrt()[..., None, :]).flip(-1).to(M.dtype)
    return torch.where(good, R, torch.nan)
