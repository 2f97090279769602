"""The correctness gate: error against float64, with plain PyTorch's own error as the budget."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fisherkern.bench.registry import Tensors, as_tuple

# Added to twice the error of eager PyTorch: about one rounding of a result in that dtype.
EPSILON = {
    torch.float64: 1e-14,
    torch.float32: 2e-6,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}
# Eager PyTorch sets the budget, so it gets a bound of its own: naive formulas round every step.
EAGER_LIMIT = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.bfloat16: 6e-2,
    torch.float16: 1e-2,
}
_CHUNK = 1 << 24


def limit(dtype: torch.dtype, eager_error: float) -> float:
    """The largest error that a provider other than eager may have."""
    return 2 * min(eager_error, EAGER_LIMIT[dtype]) + EPSILON[dtype]


def chunks(tokens: int, classes: int) -> Iterator[slice]:
    """Slices of tokens small enough for temporaries in float64."""
    step = max(1, _CHUNK // max(classes, 1))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def checked(name: str, output: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The output, if it is an answer at all."""
    if tuple(output.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(output.shape)}, not {tuple(shape)}")
    if not bool(torch.isfinite(output).all()):
        raise ValueError(f"{name} is not finite everywhere")
    return output


def worst_row(output: Tensor, truth: Tensor) -> float:
    """Largest over rows of the larger of two relative errors: in max norm and in 1-norm.

    The max norm alone would forgive a kernel that drops the tail of a distribution.
    """
    output, truth = output.double().flatten(1), truth.double().flatten(1)
    difference = (output - truth).abs()
    tiny = torch.finfo(torch.float64).tiny
    largest = difference.amax(1) / truth.abs().amax(1).clamp_min(tiny)
    total = difference.sum(1) / truth.abs().sum(1).clamp_min(tiny)
    return float(torch.maximum(largest, total).max())


def rows(truth: Callable[..., object]) -> Callable[[Tensors, Tensors], float]:
    """Error of an op with one result per row: ``truth(*float64 inputs)`` in chunks of tokens."""

    def error(inputs: Tensors, outputs: Tensors) -> float:
        tokens, classes = inputs[0].shape
        worst = 0.0
        for part in chunks(tokens, classes):
            exact = as_tuple(
                truth(*(x[part].double() if x.is_floating_point() else x[part] for x in inputs))
            )
            if len(exact) != len(outputs):
                raise ValueError(f"{len(outputs)} outputs, not {len(exact)}")
            for i, (output, right) in enumerate(zip(outputs, exact, strict=True)):
                if output.shape[:1] != (tokens,):
                    raise ValueError(f"output {i} has shape {tuple(output.shape)}")
                mine = checked(f"output {i}", output[part], tuple(right.shape))
                shape = (right.shape[0], -1)
                worst = max(worst, worst_row(mine.reshape(shape), right.reshape(shape)))
        return worst

    return error


def token_mean(truth: Callable[..., Tensor]) -> Callable[[Tensors, Tensors], float]:
    """Error of a positive mean over tokens: the largest relative error of an element.

    ``truth(*float64 inputs)`` gives the sum over a chunk of tokens.
    """

    def error(inputs: Tensors, outputs: Tensors) -> float:
        tokens, classes = inputs[0].shape
        (output,) = outputs
        checked("output", output, (classes,))
        total = sum(truth(*(x[part].double() for x in inputs)) for part in chunks(tokens, classes))
        exact = total / tokens
        return float(((output.double() - exact).abs() / exact).max())

    return error


def worst_column(output: Tensor, truth: Tensor) -> float:
    """Largest over columns of the relative error in 2-norm: of solutions of a linear system."""
    truth = truth.double()
    tiny = torch.finfo(torch.float64).tiny
    return float(((output.double() - truth).norm(dim=0) / truth.norm(dim=0).clamp_min(tiny)).max())


def matrix(
    truth: Callable[..., Tensor], measure: Callable[[Tensor, Tensor], float] = worst_row
) -> Callable[[Tensors, Tensors], float]:
    """Error of an op with a matrix as its result: `measure` of it and ``truth(*inputs)``."""
    # everybody who computes a case is compared with one truth, which may take longer than they do
    exact = functools.lru_cache(maxsize=1)(truth)

    def error(inputs: Tensors, outputs: Tensors) -> float:
        right = exact(*inputs)
        (output,) = outputs
        return measure(checked("output", output, tuple(right.shape)), right)

    return error
