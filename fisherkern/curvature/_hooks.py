"""Hooks on a module that do not outlive their owner, and that copies of the module do without."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class Hook:
    """A method of an owner, as a module calls it.

    The module keeps neither the owner alive nor what that holds. A copy of the module, as for an
    average of its weights, takes hooks along, and so does a file that it is saved to: these do
    nothing. A compiled model breaks its graph at one.

    Args:
        module: whose calls these are; those of others, such as its replicas, are ignored.
        method: of the owner, called with the module and what a module tells its hooks.
    """

    def __init__(
        self, module: nn.Module | None = None, method: Callable[..., Any] | None = None
    ) -> None:
        self._call: Callable[..., Any] | None = None
        if module is None or method is None:
            return
        mine, held = weakref.ref(module), weakref.WeakMethod(method)

        def call(called: nn.Module, *rest: Any) -> Any:
            found = held()
            return None if found is None or called is not mine() else found(called, *rest)

        self._call = call
        _spare_compiler()

    def __call__(self, *call: Any) -> Any:
        """What the method gives."""
        return None if self._call is None else self._call(*call)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        """A hook that does nothing."""
        return Hook, ()


@functools.cache
def _spare_compiler() -> None:
    """Let no compiler trace hooks; its import waits until there is one."""
    setattr(Hook, "__call__", torch.compiler.disable(Hook.__call__))  # noqa: B010


def removed_with(owner: object, handles: list[RemovableHandle]) -> Callable[[], object]:
    """What takes hooks off, when it is called or when their owner is gone."""
    finalizer = weakref.finalize(owner, _remove, handles)
    finalizer.atexit = False
    return finalizer


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
