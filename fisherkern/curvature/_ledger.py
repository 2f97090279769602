"""Ledger: terms are counted where gradients were added, and half a pass is taken back."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from fisherkern.curvature._tap import Call
from fisherkern.curvature.structures import LayerCurvature


class Ledger:
    """What the layers got in the passes of a batch.

    Gradients come call by call, and the terms they belong to are counted at the end of a pass. A
    layer that meets NaN in between goes back to where it was. The copy of its averages that takes
    is made only where a layer may be added to more than once in a pass.

    Args:
        layers: by name.
        several: whether that is so of every layer.
    """

    def __init__(self, layers: Mapping[str, LayerCurvature], several: bool) -> None:
        self._layers, self._several = layers, several
        self.open()

    def open(self) -> None:
        """A new batch."""
        self._failed: set[str] = set()
        self._calls: Counter[str] = Counter()
        self.begin()

    def begin(self) -> None:
        """A new pass."""
        self._received: set[str] = set()
        self._before: dict[str, dict[str, Any]] = {}
        self._counted: dict[str, list[Call]] = {}

    def call(self, name: str) -> None:
        """The module of a layer is called; checkpointing repeats calls, but adds none."""
        if torch._C._current_graph_task_id() < 0:
            self._calls[name] += 1

    def takes(self, name: str) -> bool:
        """Whether a layer is followed still."""
        return name not in self._failed

    def receive(self, name: str, call: Call) -> None:
        """A layer is about to be added to, with a gradient of this call."""
        if name not in self._received and (self._several or self._calls[name] > 1):
            self._before[name] = self._layers[name].state_dict()
        self._received.add(name)
        if not call.counted:
            self._counted.setdefault(name, []).append(call)

    def fail(self, name: str) -> None:
        """Leave a layer out of what is left of the batch, and of this pass."""
        self._failed.add(name)
        self._restore(name)

    def close(self, terms: float) -> None:
        """Count the terms of a pass: of layers without a call too, for their gradient is zero.

        Not of layers that are frozen now: it is not computed then, and their averages wait.
        """
        if not self._received and not self._failed and terms > 0:
            warnings.warn(
                "no gradient came to any layer, and nothing is counted: the passes forward and "
                "backward both have to be made in the batch, and a model must not have been "
                "compiled before hooks were attached",
                RuntimeWarning,
                stacklevel=4,
            )
            return
        trained = {name for name, kept in self._layers.items() if kept.layer.trained}
        self._count(terms, trained - self._failed | self._received)

    def abandon(self, terms: float) -> None:
        """A pass was broken off: take back what can be, and count the terms of what cannot."""
        for name in list(self._received):
            self._restore(name)
        self._count(terms, self._received)

    def _restore(self, name: str) -> None:
        before = self._before.pop(name, None)
        if before is not None:
            self._layers[name].load_state_dict(before)
            self._received.discard(name)
            for call in self._counted.pop(name, ()):
                call.counted = False

    def _count(self, terms: float, names: set[str]) -> None:
        for name in names:
            self._layers[name].add_terms(terms)
        self.begin()
