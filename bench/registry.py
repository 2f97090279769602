"""What can be measured: families of ops, the cases made of them, and who provides each.

A family is one module (``softmax_fisher.py``) that calls :func:`register`. An :class:`Op` carries
all that the runner needs to know: how to make inputs, the fused call, the plain PyTorch twin, the
error against float64, and the floor (bytes that must move, or FLOPs that must be done).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
Shape = tuple[int, ...]
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


@dataclass(frozen=True)
class Op:
    """One operation of a family; callables take the inputs as positional tensors."""

    name: str
    inputs: Callable[[Case, torch.Generator], Tensors]
    plain: Callable[..., Any]
    """The naive PyTorch formula, as its user would write it: providers "eager" and "compile"."""
    error: Callable[[Tensors, Tensors], float]
    """Error of outputs against float64; raises ValueError for outputs that are no answer at all."""
    floor_bytes: Callable[[Case], int]
    """Every input read once, every output written once."""
    flops: Callable[[Case], float]
    """Arithmetic of the op, an exponential counted as one."""
    fused: Callable[..., Any] | None = None
    """The call into this package; takes ``out=`` where `out` is not None."""
    out: Callable[[Tensors], Tensor] | None = None
    peers: Mapping[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    """Named peers on CUDA: a loader that raises ImportError where the package is missing."""
    plain_synchronizes: bool = False
    """Whether the naive formula waits for the GPU, and so cannot be captured in a CUDA graph."""
    ceiling: str = "copy"
    """What bounds it: "copy" (bandwidth) or "gemm" (matrix rate)."""
    target: float | None = None
    """Fraction of the ceiling that the best back end must reach on CUDA."""


@dataclass(frozen=True)
class Family:
    """Ops that share shapes; the shapes and dtypes that a run without arguments measures."""

    name: str
    dimensions: tuple[str, ...]
    ops: tuple[Op, ...]
    headline: tuple[str, ...]
    """Names of the ops measured, and judged, by default."""
    shapes: Mapping[str, tuple[Shape, ...]]
    """Device type → shapes."""
    smoke: Shape
    sweeps: tuple[Shape, ...] = ()
    """Shapes of the memory plot."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")

    def op(self, name: str) -> Op:
        """The op of this name; ValueError lists the names."""
        for op in self.ops:
            if op.name == name:
                return op
        raise ValueError(f"no op {name!r} in {self.name}; allowed are {[o.name for o in self.ops]}")


@dataclass(frozen=True)
class Case:
    """An op at one shape, dtype and device."""

    family: Family
    op: Op
    shape: Shape
    dtype: torch.dtype
    device: str = "cpu"

    @property
    def label(self) -> str:
        """Shape as text, ``T256_V50257``."""
        return "_".join(f"{d}{n}" for d, n in zip(self.family.dimensions, self.shape, strict=True))

    @property
    def dtype_name(self) -> str:
        """``float32``."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def key(self) -> str:
        """Op, shape and dtype as text."""
        return f"{self.op.name} {self.label} {self.dtype_name}"

    def make_inputs(self, seed: int = 0) -> Tensors:
        """Fresh random inputs on the device of the case."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        return self.op.inputs(self, generator)


@dataclass(frozen=True)
class Provider:
    """Somebody who computes an op: ``prepare(case, inputs, out)`` gives the call to be timed."""

    name: str
    kind: str
    """ "ours", "reference" (the back end of last resort), "eager", "compile" or "peer"."""
    prepare: Callable[[Case, Tensors, Tensor | None], Callable[..., Any]]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    uses_out: bool = False
    temporaries: float = 0.0
    """Temporaries of a call, as a multiple of the floor in float32; a generous guess."""
    default: bool = True
    """Whether it is run without being asked for."""

    def refusal(self, case: Case) -> str:
        """Why it cannot take this case; "" where it can."""
        if self.uses_out and case.op.out is None:
            return f"{case.op.name} has no out="
        if self.kind in ("ours", "reference") and case.op.fused is None:
            return f"{case.op.name} is a yardstick, not an op of this package"
        if self.kind == "peer" and self.name not in case.op.peers:
            return f"{self.name} has no {case.op.name}"
        return ""


_families: dict[str, Family] = {}
MODULES = ("softmax_fisher",)


def register(family: Family) -> Family:
    """Add a family; the name must be new."""
    if family.name in _families:
        raise ValueError(f"family {family.name!r} is registered already")
    _families[family.name] = family
    return family


def families() -> dict[str, Family]:
    """Every family by name."""
    for module in MODULES:
        importlib.import_module(f"fisherkern.bench.{module}")
    return dict(_families)


def cases(
    family: Family,
    device: str = "cpu",
    *,
    ops: tuple[str, ...] | None = None,
    dtypes: tuple[str, ...] | None = None,
    shapes: tuple[Shape, ...] | None = None,
) -> list[Case]:
    """The cases of a family; what is not given is what a run without arguments measures."""
    ops = family.headline if ops is None else ops
    return [
        Case(family, family.op(name), shape, DTYPES[dtype], device)
        for name in ops
        for shape in (family.shapes[device] if shapes is None else shapes)
        for dtype in (family.dtypes if dtypes is None else dtypes)
    ]


def as_tuple(result: Any) -> Tensors:
    """Outputs of a call as a tuple of tensors."""
    return (result,) if isinstance(result, Tensor) else tuple(result)
