"""Repairs and guards for Triton's interpreter: import before any kernel, TRITON_INTERPRET=1 set.

The interpreter keeps bfloat16 as raw 16-bit integers. As shipped (3.6 to 3.9) it computes on those
bits, truncates on conversion, ignores tf32, refuses bf16x6, rounds a fused multiply-add twice, and
reads or writes any address it is given. Here:

- bfloat16 arithmetic runs in float32 and rounds to nearest even, as the hardware does;
- a fused multiply-add rounds once, tf32 products round their operands, bf16x6 products are six;
- float arguments are float32;
- a load or store outside the tensors passed to the launch raises :class:`OutOfBoundsError`;
- two programs that store to one address without an atomic raise :class:`RaceError`;
- `triton.language` is patched once per launch and not once per call of a device function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle
_FLOATS = (tl.float16, tl.bfloat16, tl.float32, tl.float64)


class OutOfBoundsError(Exception):
    """A kernel touched memory outside its arguments."""


class RaceError(Exception):
    """Two programs of a launch wrote to one address."""


# ---- bfloat16 and tf32 ------------------------------------------------------------------------


def widened(bits: np.ndarray) -> np.ndarray:
    """Raw bfloat16 bits as float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """Raw bfloat16 bits of float32 values, rounded to nearest even; NaN stays NaN."""
    values = np.asarray(values, np.float32)
    bits = values.view(np.uint32)
    even = bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)
    return np.where(np.isnan(values), np.uint16(0x7FC0), (even >> 16).astype(np.uint16))


def rounded_to_tf32(values: np.ndarray) -> np.ndarray:
    """float32 values with 10 bits of mantissa, halves away from zero as `cvt.rna.tf32` rounds."""
    values = np.ascontiguousarray(values, np.float32)
    bits = (values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), bits.view(np.float32), values)


def bfloat16_terms(values: np.ndarray) -> list[np.ndarray]:
    """Three bfloat16 values, widened, whose sum float32 values are; infinity is ∞ + NaN + NaN."""
    rest = np.asarray(values, np.float32)
    terms = []
    with np.errstate(invalid="ignore"):
        for _ in range(3):
            terms.append(widened(rounded(rest)))
            rest = rest - terms[-1]
    return terms


def bf16x6_product(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The products of terms that Triton adds up, in its order: small ones first, NaN left out."""
    left, right = bfloat16_terms(x), bfloat16_terms(y)
    with np.errstate(invalid="ignore"):
        small = sum(left[i] @ right[j] for i, j in ((1, 1), (2, 0), (0, 2), (1, 0), (0, 1)))
        return np.where(np.isnan(small), np.float32(0), small) + left[0] @ right[0]


def _is_bfloat16(*handles: Any) -> bool:
    return any(handle.dtype.scalar == tl.bfloat16 for handle in handles)


def _values(handle: Any) -> np.ndarray:
    return widened(handle.data) if _is_bfloat16(handle) else handle.data


def _bfloat16(values: np.ndarray) -> Any:
    return _Handle(rounded(values), tl.bfloat16)


def _elementwise(original: Callable) -> Callable:
    """`original(self, *handles, numpy function)`, through float32 if an operand is bfloat16."""

    def run(self: Any, *arguments: Any) -> Any:
        *handles, function = arguments
        if function is np.where or not _is_bfloat16(*handles):
            return original(self, *arguments)
        result = function(*map(_values, handles))
        if result.dtype == np.bool_:
            return _Handle(result, tl.int1)
        return _bfloat16(result)

    return run


def _cast(original: Callable) -> Callable:
    def run(self: Any, source: Any, target: Any) -> Any:
        before, after = source.dtype.scalar, target.scalar
        if before == after or tl.bfloat16 not in (before, after):
            return original(self, source, target)
        if after == tl.bfloat16:
            return _bfloat16(source.data.astype(np.float32))
        return _Handle(_values(source).astype(interpreter._get_np_dtype(target)), after)

    return run


def _float_to_float(original: Callable) -> Callable:
    def run(self: Any, source: Any, target: Any, rounding: Any) -> Any:
        kinds = (source.dtype.scalar, target.scalar)
        towards_zero = rounding == interpreter._ir.ROUNDING_MODE.RTZ
        if tl.bfloat16 in kinds and all(kind in _FLOATS for kind in kinds) and not towards_zero:
            return self.cast_impl(source, target)
        return original(self, source, target, rounding)

    return run


def _fma(original: Callable) -> Callable:
    def run(self: Any, x: Any, y: Any, z: Any) -> Any:
        if x.dtype.scalar not in (tl.bfloat16, tl.float32):
            return original(self, x, y, z)
        # the product is exact in float64, and its sum there nearly so
        result = _values(x).astype(np.float64) * _values(y) + _values(z)
        if _is_bfloat16(x):
            return _bfloat16(result)
        return _Handle(result.astype(np.float32), tl.float32)

    return run


def _dot(original: Callable) -> Callable:
    def run(self: Any, a: Any, b: Any, c: Any, precision: Any, imprecise: Any) -> Any:
        x, y = _values(a), _values(b)
        start = _values(c)
        kinds = interpreter._ir.INPUT_PRECISION
        if a.dtype.scalar == tl.float32 and precision == kinds.BF16x6:
            return _Handle((bf16x6_product(x, y) + start).astype(start.dtype), c.dtype.scalar)
        if a.dtype.scalar == tl.float32 and precision == kinds.TF32:
            x, y = rounded_to_tf32(x), rounded_to_tf32(y)
        elif not _is_bfloat16(a, b):
            return original(self, a, b, c, precision, imprecise)
        result = np.matmul(x, y, dtype=np.float32) + start
        if _is_bfloat16(c):
            return _bfloat16(result)
        return _Handle(result.astype(start.dtype), c.dtype.scalar)

    return run


def _argument(original: Callable) -> Callable:
    """Launch arguments: a Python float is a float32 scalar on the device, and so it is here."""

    def run(value: Any) -> Any:
        if isinstance(value, float):
            return tl.tensor(_Handle(np.array([value], np.float32), tl.float32), tl.float32)
        return original(value)

    return run


# ---- one patch of triton.language per launch --------------------------------------------------


class _Language:
    """What the current launch has patched; nested device functions add only what is missing."""

    def __init__(self, patch: Callable) -> None:
        self.patch = patch
        self.modules: set[int] = set()
        self.scopes: list[Any] = []

    def enter(self, function: Any) -> Any:
        found = (value for value in function.__globals__.values() if inspect.ismodule(value))
        modules = {id(value) for value in found if value in (tl, tl.core)}
        outermost = not self.scopes
        if outermost or not modules <= self.modules:
            self.scopes.append(self.patch(function))
            self.modules |= modules
        return _Restore(self if outermost else None)


class _Restore:
    """The scope that the interpreter gets back: it undoes everything when a launch ends."""

    def __init__(self, language: _Language | None) -> None:
        self.language = language

    def restore(self) -> None:
        if self.language is None:
            return
        for scope in reversed(self.language.scopes):
            scope.restore()
        self.language.scopes.clear()
        self.language.modules.clear()


# ---- addresses --------------------------------------------------------------------------------


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a launch argument: itself, behind a descriptor, or in a tuple."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(getattr(value, "base", None), torch.Tensor):
        yield value.base


def _extent(x: torch.Tensor) -> tuple[int, int]:
    """First and one past the last byte of a tensor, holes between its rows included."""
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + x.element_size() * (1 + steps)


class _Memory:
    """The memory that the current launch may touch, and who wrote where."""

    def __init__(self) -> None:
        self.extents: list[tuple[int, int]] = []
        self.writer: dict[int, Any] = {}
        self.program: Any = None

    def check(self, pointers: Any, mask: Any, store: bool) -> None:
        if not self.extents:
            return
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        active = np.broadcast_to(mask.data, shape).astype(bool)
        addresses = np.broadcast_to(pointers.data, shape)[active].astype(np.uint64)
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        inside = np.zeros(addresses.shape, bool)
        for start, stop in self.extents:
            inside |= (addresses >= np.uint64(start)) & (addresses <= np.uint64(stop - size))
        if not inside.all():
            self._report(int(addresses[~inside][0]), int((~inside).sum()), store)
        if store:
            for address in addresses.tolist():
                writer = self.writer.setdefault(address, self.program)
                if writer != self.program:
                    raise RaceError(f"programs {writer} and {self.program} store to {address:#x}")

    def _report(self, address: int, lanes: int, store: bool) -> None:
        start, stop = min(self.extents, key=lambda e: min(abs(e[0] - address), abs(e[1] - address)))
        raise OutOfBoundsError(
            f"{'store' if store else 'load'} in program {self.program}: {lanes} lanes outside, the "
            f"first at byte {address - start} of a tensor of {stop - start} bytes"
        )


_memory = _Memory()


def _checked(original: Callable, store: bool) -> Callable:
    if store:

        def run_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            _memory.check(pointers, mask, store=True)
            return original(self, pointers, value, mask, *rest)

        return run_store

    def run_load(self: Any, pointers: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        _memory.check(pointers, mask, store=False)
        return original(self, pointers, mask, *rest, **options)

    return run_load


def _tracked(original: Callable) -> Callable:
    """`set_grid_idx`, which says which program runs next."""

    def run(self: Any, x: int, y: int, z: int) -> Any:
        _memory.program = (x, y, z)
        return original(self, x, y, z)

    return run


def _guarded(original: Callable) -> Callable:
    """A launch, with the extents of its arguments known."""

    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        found = [x for value in (*arguments, *options.values()) for x in _tensors(value)]
        _memory.extents = [_extent(x) for x in found if x.numel()]
        _memory.writer.clear()
        try:
            return original(self, *arguments, **options)
        finally:
            _memory.extents = []
            _memory.program = None

    return run


def install() -> None:
    """Patch the interpreter, once per process."""
    if getattr(_Builder, "_fisherkern", False):
        return
    _Builder._fisherkern = True
    for name, repair in {
        "cast_impl": _cast,
        "unary_op": _elementwise,
        "binary_op": _elementwise,
        "ternary_op": _elementwise,
        "create_fp_to_fp": _float_to_float,
        "create_fma": _fma,
        "create_dot": _dot,
        "create_masked_load": lambda original: _checked(original, store=False),
        "create_masked_store": lambda original: _checked(original, store=True),
        "set_grid_idx": _tracked,
    }.items():
        setattr(_Builder, name, repair(getattr(_Builder, name)))
    builder = interpreter.interpreter_builder
    allowed = (*builder.options.allowed_dot_input_precisions, "bf16x6")
    # checks of overflow take a quarter of the time, and sizes of tests overflow nothing
    builder.options = replace(
        builder.options, allowed_dot_input_precisions=allowed, sanitize_overflow=False
    )
    interpreter._implicit_cvt = _argument(interpreter._implicit_cvt)
    interpreter._patch_lang = _Language(interpreter._patch_lang).enter
    executor = interpreter.GridExecutor
    executor.__call__ = _guarded(executor.__call__)


install()
