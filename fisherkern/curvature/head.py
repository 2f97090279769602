"""WideCurvature: of a layer of so many outputs that G is no matrix, as a language model's head.

G is that of the tokens of the last step, one in `stride` of those that count in each sample. Where
the outputs of the layer are the logits, its Fisher is D̄ − U Uᵀ and kept as logits; else the
gradients themselves are kept, G = U Uᵀ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from fisherkern.curvature.ema import EMACovariance
from fisherkern.curvature.layers import Layer, samples
from fisherkern.curvature.structures import LayerCurvature
from fisherkern.operators import DiagonalPlusLowRank, Kronecker, SoftmaxFisher


class WideCurvature(LayerCurvature):
    """F ≈ G ⊗ A with A averaged as in K-FAC, and G an operator on the outputs of the last step."""

    def __init__(
        self, layer: Layer, kfac_approx: str, options: dict[str, Any], stride: int
    ) -> None:
        super().__init__(layer, kfac_approx, options)
        self.stride = stride
        layer.by_token = True
        self.A = EMACovariance(layer.d_in, bias=layer.bias, **options)
        self._dtype = options["dtype"]
        self._kept = Kept()
        self._stale = False
        self._output: int | None = None  # the node that the last call ended with, by its number

    def begin_step(self) -> None:
        """The tokens that are kept give way to those of the next part."""
        super().begin_step()
        self._stale = True

    def observe(self, output: Tensor) -> None:
        """Remember what a call returned, without keeping it alive."""
        self._output = _number(output.grad_fn)

    def add_inputs(self, x: Tensor, mask: Tensor | None) -> None:
        """A over the rows."""
        self.layer.add_inputs(self.A, x, mask)

    def add_logits(self, logits: Tensor, mask: Tensor | None) -> None:
        """Keep logits of the batch, if they are what the layer returned, or a cast of it."""
        last = logits.grad_fn
        if last is not None and type(last).__name__ == "ToCopyBackward0":
            last = last.next_functions[0][0]
        if self._output is None or _number(last) != self._output:
            return
        B, S = samples(logits.shape[:-1])
        over = None if mask is None else mask.reshape(B, S)
        chosen, _ = self._chosen(B, S, over, logits.device)
        kept = logits.detach().reshape(B, S, -1)[chosen]
        if bool((kept.isnan() | kept.isposinf()).any()):
            return  # nor are the gradients finite, and the layer will be left out
        self._begin()
        self._kept.logits.append(kept)

    def add_gradients(
        self, x: Callable[[], Tensor], g: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        """Keep gradients, where logits are not at hand."""
        if self._kept.logits and not self._stale:
            return
        rows = self.layer.gradient_rows(g)
        B, S = rows.shape[:2]
        chosen, valid = self._chosen(B, S, mask, g.device)
        kept = rows[chosen].to(self._dtype)
        self._begin()
        self._kept.gradients.append(kept * scale**0.5)
        self._kept.rows += valid

    def _chosen(
        self, samples: int, positions: int, mask: Tensor | None, device: torch.device
    ) -> tuple[Tensor, int]:
        """One in `stride` of the tokens of a sample that count [B, S], and how many count."""
        if mask is None:
            mask = torch.ones(samples, positions, dtype=torch.bool, device=device)
        number = mask.cumsum(1) - 1
        return mask & (number % self.stride == 0), int(mask.sum())

    def _begin(self) -> None:
        if self._stale:
            self._kept = Kept()
        self._stale = False

    def add_terms(self, count: Tensor | float) -> None:
        """Count the terms of what was kept."""
        if not self._stale:
            self._kept.terms += float(count)

    def outputs(self) -> SoftmaxFisher | DiagonalPlusLowRank | None:
        """G as an operator on [d_out]; None while nothing was kept."""
        return self._kept.operator()

    def operator(self) -> Kronecker:
        """G ⊗ A on matrices [d_out, D].

        Raises:
            ValueError: nothing was captured yet.
        """
        G = self.outputs()
        if G is None:
            raise ValueError(f"{self.layer.name} has no curvature yet: no batch was captured")
        return Kronecker(G, self.A.factor())

    def product(self, x: Tensor) -> Tensor:
        """G x A; zeros while nothing was kept."""
        G = self.outputs()
        return torch.zeros_like(x) if G is None else G @ (x @ self.A.factor())

    def diagonal(self) -> dict[str, Tensor]:
        """The outer product of the diagonals of G and A."""
        G, A = self.outputs(), self.A.factor()
        rows = A.new_zeros(self.layer.d_out) if G is None else G.diagonal()
        return self.layer.split(torch.outer(rows, A.diagonal()))

    def extra_state(self) -> dict[str, Any]:
        """The tokens that are kept."""
        return {"kept": copy.deepcopy(vars(self._kept)), "stale": self._stale}

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        """Rows of outputs have to be as wide as the layer."""
        for key in ("kept", "stale"):
            if key not in state:
                raise KeyError(f"state lacks {key} of layer {self.layer.name}")
        kept = Kept(**state["kept"])
        for rows in (*kept.logits, *kept.gradients):
            if rows.shape[1:] != (self.layer.d_out,):
                raise ValueError(
                    f"state has outputs of shape {list(rows.shape)} of layer {self.layer.name}; "
                    f"expected [n, {self.layer.d_out}]"
                )

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over the tokens."""
        self._kept = Kept(**copy.deepcopy(dict(state["kept"])))
        self._stale = state["stale"]

    def merge_(self, other: Self) -> None:
        """Join the tokens of both."""
        super().merge_(other)
        self._join([(self._kept, self._stale), (other._kept, other._stale)])

    @property
    def kept(self) -> Kept:
        """The tokens of the last step; never changed once the step is over."""
        return self._kept

    def join(self, parts: Sequence[Mapping[str, Any]]) -> None:
        """Keep the tokens of several extra states, in their order, instead of these."""
        device = self.A.count.device
        self._join([(Kept(**part["kept"]).to(device), part["stale"]) for part in parts])

    def _join(self, parts: Sequence[tuple[Kept, bool]]) -> None:
        """Tokens of earlier steps only where no part has any of this one."""
        self._stale = all(stale for _, stale in parts)
        self._kept = Kept()
        for kept, stale in parts:
            if stale == self._stale:
                self._kept = self._kept.joined(kept)


def _number(node: Any) -> int | None:
    """Of a node of the graph, which no other one has; a node itself would keep the graph alive."""
    return None if node is None else node._sequence_nr()


@dataclass
class Kept:
    """Tokens of a step, and what they stand for."""

    logits: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    terms: float = 0.0
    rows: int = 0
    """Of gradients, kept or not: those that are kept stand for all."""

    def operator(self) -> SoftmaxFisher | DiagonalPlusLowRank | None:
        """G on [V]; None where there are no tokens."""
        if self.logits:
            return SoftmaxFisher(torch.cat(self.logits))
        if not self.gradients or not self.terms:
            return None
        kept = torch.cat(self.gradients)
        scale = (self.rows / max(len(kept), 1) / self.terms) ** 0.5
        factor = kept.mT * scale
        return DiagonalPlusLowRank(factor.new_zeros(len(factor)), factor.contiguous())

    def joined(self, other: Kept) -> Kept:
        """The tokens of both."""
        return Kept(
            [*self.logits, *other.logits],
            [*self.gradients, *other.gradients],
            self.terms + other.terms,
            self.rows + other.rows,
        )

    def to(self, device: torch.device) -> Kept:
        """The same tokens on a device."""
        logits, gradients = ([t.to(device) for t in ts] for ts in (self.logits, self.gradients))
        return replace(self, logits=logits, gradients=gradients)
