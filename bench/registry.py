"""What can be measured: families of ops, the cases made of them, and who provides each.

A family is one module (``softmax_fisher.py``) that calls :func:`register`. An :class:`Op` carries
all that the runner needs to know: how to make inputs, the fused call, the plain PyTorch twin, the
error against float64, and the floor (bytes that must move, or FLOPs that must be done). Bars are
data of the family too; :mod:`fisherkern.bench.verdict` judges them.
"""

from __future__ import annotations

import importlib
import math
import re
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
    """The naive PyTorch formula, as its user would write it: the yardstick of speed and errors."""
    error: Callable[[Tensors, Tensors], float]
    """Error of outputs against float64; raises ValueError for outputs that are no answer at all."""
    floor_bytes: Callable[[Case], int]
    """Every input read once, every output written once."""
    flops: Callable[[Case], float]
    """Arithmetic of the op, an exponential counted as one."""
    fused: Callable[..., Any] | None = None
    """The call into this package; takes ``out=`` where `out` is not None."""
    out: Callable[[Tensors], Tensor] | None = None
    in_place: bool = False
    """The result replaces the first input; who returns a new tensor for it is charged its bytes."""
    plain_name: str = "eager"
    """Whose formula `plain` is."""
    formulas: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """What others than `plain_name` write in PyTorch, on any device."""
    peers: Mapping[str, Callable[[], Callable[..., Any]]] = field(default_factory=dict)
    """Named peers on CUDA: a loader that raises ImportError where the package is missing."""
    yardsticks: Mapping[str, Callable[[Case], Callable[[], Any]]] = field(default_factory=dict)
    """Work that is timed beside the op and has no result that could be checked."""
    plain_synchronizes: bool = False
    """Whether naive formulas wait for the GPU, and so cannot be captured in a CUDA graph."""
    synchronizes: bool = False
    """The same of the fused call."""
    widens: bool = False
    """Whether results of half-precision inputs are float32: errors are then judged in float32."""
    ceiling: str = "copy"
    """What bounds it: "copy" (bandwidth) or "gemm" (matrix rate)."""
    target: float | None = None
    """Fraction of the ceiling that the best back end must reach on CUDA."""
    shapes: Mapping[str, tuple[Shape, ...]] | None = None
    """Device type → shapes, where those of the family do not suit."""

    def formula(self, name: str) -> Callable[..., Any] | None:
        """What this name writes in PyTorch; None if it does not."""
        return self.plain if name == self.plain_name else self.formulas.get(name)


@dataclass(frozen=True)
class Bar:
    """How many times faster than a peer the fused back end must be."""

    peer: str
    summary: str
    """Of the cases: "least" or "geometric mean"."""
    value: float
    ops: tuple[str, ...] = ()
    """Empty: all that were measured."""
    dtypes: tuple[str, ...] = ()
    """Empty: all that were measured."""
    device: str = "cpu"
    from_size: tuple[str, int] | None = None
    """A dimension and its least size that counts."""
    uses_out: bool | None = None
    """Whether it is for calls with an `out`, or for those without; None: for both."""

    @property
    def name(self) -> str:
        """``least over cases, vs eager``."""
        summary = "least over cases" if self.summary == "least" else self.summary
        sizes = [f"{self.from_size[0]} ≥ {self.from_size[1]}"] if self.from_size else []
        return ", ".join([summary, f"vs {self.peer}", *self.dtypes, *sizes])

    def binds(self, subject: str) -> bool:
        """Whether it is a bar for this provider."""
        return self.uses_out in (None, subject.endswith("out="))

    def covers(self, op: str, dtype: str, case: str) -> bool:
        """Whether a case (its label) counts."""
        if self.from_size is not None:
            dimension, least = self.from_size
            sizes = dict(re.findall(r"([A-Za-z]+)(\d+)", case))
            if int(sizes[dimension]) < least:
                return False
        return op in (self.ops or (op,)) and dtype in (self.dtypes or (dtype,))


@dataclass(frozen=True)
class Allowance:
    """Extra memory that the fused back end may take, on the CPU."""

    name: str
    nbytes: Callable[[Shape, int], int]
    """Shape and number of threads → bytes."""


@dataclass(frozen=True)
class Share:
    """How much of a peer's figure the fused back end may have in each case, on the CPU."""

    figure: str
    """A column of results: "extra_bytes" or "max_error"."""
    peer: str
    value: float

    @property
    def name(self) -> str:
        """``largest extra memory over that of eager``."""
        what = {"extra_bytes": "extra memory", "max_error": "error"}[self.figure]
        return f"largest {what} over that of {self.peer}"


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
    bars: tuple[Bar, ...]
    memory: Allowance
    warm_up: Callable[[Shape], Shape]
    """Shape of the call before memory is measured: starts every thread, leaves hardly a scratch."""
    shares: tuple[Share, ...] = ()
    sweeps: tuple[Shape, ...] = ()
    """Shapes of the memory plot."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    written_for: tuple[str, ...] = ("float32", "bfloat16", "float16")
    """Dtypes that its inputs, formulas and truths can have."""
    reference: bool = True
    """Whether the back end "reference" is run without being asked for."""
    automatic: bool = False
    """Whether the shape has a say in the back end on CUDA: the choice is then a provider too."""
    budget: float = math.inf
    """Seconds of timing per case after which no round begins; three rounds there are always."""
    patience: float = math.inf
    """Seconds of a call beyond which a provider that no bar needs is not run unless asked for."""

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
    def accuracy_dtype(self) -> torch.dtype:
        """The dtype whose roundings a result may have."""
        return torch.promote_types(self.dtype, torch.float32) if self.op.widens else self.dtype

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
    """ "ours", "reference" (the back end of last resort), "eager", "compile", "peer", "yardstick"

    A yardstick has no result: it is timed, but neither checked nor charged for memory.
    """
    prepare: Callable[[Case, Tensors, Tensor | None], Callable[..., Any]]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    uses_out: bool = False
    temporaries: float = 0.0
    """Temporaries of a call, as a multiple of the floor in float32; a generous guess."""
    default: bool = True
    """Whether it is run without being asked for."""
    formula: str = ""
    """The name of the PyTorch formula that it runs, if it does; see :meth:`Op.formula`."""

    def refusal(self, case: Case) -> str:
        """Why it cannot take this case; "" where it can."""
        if self.uses_out and case.op.out is None:
            return f"{case.op.name} has no out="
        if self.kind in ("ours", "reference") and case.op.fused is None:
            return f"{case.op.name} is a yardstick, not an op of this package"
        if self.formula and case.op.formula(self.formula) is None:
            return f"{self.formula} has no {case.op.name}"
        if self.kind == "peer" and not self.formula and self.name not in case.op.peers:
            return f"{self.name} has no {case.op.name}"
        if self.kind == "yardstick" and self.name not in case.op.yardsticks:
            return f"{self.name} is no yardstick of {case.op.name}"
        return ""


_families: dict[str, Family] = {}
MODULES = ("softmax_fisher", "covariance", "softmax_operator", "head_fisher", "language_heads")


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
        Case(family, op, shape, DTYPES[dtype], device)
        for op in map(family.op, ops)
        for shape in ((op.shapes or family.shapes)[device] if shapes is None else shapes)
        for dtype in (family.dtypes if dtypes is None else dtypes)
    ]


def as_tuple(result: Any) -> Tensors:
    """Outputs of a call as a tuple of tensors."""
    return (result,) if isinstance(result, Tensor) else tuple(result)
