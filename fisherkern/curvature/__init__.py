"""Curvature of a model: what is captured of its layers, and the state kept between batches."""

from fisherkern.curvature.capture import Capture, capture
from fisherkern.curvature.ema import EMACovariance
from fisherkern.curvature.estimate import estimate_fisher
from fisherkern.curvature.head import WideCurvature
from fisherkern.curvature.low_rank import LowRankCurvature
from fisherkern.curvature.optimizer_state import (
    diagonal_from_adam,
    kronecker_from_adafactor,
    kronecker_from_shampoo,
)
from fisherkern.curvature.structures import (
    BlockCurvature,
    DiagonalCurvature,
    EigenCurvature,
    KroneckerCurvature,
    LayerCurvature,
)

__all__ = [
    "BlockCurvature",
    "Capture",
    "DiagonalCurvature",
    "EMACovariance",
    "EigenCurvature",
    "KroneckerCurvature",
    "LayerCurvature",
    "LowRankCurvature",
    "WideCurvature",
    "capture",
    "diagonal_from_adam",
    "estimate_fisher",
    "kronecker_from_adafactor",
    "kronecker_from_shampoo",
]
