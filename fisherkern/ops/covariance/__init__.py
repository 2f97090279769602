"""Covariance factors of activations and gradients: masked, symmetric, moving averages.

Notation: T tokens (all leading dimensions flattened), x_t [d] a row, x̃ = [x; 1] with a bias,
w token weights, N = Σ w. Definitions: :mod:`fisherkern.reference.covariance`.
"""

from fisherkern.ops.covariance.cross import cross_covariance, squared_gradient_update_
from fisherkern.ops.covariance.structured import convolution_covariance_update_, embedding_counts
from fisherkern.ops.covariance.symmetric import covariance, covariance_update_, mirror_

__all__ = [
    "convolution_covariance_update_",
    "covariance",
    "covariance_update_",
    "cross_covariance",
    "embedding_counts",
    "mirror_",
    "squared_gradient_update_",
]
