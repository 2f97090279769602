"""Checks that read values, made ops of their own so that they hold under torch.compile too.

On the CPU bad values raise. On a GPU that would stall the stream (and break CUDA graphs), so a bad
value becomes NaN there and the rows that it concerns come out NaN: never silently finite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.ops._library import define


def _checked_weights(weights: Tensor, dtype: torch.dtype) -> Tensor:
    good = (weights >= 0) & weights.to(dtype).isfinite()
    if weights.device.type == "cpu" and not bool(good.all()):
        bad = weights[~good][0].item()
        kind = "values" if math.isinf(bad) or not bad > 0 else str(dtype).removeprefix("torch.")
        raise ValueError(f"weights holds {bad}; allowed are finite {kind} >= 0")
    return torch.where(good, weights.to(dtype), torch.nan)


_checked_weights_op = define(
    "checked_weights(Tensor weights, ScalarType dtype) -> Tensor",
    _checked_weights,
    lambda weights, dtype: torch.empty_like(weights, dtype=dtype),
)


def checked_weights(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights [...] in `dtype`, none of them negative, infinite or NaN."""
    return _checked_weights_op(weights, dtype)


def check_labels(labels: Tensor, classes: int, ignore_index: int) -> None:
    """Labels on the CPU lie in [0, V) or are `ignore_index`; called by ops before they write."""
    if labels.device.type != "cpu":
        return
    bad = ((labels < 0) | (labels >= classes)) & (labels != ignore_index)
    if bool(bad.any()):
        raise ValueError(
            f"labels holds {int(labels[bad][0])}; allowed are 0 to {classes - 1} "
            f"and ignore_index = {ignore_index}"
        )


def _extent(x: Tensor) -> tuple[int, int]:
    """First and one past the last byte that a tensor of non-negative strides touches."""
    start = x.data_ptr()
    if x.numel() == 0:
        return start, start
    steps = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return start, start + (steps + 1) * x.element_size()


def _side_by_side(a: Tensor, b: Tensor) -> bool:
    """Whether rows of both come at one distance, in which they lie apart: columns of one buffer."""
    if not (a.ndim and b.ndim):
        return False
    period, widths = 0, []
    for x in (a, b):
        strides = [step * x.element_size() for step in x.stride()]
        rows = zip(strides[:-1], x.shape[:-1], strict=True)
        period = math.gcd(period, *(step for step, size in rows if size > 1))
        widths.append((x.shape[-1] - 1) * strides[-1] + x.element_size())
    ahead = b.data_ptr() - a.data_ptr()
    return period > 0 and ahead % period >= widths[0] and -ahead % period >= widths[1]


def check_disjoint(
    out: Tensor, inputs: dict[str, Tensor | None], hint: str = "", name: str = "out"
) -> None:
    """The destination shares no memory with an input, nor one element with another."""
    if out.numel() and checks.overlaps_itself(out):
        raise ValueError(f"{name} has strides {out.stride()}: several of its elements share memory")
    start, stop = _extent(out)
    for other, value in inputs.items():
        if value is None:
            continue
        first, last = _extent(value)
        if start < last and first < stop and not _side_by_side(out, value):
            raise ValueError(f"{name} overlaps {other} in memory; pass a separate tensor{hint}")


def sampling_seed(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """A key from the generator, and 0, the index of the first token."""
    key = torch.randint(2**63 - 1, (1,), device=x.device, generator=generator)
    return torch.nn.functional.pad(key, (0, 1))
