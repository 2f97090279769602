"""Fused Fisher information kernels for PyTorch: from logits, hidden states and activations."""

from importlib.metadata import PackageNotFoundError, version

from fisherkern.backends import BackendUnavailableError, available, backend
from fisherkern.operators import EmpiricalFisher, HeadFisher, SoftmaxFisher
from fisherkern.ops.covariance import (
    convolution_covariance_update_,
    covariance,
    covariance_update_,
    cross_covariance,
    embedding_counts,
    mirror_,
    squared_gradient_update_,
)
from fisherkern.ops.head_fisher import (
    HeadFisherSample,
    HeadFisherStats,
    HeadFisherWeightDiagonal,
    head_fisher_gram,
    head_fisher_matvec,
    head_fisher_mean_probs,
    head_fisher_pullback,
    head_fisher_pullback_root,
    head_fisher_sample,
    head_fisher_stats,
    head_fisher_weight_diagonal,
)
from fisherkern.ops.softmax_fisher import (
    SoftmaxFisherSample,
    SoftmaxFisherStats,
    softmax_fisher_diagonal,
    softmax_fisher_expand,
    softmax_fisher_gradient,
    softmax_fisher_gradient_,
    softmax_fisher_matvec,
    softmax_fisher_mean_probs,
    softmax_fisher_panel,
    softmax_fisher_project,
    softmax_fisher_quadratic,
    softmax_fisher_sample,
    softmax_fisher_sample_,
    softmax_fisher_sqrt_matvec,
    softmax_fisher_sqrt_rmatvec,
    softmax_fisher_stats,
    softmax_fisher_trace,
)

try:
    __version__ = version("fisherkern")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "BackendUnavailableError",
    "EmpiricalFisher",
    "HeadFisher",
    "HeadFisherSample",
    "HeadFisherStats",
    "HeadFisherWeightDiagonal",
    "SoftmaxFisher",
    "SoftmaxFisherSample",
    "SoftmaxFisherStats",
    "available",
    "backend",
    "convolution_covariance_update_",
    "covariance",
    "covariance_update_",
    "cross_covariance",
    "embedding_counts",
    "head_fisher_gram",
    "head_fisher_matvec",
    "head_fisher_mean_probs",
    "head_fisher_pullback",
    "head_fisher_pullback_root",
    "head_fisher_sample",
    "head_fisher_stats",
    "head_fisher_weight_diagonal",
    "mirror_",
    "softmax_fisher_diagonal",
    "softmax_fisher_expand",
    "softmax_fisher_gradient",
    "softmax_fisher_gradient_",
    "softmax_fisher_matvec",
    "softmax_fisher_mean_probs",
    "softmax_fisher_panel",
    "softmax_fisher_project",
    "softmax_fisher_quadratic",
    "softmax_fisher_sample",
    "softmax_fisher_sample_",
    "softmax_fisher_sqrt_matvec",
    "softmax_fisher_sqrt_rmatvec",
    "softmax_fisher_stats",
    "softmax_fisher_trace",
    "squared_gradient_update_",
]
