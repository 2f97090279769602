"""The Triton back end: the functions of fisherkern/ops/_reference_kernels.py for CUDA tensors.

Importing this needs triton but no GPU, and leaves CUDA alone.
"""

from fisherkern.kernels.covariance import covariance_update
from fisherkern.kernels.cross_covariance import cross_update
from fisherkern.kernels.mirror import mirror
from fisherkern.kernels.softmax_fisher_diagonals import (
    softmax_fisher_diagonal,
    softmax_fisher_diagonal_sum,
    softmax_fisher_mean_probs,
)
from fisherkern.kernels.softmax_fisher_factor import (
    softmax_fisher_expand,
    softmax_fisher_powers,
    softmax_fisher_project,
)
from fisherkern.kernels.softmax_fisher_gradients import (
    softmax_fisher_gradient,
    softmax_fisher_sample,
)
from fisherkern.kernels.softmax_fisher_panel import softmax_fisher_panel
from fisherkern.kernels.softmax_fisher_products import (
    softmax_fisher_matvec,
    softmax_fisher_matvec_backward,
    softmax_fisher_sqrt_matvec,
    softmax_fisher_sqrt_rmatvec,
)
from fisherkern.kernels.softmax_fisher_quadratic import softmax_fisher_quadratic
from fisherkern.kernels.softmax_fisher_stats import softmax_fisher_stats, softmax_fisher_trace
from fisherkern.kernels.softmax_fisher_stats_backward import softmax_fisher_stats_backward
from fisherkern.ops._head_products import head_logits, head_pull, head_squares

__all__ = [
    "covariance_update",
    "cross_update",
    "head_logits",
    "head_pull",
    "head_squares",
    "mirror",
    "softmax_fisher_diagonal",
    "softmax_fisher_diagonal_sum",
    "softmax_fisher_expand",
    "softmax_fisher_gradient",
    "softmax_fisher_matvec",
    "softmax_fisher_matvec_backward",
    "softmax_fisher_mean_probs",
    "softmax_fisher_panel",
    "softmax_fisher_powers",
    "softmax_fisher_project",
    "softmax_fisher_quadratic",
    "softmax_fisher_sample",
    "softmax_fisher_sqrt_matvec",
    "softmax_fisher_sqrt_rmatvec",
    "softmax_fisher_stats",
    "softmax_fisher_stats_backward",
    "softmax_fisher_trace",
]
