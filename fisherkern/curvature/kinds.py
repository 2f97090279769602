"""Which form of curvature a layer gets, by the structure that was asked for and its size."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from fisherkern.curvature.head import WideCurvature
from fisherkern.curvature.layers import EmbeddingLayer, Layer, NormLayer
from fisherkern.curvature.low_rank import LowRankCurvature
from fisherkern.curvature.structures import (
    BlockCurvature,
    DiagonalCurvature,
    EigenCurvature,
    KroneckerCurvature,
    LayerCurvature,
    block_size,
)

STRUCTURES = ("kfac", "ekfac", "diagonal", "block", "low-rank")
# Parameters of a norm beyond which its diagonal is kept instead of its block.
_NORM_BLOCK = 2048
# Parameters of a layer beyond which a block of [P, P] is refused.
_LARGEST_BLOCK = 8192
# The same for a sketch of [P, 2 rank], and the gradient of every sample.
_LARGEST_SKETCH = 1 << 24


class Kinds(NamedTuple):
    """Checked options of :class:`fisherkern.curvature.Capture`."""

    structure: str
    kfac_approx: str
    ema_decay: float | None
    rank: int
    widest: int
    stride: int

    def curvature(self, layer: Layer) -> LayerCurvature | str:
        """An empty curvature for a layer, or why there is none."""
        weight = layer.parameters[next(iter(layer.parameters))]
        options: dict[str, Any] = {
            "ema_decay": self.ema_decay,
            "dtype": torch.float64 if weight.dtype == torch.float64 else torch.float32,
            "device": weight.device,
        }
        size = block_size(layer)
        if self.structure == "low-rank":
            if size > _LARGEST_SKETCH:
                return f"{size} parameters, more than the {_LARGEST_SKETCH} of a sketch"
            return LowRankCurvature(layer, self.kfac_approx, options, self.rank)
        if self.structure == "block" and size > _LARGEST_BLOCK:
            return f"{size} parameters, more than a block of {_LARGEST_BLOCK}"
        kronecker = self.structure in ("kfac", "ekfac") and not isinstance(layer, NormLayer)
        if kronecker and layer.d_out > self.widest:
            return WideCurvature(layer, self.kfac_approx, options, self.stride)
        return self._kind(layer, size)(layer, self.kfac_approx, options)

    def _kind(self, layer: Layer, size: int) -> type[LayerCurvature]:
        if self.structure == "diagonal":
            return DiagonalCurvature
        if self.structure == "block":
            return BlockCurvature
        if isinstance(layer, NormLayer):
            return BlockCurvature if size <= _NORM_BLOCK else DiagonalCurvature
        if self.structure == "ekfac" and not isinstance(layer, EmbeddingLayer):
            return EigenCurvature
        return KroneckerCurvature
