"""Fisher operations from hidden states and the weight of a head; the logits are never stored."""

from fisherkern.ops.head_fisher.classes import (
    head_fisher_gram,
    head_fisher_mean_probs,
    head_fisher_weight_diagonal,
)
from fisherkern.ops.head_fisher.hidden import head_fisher_matvec
from fisherkern.ops.head_fisher.pullback import head_fisher_pullback, head_fisher_pullback_root
from fisherkern.ops.head_fisher.sample import head_fisher_sample
from fisherkern.ops.head_fisher.stats import HeadFisherStats, head_fisher_stats
from fisherkern.reference import HeadFisherSample, HeadFisherWeightDiagonal

__all__ = [
    "HeadFisherSample",
    "HeadFisherStats",
    "HeadFisherWeightDiagonal",
    "head_fisher_gram",
    "head_fisher_matvec",
    "head_fisher_mean_probs",
    "head_fisher_pullback",
    "head_fisher_pullback_root",
    "head_fisher_sample",
    "head_fisher_stats",
    "head_fisher_weight_diagonal",
]
