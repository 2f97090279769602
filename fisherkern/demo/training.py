"""Ten steps of K-FAC on a real model beside ten of AdamW: the loss on text that neither saw."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fisherkern.optim import KFAC

STEPS = 10
# Tokens of a window, windows of a step, and windows that are held out.
LENGTH, PER_STEP, HELD_OUT = 128, 2, 4
# The best of 1e-5, 3e-5, 1e-4, 2e-4 and 4e-4 for these steps of the default model.
ADAM_LR = 1e-4
# The learning rate is what `kl_clip` leaves of 1. Inverses are made once, after the first step.
KFAC_OPTIONS: dict[str, Any] = {
    "lr": 1.0,
    "momentum": 0.0,
    "damping": 1e-2,
    "kl_clip": 1e-3,
    "adam_lr": ADAM_LR,
    "factor_update_period": 2,
    "inverse_update_period": 10,
}
# Beyond this many parameters the factors would take more memory than a demo may.
LARGEST = 400_000_000


@dataclass(frozen=True)
class Run:
    """One optimizer."""

    name: str
    after: float
    """The held-out loss after the steps, nats per token."""
    seconds: float


@dataclass(frozen=True)
class Training:
    """What was measured."""

    before: float
    runs: list[Run]
    steps: int
    tokens: int
    """Of a step."""
    held_out: int
    """Tokens that the loss is measured on."""


def measure(model: Any, windows: Tensor) -> Training | None:
    """Train from the same weights with each optimizer; the model is as it was afterwards.

    Args:
        model: a causal language model of transformers.
        windows: int64 [W, T]: the first are held out, the others trained on, again if need be.

    Returns:
        None where the model is too large or the text too short.
    """
    size = sum(p.numel() for p in model.parameters())
    if size > LARGEST or len(windows) < HELD_OUT + PER_STEP:
        return None
    held_out, seen = windows[:HELD_OUT], windows[HELD_OUT:]
    weights = copy.deepcopy(model.state_dict())
    makers: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "AdamW": lambda: torch.optim.AdamW(model.parameters(), lr=ADAM_LR, weight_decay=0.0),
        "KFAC": lambda: KFAC(
            model, generator=torch.Generator(windows.device).manual_seed(0), **KFAC_OPTIONS
        ),
    }
    before = _loss(model, held_out)
    runs = []
    for name, make in makers.items():
        optimizer = make()
        try:
            seconds = _train(model, optimizer, seen)
            runs.append(Run(name, _loss(model, held_out), seconds))
        finally:
            if isinstance(optimizer, KFAC):
                optimizer.preconditioner.detach()
            model.load_state_dict(weights)
            model.zero_grad(set_to_none=True)
            model.eval()
    tokens = PER_STEP * windows.shape[1]
    return Training(before, runs, STEPS, tokens, held_out[:, 1:].numel())


def _train(model: Any, optimizer: torch.optim.Optimizer, windows: Tensor) -> float:
    began = time.perf_counter()
    model.train()
    for step in range(STEPS):
        chosen = torch.arange(step * PER_STEP, (step + 1) * PER_STEP) % len(windows)
        batch = windows[chosen]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
    return time.perf_counter() - began


@torch.no_grad()
def _loss(model: Any, windows: Tensor) -> float:
    model.eval()
    losses = [model(input_ids=w[None], labels=w[None], use_cache=False).loss for w in windows]
    return torch.stack(losses).mean().item()
