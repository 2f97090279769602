"""K-FAC for training: a preconditioner for any optimizer, and an optimizer of its own."""

from fisherkern.optim.kfac import KFAC
from fisherkern.optim.preconditioner import KFACPreconditioner

__all__ = ["KFAC", "KFACPreconditioner"]
