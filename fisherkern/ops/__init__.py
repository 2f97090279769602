"""The functional API: one sub-package per family of ops."""

from fisherkern.ops.covariance import *  # noqa: F403
from fisherkern.ops.covariance import __all__ as _covariance
from fisherkern.ops.head_fisher import *  # noqa: F403
from fisherkern.ops.head_fisher import __all__ as _head_fisher
from fisherkern.ops.softmax_fisher import *  # noqa: F403
from fisherkern.ops.softmax_fisher import __all__ as _softmax_fisher

__all__ = [*_covariance, *_head_fisher, *_softmax_fisher]
