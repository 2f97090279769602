"""The softmax Fisher F = (diag p − p pᵀ) / τ² straight from logits, p = softmax(z / τ)."""

from fisherkern.ops.softmax_fisher.diagonals import (
    softmax_fisher_diagonal,
    softmax_fisher_mean_probs,
)
from fisherkern.ops.softmax_fisher.factor import (
    softmax_fisher_expand,
    softmax_fisher_project,
)
from fisherkern.ops.softmax_fisher.gradients import (
    SoftmaxFisherSample,
    softmax_fisher_gradient,
    softmax_fisher_gradient_,
    softmax_fisher_sample,
    softmax_fisher_sample_,
)
from fisherkern.ops.softmax_fisher.panel import softmax_fisher_panel
from fisherkern.ops.softmax_fisher.products import (
    softmax_fisher_matvec,
    softmax_fisher_sqrt_matvec,
    softmax_fisher_sqrt_rmatvec,
)
from fisherkern.ops.softmax_fisher.quadratic import softmax_fisher_quadratic
from fisherkern.ops.softmax_fisher.stats import softmax_fisher_stats, softmax_fisher_trace
from fisherkern.reference import SoftmaxFisherStats

__all__ = [
    "SoftmaxFisherSample",
    "SoftmaxFisherStats",
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
]
