"""Curvature of a model: the state that is kept between batches."""

from fisherkern.curvature.ema import EMACovariance

__all__ = ["EMACovariance"]
