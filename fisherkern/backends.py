"""Which back end serves a call: an ordered list per device, the first that has no reason not to.

A back end is a module of kernels with the names of :mod:`fisherkern.ops` and one calling convention
(:mod:`fisherkern.ops._kernels`). An explicit choice, by :func:`backend` or the variable
``FISHERKERN_BACKEND``, never falls back: where it cannot serve, it raises with its reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType
from typing import Any

import torch

ORDER = {"cpu": ("cpp", "reference"), "cuda": ("cuda", "triton", "reference")}
# Products of matrices on CUDA: those of the cuda back end are cuBLAS on packed copies.
PRODUCTS = ("triton", "cuda", "reference")
NAMES = ("triton", "cuda", "cpp", "reference")

_requested: str | None = None


class BackendUnavailableError(RuntimeError):
    """The back end asked for cannot serve this call; the message says why."""


def _checked(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source} is {name!r}; allowed are {', '.join(map(repr, NAMES))}")
    return name


def requested() -> str | None:
    """The back end asked for by :func:`backend` or ``FISHERKERN_BACKEND``, or None."""
    if _requested is not None:
        return _requested
    name = os.environ.get("FISHERKERN_BACKEND", "")
    return _checked(name, "FISHERKERN_BACKEND") if name else None


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Serve every op inside the block by this back end: "triton", "cuda", "cpp" or "reference".

    Raises :class:`ValueError` for another name and, inside, :class:`BackendUnavailableError` from
    an op that it cannot serve. The choice is global to the process, not per thread.

    >>> import torch, fisherkern
    >>> with fisherkern.backend("reference"):
    ...     fisherkern.softmax_fisher_trace(torch.zeros(2, 4))
    tensor([0.7500, 0.7500])
    """
    global _requested
    previous, _requested = _requested, _checked(name, "backend")
    try:
        yield
    finally:
        _requested = previous


@cache
def extension() -> tuple[ModuleType | None, str]:
    """The compiled extension and "", or None and why there is none."""
    if importlib.util.find_spec("fisherkern._C") is None:
        return None, "the C++ extension is not built (see FISHERKERN_CUDA and `pip install` output)"
    try:
        return importlib.import_module("fisherkern._C"), ""
    except (ImportError, OSError) as error:
        return None, f"the C++ extension was built for another torch or Python: {error}"


@cache
def triton_kernels() -> tuple[ModuleType | None, str]:
    """The Triton kernels and "", or None and why there are none."""
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"
    try:
        return importlib.import_module("fisherkern.kernels"), ""
    except Exception as error:
        return None, f"triton cannot be imported: {type(error).__name__}: {error}"


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, and so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def reason_against(name: str, device: str, dtype: torch.dtype) -> str:
    """Why this back end cannot serve tensors of this device type and dtype; "" where it can."""
    if name == "reference":
        return ""
    if name == "cpp":
        if device != "cpu":
            return f"cpp serves CPU tensors, not {device}"
        return extension()[1]
    if dtype == torch.float64:
        return f"{name} has no float64 kernels"
    if name == "triton":
        if device != "cuda" and not (device == "cpu" and interpreting()):
            return f"triton serves CUDA tensors (CPU ones with TRITON_INTERPRET=1), not {device}"
        return triton_kernels()[1]
    if device != "cuda":
        return f"cuda serves CUDA tensors, not {device}"
    module, reason = extension()
    if module is not None and not module.build_info()["cuda_architectures"]:
        return "the extension was built without CUDA sources (see FISHERKERN_CUDA)"
    return reason


def select(device: str, dtype: torch.dtype, products: bool = False) -> str:
    """The name of the back end for tensors of this device type and dtype, maybe for `products`."""
    name = requested()
    if name is not None:
        reason = reason_against(name, device, dtype)
        if reason:
            raise BackendUnavailableError(f"back end {name!r} was requested but {reason}")
        return name
    order = PRODUCTS if products and device == "cuda" else ORDER.get(device, ("reference",))
    return next((name for name in order if not reason_against(name, device, dtype)), "reference")


def load(name: str) -> Any:
    """The kernels of a back end that can serve: a namespace of functions."""
    if name == "reference":
        return importlib.import_module("fisherkern.ops._reference_kernels")
    if name == "triton":
        return triton_kernels()[0]
    extension()
    native = torch.ops.fisherkern_native
    if name == "cuda":
        return importlib.import_module("fisherkern.ops._cuda_kernels").Kernels(native)
    return native


def available(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[str]:
    """The back ends that can serve tensors of this device type and dtype, best first.

    >>> import fisherkern
    >>> "reference" in fisherkern.available("cpu")
    True
    """
    order = ORDER.get(device, ("reference",))
    if device == "cpu" and interpreting():
        order = ("triton", *order)
    return [name for name in order if not reason_against(name, device, dtype)]
