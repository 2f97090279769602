"""Operators multiply in the dtype that they say, under the autocast of a model too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

_Method = TypeVar("_Method", bound=Callable[..., Any])


def without_autocast(method: _Method) -> _Method:
    """The method, with autocast off on the `device` of its object."""

    @functools.wraps(method)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast(self.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return cast(_Method, wrapped)
