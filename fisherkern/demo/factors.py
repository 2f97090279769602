"""The input factor A of every linear layer of a model over a text, ours beside plain PyTorch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fisherkern
from fisherkern import reference
from fisherkern.demo.comparisons import Row, Side
from fisherkern.demo.measure import median_seconds, peak_extra_bytes
from fisherkern.demo.spectra import Spectra

# Windows of the text that the factors average over.
WINDOWS = 2
# A ← decay · A + (1 − decay) · A_window: at one half, two windows weigh the same.
DECAY = 0.5
# The error is measured on every eighth row of a factor: its float64 truth takes an eighth of the
# time.
ERROR_STRIDE = 8
# Seconds for one dtype. Where they do not last for all layers, the measured ones are spread evenly.
BUDGET = 10.0
_HEAD_START = 2.0  # seconds: the first layers also measure memory, and start threads and kernels

Batches = Sequence[Tensor]


@dataclass(frozen=True)
class Factors:
    """What was measured, one row per dtype, and what the float32 factors look like."""

    rows: list[Row]
    measured: list[int]
    """How many layers each row covers."""
    spectra: Spectra
    layers: int
    """How many linear layers ran."""
    widths: list[int]
    """Their distinct input widths, ascending."""
    windows: int
    tokens: int


def ours(windows: Batches) -> Tensor:
    """A over windows [.., d], each folded into the lower triangle of A in one call."""
    factor = torch.empty(windows[0].shape[-1], windows[0].shape[-1])
    for i, x in enumerate(windows):
        # a decay of zero does not read A, which holds nothing yet
        fisherkern.covariance_update_(factor, x, ema_decay=DECAY if i else 0.0, mirror=False)
    return fisherkern.mirror_(factor)


def plain(windows: Batches) -> Tensor:
    """The same as a user would write it."""
    factor = None
    for x in windows:
        x = x.reshape(-1, x.shape[-1])
        new = (x.t() @ (x / len(x))).float()
        factor = new if factor is None else DECAY * factor + (1 - DECAY) * new
    assert factor is not None
    return (factor + factor.t()) / 2


def linear_layers(model: nn.Module) -> dict[str, int]:
    """The names of the linear layers, transformers' Conv1D included, and their input widths."""
    from transformers.pytorch_utils import Conv1D  # what GPT-2 calls a linear layer

    widths = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            widths[name] = module.in_features
        elif isinstance(module, Conv1D):
            widths[name] = module.weight.shape[0]
    return widths


def errors(factor: Tensor, windows: Batches) -> tuple[float, float]:
    """‖A − truth‖ / ‖truth‖ and the largest |A_ij − truth_ij| / √(A_ii A_jj), on some rows."""
    truth = squares = None
    for x in (x.double() for x in windows):
        new = reference.cross_covariance(x[..., ::ERROR_STRIDE], x)
        square = x.square().flatten(0, -2).mean(0)
        truth = new if truth is None else DECAY * truth + (1 - DECAY) * new
        squares = square if squares is None else DECAY * squares + (1 - DECAY) * square
    assert truth is not None
    assert squares is not None
    difference = factor[::ERROR_STRIDE].double() - truth
    # coordinates that are always zero have no scale, and no error
    size = squares.sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    largest = difference.abs() / size[::ERROR_STRIDE, None] / size
    norm = max(truth.norm().item(), torch.finfo(torch.float32).tiny)
    return difference.norm().item() / norm, largest.max().item()


@torch.no_grad()
def measure(
    model: nn.Module, tokens: Tensor, progress: Callable[[], Any] = lambda: None
) -> Factors:
    """Run the model over token windows [W, T] and measure each layer on the inputs it gets.

    Nothing outlives its layer but the figures. A layer that runs again, as where weights are shared
    over depth, is measured on its first call.

    Args:
        model: a causal language model of transformers.
        tokens: int64 [W, T]; the first windows are used.
        progress: called after every layer.
    """
    tokens = tokens[:WINDOWS]
    layers = linear_layers(model)
    work = sum(width**2 for width in layers.values())
    tallies = [_Tally(dtype, work) for dtype in (torch.float32, torch.bfloat16)]
    spectra = Spectra()
    seen: dict[str, int] = {}

    def visit(name: str, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        # an expert that no token chose, or a call by keyword, gives nothing to measure
        x = arguments[0] if arguments else None
        if name in seen or not isinstance(x, Tensor) or x.numel() == 0:
            return
        seen[name] = x.shape[-1]
        # what is not [W, T, d] (the tokens of one expert) counts as one window
        windows = list(x) if x.ndim == 3 else [x]
        for tally in tallies:
            factor = tally.measure([window.to(tally.dtype) for window in windows])
            if factor is not None and tally.dtype == torch.float32:
                spectra.add(name, factor)
        progress()

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(visit, name)) for name in layers
    ]
    try:
        model(tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return Factors(
        rows=[tally.row() for tally in tallies],
        measured=[tally.layers for tally in tallies],
        spectra=spectra,
        layers=len(seen),
        widths=sorted(set(seen.values())),
        windows=len(tokens),
        tokens=tokens.numel(),
    )


@dataclass
class _Sums:
    """Figures of one implementation: seconds are added over layers, the rest is the largest."""

    seconds: float = 0.0
    extra_bytes: int = 0
    relative_error: float = 0.0
    largest_error: float = 0.0

    def side(self) -> Side:
        return Side(self.seconds, self.extra_bytes, self.relative_error, self.largest_error)


@dataclass
class _Tally:
    """The row of one dtype while its layers come by, within a budget of seconds."""

    dtype: torch.dtype
    work: int
    """Σ d² of the layers to come, and of those that came: what the time goes with."""
    done: int = 0
    spent: float = 0.0
    layers: int = 0
    widths: set[int] = field(default_factory=set)
    ours: _Sums = field(default_factory=_Sums)
    plain: _Sums = field(default_factory=_Sums)

    def measure(self, windows: Batches) -> Tensor | None:
        """Our factor of one layer, or None where the layer is left out to keep to the budget."""
        width = windows[0].shape[-1]
        self.done += width**2
        if self.spent > _HEAD_START + BUDGET * self.done / self.work:
            return None
        began = time.perf_counter()
        calls = [partial(ours, windows), partial(plain, windows)]
        sums = (self.ours, self.plain)
        if width not in self.widths:  # which also warms up; memory depends on nothing else
            for call, total in zip(calls, sums, strict=True):
                total.extra_bytes = max(total.extra_bytes, peak_extra_bytes(call))
        factors = [call() for call in calls]
        for factor, total in zip(factors, sums, strict=True):
            relative, largest = errors(factor, windows)
            total.relative_error = _larger(total.relative_error, relative)
            total.largest_error = _larger(total.largest_error, largest)
        # one repeat is enough for a large layer: the row is a sum over layers
        seconds = median_seconds(calls, repeats=3, budget=0.04, least=1, warm_up=False)
        for total, elapsed in zip(sums, seconds, strict=True):
            total.seconds += elapsed
        self.widths.add(width)
        self.layers += 1
        self.spent += time.perf_counter() - began
        return factors[0]

    def row(self) -> Row:
        """One line of the table."""
        name = f"{str(self.dtype).removeprefix('torch.')}, {self.layers} layers"
        return Row(name, self.ours.side(), self.plain.side())


def _larger(a: float, b: float) -> float:
    """The larger one; NaN where one is, which max would lose."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
