"""How uneven the factors of the layers are: which layers see few directions, and which see many."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

# A wider factor takes too long to decompose for a demo.
_WIDEST = 2048


@dataclass(frozen=True)
class Spectrum:
    """One layer: its factor, and the effective number of directions its inputs take."""

    name: str
    factor: Tensor
    effective: float
    """(tr A)² / ‖A‖²: the width where all eigenvalues are equal, 1 where there is only one."""

    @property
    def width(self) -> int:
        """Of the inputs."""
        return len(self.factor)

    def largest(self) -> float | None:
        """The share of the trace in the largest eigenvalue; None for a very wide factor."""
        if self.width > _WIDEST:
            return None
        with _one_thread():
            eigenvalues = torch.linalg.eigvalsh(self.factor)
        return (eigenvalues[-1] / self.factor.trace()).item()

    def coordinate(self) -> tuple[int, float]:
        """The input coordinate with the largest mean square, and its share of the trace."""
        diagonal = self.factor.diagonal()
        index = int(diagonal.argmax())
        return index, (diagonal[index] / diagonal.sum()).item()


class Spectra:
    """The effective number of directions of every layer, and the most and the least even layer."""

    def __init__(self) -> None:
        self.fractions: list[float] = []
        """Effective directions over the width, per layer."""
        self.most_uneven: Spectrum | None = None
        self.most_even: Spectrum | None = None

    def add(self, name: str, factor: Tensor) -> None:
        """Take one layer into account; only the two extreme factors are kept."""
        norm = factor.norm().item()
        if not 0 < norm < math.inf:  # nor NaN: such a factor has no spectrum
            return
        new = Spectrum(name, factor, (factor.trace().item() / norm) ** 2)
        fraction = new.effective / new.width
        if fraction <= min(self.fractions, default=fraction):
            self.most_uneven = new
        if fraction >= max(self.fractions, default=fraction):
            self.most_even = new
        self.fractions.append(fraction)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Decompositions take many short steps, between which threads wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
