"""Linear operators: the Fisher of a vocabulary, applied and inverted without being formed."""

from fisherkern.operators.compression import Compressed, compress
from fisherkern.operators.empirical import EmpiricalFisher
from fisherkern.operators.head import HeadFisher
from fisherkern.operators.kronecker import Kronecker
from fisherkern.operators.low_rank import DiagonalMinusLowRank, DiagonalPlusLowRank
from fisherkern.operators.softmax import SoftmaxFisher

__all__ = [
    "Compressed",
    "DiagonalMinusLowRank",
    "DiagonalPlusLowRank",
    "EmpiricalFisher",
    "HeadFisher",
    "Kronecker",
    "SoftmaxFisher",
    "compress",
]
