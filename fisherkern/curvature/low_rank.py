"""LowRankCurvature: of a layer whose Fisher is kept as a diagonal and its leading directions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from fisherkern.curvature._average import MovingAverage
from fisherkern.curvature.layers import DiagonalAverage, Layer
from fisherkern.curvature.structures import (
    LayerCurvature,
    add_term,
    bias_columns,
    sample_gradients,
)
from fisherkern.operators import DiagonalPlusLowRank
from fisherkern.operators._sketch import Sketch


class SketchedAverage(DiagonalAverage):
    """The average of squares of gradients, and a sketch of the sum of their outer products.

    Args:
        shape: of the squares, as those of every average.
        rank: of the sketch.
        options: of every average.
    """

    def __init__(self, shape: tuple[int, ...], rank: int, **options: Any) -> None:
        super().__init__(shape, **options)
        self.sketch = Sketch(rank, self._sum.view(-1))

    def __repr__(self) -> str:
        """Configuration, without values."""
        return f"{super().__repr__()} and a sketch of rank {self.sketch.rank}"

    def add_gradients(self, gradients: Tensor, scale: float) -> None:
        """Add gradients [n, P], the square roots of `scale` times them as columns."""
        add_term(self, gradients.square().sum(0).view_as(self._sum), scale)
        share = 1.0 if self.ema_decay is None else 1.0 - self.ema_decay
        self.sketch.append(gradients.mT * (share * scale) ** 0.5)

    def factor(self) -> Tensor:
        """B [P, rank] of the mean."""
        self.settle()
        n = torch.where(self._count == 0, 1.0, self._count)
        # cut down to its rank as a copy: to be read must not cost the sketch columns
        sketch = copy.copy(self.sketch)
        sketch.basis = sketch.basis.clone()
        return sketch.factor() / n.sqrt().to(self._sum.dtype)

    def merge_(self, other: Self) -> None:
        """The sketches too."""
        super().merge_(other)
        self.sketch.append(other.columns)

    def all_reduced(self, group: Any = None) -> Self:
        """The sketches too."""
        merged = super().all_reduced(group)
        parts: list[Any] = [None] * torch.distributed.get_world_size(group)
        self.settle()
        torch.distributed.all_gather_object(parts, self.columns, group=group)
        merged.join(parts)
        return merged

    @property
    def columns(self) -> Tensor:
        """Those of the sketch of the sum, as they are."""
        return self.sketch.basis[:, : self.sketch.used]

    def join(self, parts: Sequence[Tensor]) -> None:
        """Sketch the columns of several sketches, in their order, instead of these."""
        self.sketch = Sketch(self.sketch.rank, self._sum.view(-1))
        for columns in parts:
            self.sketch.append(columns.to(self._sum.device))

    def state_dict(self) -> dict[str, Any]:
        """The columns too."""
        return {**super().state_dict(), "columns": self.columns.clone()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """The columns have to fit into the sketch."""
        super().check_state(state)
        if "columns" not in state:
            raise KeyError("state lacks columns")
        n, room = self.sketch.basis.shape
        columns = state["columns"]
        if columns.ndim != 2 or columns.shape[0] != n or columns.shape[1] > room:
            raise ValueError(
                f"state has columns of shape {list(columns.shape)}; expected [{n}, up to {room}]"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The columns too."""
        super().load_state_dict(state)
        columns = state["columns"]
        self.sketch.used = columns.shape[1]
        self.sketch.basis.zero_()
        self.sketch.basis[:, : columns.shape[1]] = columns

    def _decayed(self, decay: float) -> None:
        super()._decayed(decay)
        self.sketch.basis.mul_(decay**0.5)

    def _like(self) -> SketchedAverage:
        return SketchedAverage(
            tuple(self._sum.shape),
            self.sketch.rank,
            ema_decay=self.ema_decay,
            dtype=self._sum.dtype,
            device=self._sum.device,
        )


class LowRankCurvature(LayerCurvature):
    """F ≈ D + B Bᵀ, with B [P, rank] a sketch of the gradients of samples and D what it leaves out.

    The diagonal is exact, whatever the rank. With no more samples than `rank` all of F is; with
    more, B Bᵀ never exceeds it, and falls short by what the sketch had to leave out.

    Source: Ghashami, Liberty, Phillips and Woodruff 2016, "Frequent Directions"; Mishkin et al.
    2018, "SLANG", for a Fisher of a diagonal and a low rank.
    """

    def __init__(self, layer: Layer, kfac_approx: str, options: dict[str, Any], rank: int) -> None:
        super().__init__(layer, kfac_approx, options)
        shape = (layer.d_out, layer.d_in + bias_columns(layer))
        self.squares = SketchedAverage(shape, rank, **options)

    @property
    def _per_term(self) -> list[MovingAverage]:
        return [self.squares]

    def add_gradients(
        self, x: Callable[[], Tensor], g: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        """The gradients of samples as columns, and their squares."""
        gradients = sample_gradients(self.layer, x(), g, mask)
        self.squares.add_gradients(gradients.to(self.dtype), scale)

    def parts(self) -> tuple[Tensor, Tensor]:
        """D [P] and B [P, rank], parameters in the order of the matrix of the layer."""
        B = self.squares.factor()
        rest = self.squares.mean().view(-1) - B.square().sum(1)
        return rest.clamp(min=0), B

    def operator(self) -> DiagonalPlusLowRank:
        """D + B Bᵀ on vectors [P]."""
        return DiagonalPlusLowRank(*self.parts())

    def product(self, x: Tensor) -> Tensor:
        """F x, row by row."""
        return (self.operator() @ x.reshape(-1)).reshape(x.shape)

    def diagonal(self) -> dict[str, Tensor]:
        """In the shapes of the parameters; exact."""
        return self.layer.split(self.squares.mean())
