"""Products with the factor U of logits, for back ends whose kernels do not fuse them.

A panel [rows, T] or its transpose is written, and the covariance kernels of the same back end
multiply it: their `precision`, weights and bias coordinate are what these products need.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Rows of a panel come in multiples of this.
_ROWS = 64


def put_at_labels(panel: Tensor, labels: Tensor, begin: int, values: Tensor) -> None:
    """Set panel[t, y_t − begin] of a panel [T, n] to values [T], for the labels that are in it."""
    column = labels - begin
    inside = (column >= 0) & (column < panel.shape[1])
    column = column.clamp(0, panel.shape[1] - 1)[:, None]
    kept = panel.gather(1, column)
    panel.scatter_(1, column, torch.where(inside[:, None], values[:, None], kept))


def powers(
    kernels: Any,
    logits: Tensor,
    weights: Tensor | None,
    logsumexp: Tensor | None,
    temperature: float,
    sums: Tensor,
    reference: Tensor,
    unit: Tensor,
) -> None:
    """Sums [V] = Σ w p; reference and unit [T] with p = unit exp((z − reference) / τ)."""
    kernels.softmax_fisher_mean_probs(logits, weights, logsumexp, temperature, sums)
    top = logits.amax(-1).flatten().to(unit.dtype)
    valid = None if weights is None else weights != 0
    if logsumexp is None:
        stats = unit.new_empty(len(unit), 5)
        kernels.softmax_fisher_stats(logits, valid, None, temperature, stats)
        unit.copy_(stats[:, 4])
    else:
        torch.exp(top / temperature - logsumexp, out=unit)
    reference.copy_(top)
    if valid is not None:
        for value in (reference, unit):
            value.masked_fill_(~valid, 0)


@dataclass(frozen=True)
class Factor:
    """U [V, T] with the kernels that make and multiply its panels; logits etc. are canonical."""

    kernels: Any
    logits: Sequence[Tensor]
    reference: Tensor
    unit: Tensor
    labels: Tensor | None
    at_label: Tensor | None
    temperature: float

    def fill(
        self, panel: Tensor, begin: int, end: int, scale: Tensor | None, by_class: bool
    ) -> None:
        """Rows [begin, end) of diag(scale) U into panel [n, T], or their transpose [T, n]."""
        first = 0
        for z in self.logits:
            last = first + z.shape[0] * z.shape[1]
            part = panel[:, first:last] if by_class else panel[first:last]
            self.kernels.softmax_fisher_panel(
                z[..., begin:end],
                self.reference[first:last],
                self.unit[first:last],
                None if scale is None else scale[begin:end],
                self.temperature,
                by_class,
                part,
            )
            if self.labels is not None and self.at_label is not None:
                labels, values = self.labels[first:last], self.at_label[first:last]
                if scale is not None:
                    values = values * scale[labels.clamp(0, scale.shape[0] - 1)]
                put_at_labels(part.mT if by_class else part, labels, begin, values)
            first = last

    def panels(
        self, width: int, workspace: int, scale: Tensor | None = None, *, by_class: bool
    ) -> Iterator[tuple[int, int, Tensor]]:
        """Ranges of classes, and these rows of diag(scale) U: [n, T] by class, or [T, n].

        A panel and a block of `width` columns fit into the workspace. Panels share their memory.
        """
        classes, tokens = self.logits[0].shape[-1], self.reference.shape[0]
        row_bytes = max(tokens + width, 1) * self.reference.element_size()
        step = min(max(workspace // row_bytes // _ROWS * _ROWS, _ROWS), classes)
        memory = self.reference.new_empty(step * tokens)
        for begin in range(0, classes, step):
            end = min(begin + step, classes)
            shape = (end - begin, tokens) if by_class else (tokens, end - begin)
            panel = memory[: tokens * (end - begin)].view(shape)
            self.fill(panel, begin, end, scale, by_class)
            yield begin, end, panel

    def project(
        self,
        scale: Tensor | None,
        y: Tensor,
        ones: bool,
        precision: str,
        workspace: int,
        out: Tensor,
        gram: Tensor | None,
    ) -> None:
        """Out [T, K (+ 1)] = Uᵀ diag(scale) [y, 1]; lower triangle of gram = Uᵀ diag(scale) U."""
        one = self.reference.new_ones(1)
        for begin, end, panel in self.panels(y.shape[1], workspace, by_class=True):
            rows, beta = panel[None], 1.0 if begin else 0.0
            w = None if scale is None else scale[begin:end]
            if out.shape[1]:
                block = y[None, begin:end]
                self.kernels.cross_update(
                    block, rows, None, w, one, beta, ones, "product", precision, out
                )
            if gram is not None:
                self.kernels.covariance_update(
                    rows[:, :, None], None, w, one, beta, False, precision, gram[None]
                )

    def expand(
        self,
        scale: Tensor | None,
        c: Tensor,
        alpha: float,
        y: Tensor | None,
        y_scale: Tensor | None,
        precision: str,
        workspace: int,
        out: Tensor,
    ) -> None:
        """Out [V, K] = diag(y_scale) y + alpha diag(scale) U c."""
        factor = torch.full_like(self.reference[:1], alpha)
        if y is not None and y_scale is None:
            out.copy_(y)
        elif y is not None and y_scale is not None:
            torch.mul(y, y_scale[:, None], out=out)
        beta = 0.0 if y is None else 1.0
        for begin, end, panel in self.panels(c.shape[1], workspace, scale, by_class=False):
            self.kernels.cross_update(
                c[None],
                panel[None],
                None,
                None,
                factor,
                beta,
                False,
                "product",
                precision,
                out[begin:end],
            )
