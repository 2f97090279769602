"""The functional API: one sub-package per family of ops."""

from fisherkern.ops.softmax_fisher import *  # noqa: F403
from fisherkern.ops.softmax_fisher import __all__ as _softmax_fisher

__all__ = [*_softmax_fisher]
