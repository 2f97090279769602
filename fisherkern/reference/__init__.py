"""The definition of every op in plain PyTorch: short enough to trust, slow enough to avoid.

Signatures are those of :mod:`fisherkern.ops`. Everything is computed in float64 and rounded once at
the end: tests take their truth from here, and these modules are themselves tested against autograd,
dense algebra and Monte Carlo. They are also the back end of last resort.
"""

from fisherkern.reference.covariance import (
    convolution_covariance,
    covariance,
    covariance_update,
    cross_covariance,
    embedding_counts,
    squared_gradient,
)
from fisherkern.reference.softmax_fisher import (
    IGNORE_INDEX,
    SoftmaxFisherStats,
    philox_uniform,
    softmax_fisher_diagonal,
    softmax_fisher_expand,
    softmax_fisher_factor,
    softmax_fisher_gradient,
    softmax_fisher_matvec,
    softmax_fisher_matvec_backward,
    softmax_fisher_mean_probs,
    softmax_fisher_panel,
    softmax_fisher_project,
    softmax_fisher_quadratic,
    softmax_fisher_sample,
    softmax_fisher_sqrt_matvec,
    softmax_fisher_sqrt_rmatvec,
    softmax_fisher_stats,
    softmax_fisher_stats_backward,
    softmax_fisher_trace,
)
from fisherkern.reference.tokens import accumulation_dtype, normalised, token_weights

__all__ = [
    "IGNORE_INDEX",
    "SoftmaxFisherStats",
    "accumulation_dtype",
    "convolution_covariance",
    "covariance",
    "covariance_update",
    "cross_covariance",
    "embedding_counts",
    "normalised",
    "philox_uniform",
    "softmax_fisher_diagonal",
    "softmax_fisher_expand",
    "softmax_fisher_factor",
    "softmax_fisher_gradient",
    "softmax_fisher_matvec",
    "softmax_fisher_matvec_backward",
    "softmax_fisher_mean_probs",
    "softmax_fisher_panel",
    "softmax_fisher_project",
    "softmax_fisher_quadratic",
    "softmax_fisher_sample",
    "softmax_fisher_sqrt_matvec",
    "softmax_fisher_sqrt_rmatvec",
    "softmax_fisher_stats",
    "softmax_fisher_stats_backward",
    "softmax_fisher_trace",
    "squared_gradient",
    "token_weights",
]
