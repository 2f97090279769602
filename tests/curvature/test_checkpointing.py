"""Activation checkpointing: the input of a module comes back when a probe asks for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import CheckpointError, checkpoint

from curvature import cases
from fisherkern.curvature import Capture, LayerCurvature

TYPES = ("type-2", "mc", "empirical")
STRUCTURES = ("kfac", "ekfac", "diagonal", "block")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.rms = nn.LayerNorm(3), nn.RMSNorm(3)
        self.up, self.down = nn.Linear(3, 4), nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu_(self.up(self.norm(x)))
        return self.rms(x + self.down(h))


class Net(nn.Module):
    """Blocks whose activations are computed again, one of them called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(3, cases.V)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        for index in (0, 1, 1):
            block = self.blocks[index]
            if self.reentrant is None:
                h = block(h)
            else:
                h = checkpoint(block, h, use_reentrant=self.reentrant)
        return self.head(h)


INDICES = torch.tensor([[1, 1, 0, 5, 2], [2, 0, 3, 2, 4]])
LABELS = cases.labels(10)


def captured(
    reentrant: bool | None, fisher_type: str, structure: str = "kfac"
) -> tuple[Capture, list[Any]]:
    model = cases.filled(Net())
    model.reentrant = reentrant
    fisher = Capture(
        model, fisher_type=fisher_type, structure=structure, generator=cases.generator(0)
    )
    with fisher, fisher.batch(terms=10):
        logits = model(INDICES)
        if fisher_type != "empirical":
            fisher.add(logits)
            fisher.add(logits)
        functional.cross_entropy(logits.flatten(0, 1), LABELS).backward()
        taps = fisher._taps
    # recomputation stops as soon as it may, and leaves modules by an exception
    assert not any(tap._input or tap.outputs for tap in taps)
    return fisher, [p.grad for p in model.parameters()]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("fisher_type", TYPES)
def test_without_reentry(fisher_type: str, structure: str) -> None:
    (one, gradients), (other, expected) = (
        captured(reentrant, fisher_type, structure) for reentrant in (False, None)
    )
    cases.assert_same(one, other)
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_reentrant(structure: str) -> None:
    """Modules are called again in the backward pass, and followed there."""
    (one, gradients), (other, expected) = (
        captured(reentrant, "empirical", structure) for reentrant in (True, None)
    )
    cases.assert_same(one, other)
    assert all(map(torch.equal, gradients, expected))


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
def test_reentrant_does_not_go_with_add(fisher_type: str) -> None:
    model = cases.filled(Net())
    model.reentrant = True
    fisher = Capture(model, fisher_type=fisher_type, generator=cases.generator(0))
    with fisher, fisher.batch():
        logits = model(INDICES)
        with pytest.raises(RuntimeError, match=r"use_reentrant"):
            fisher.add(logits)
    counts = {name: layer.G.count for name, layer in fisher.layers.items() if hasattr(layer, "G")}
    # of "type-2" everything is taken back; of "mc" the head had all of its gradient
    head = 10 if fisher_type == "mc" else 0
    assert counts.pop("head") == head
    assert not any(counts.values())


def test_a_backward_pass_after_the_batch_is_refused_by_torch() -> None:
    """It would compute again what was followed, and does not follow any more."""
    model = cases.filled(Net())
    model.reentrant = False
    fisher = Capture(model, fisher_type="type-2")
    with fisher:
        with fisher.batch():
            logits = model(INDICES)
            fisher.add(logits)
        with pytest.raises(CheckpointError):
            logits.sum().backward()


def test_repeated_calls_make_no_copies_of_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those are for layers that are added to more than once in a pass."""
    copied: list[str] = []
    original = LayerCurvature.state_dict

    def noted(curvature: LayerCurvature) -> dict[str, Any]:
        copied.append(curvature.layer.name)
        return original(curvature)

    monkeypatch.setattr(LayerCurvature, "state_dict", noted)
    captured(False, "mc")
    parts = {f"blocks.1.{part}" for part in ("norm", "rms", "up", "down")}
    assert set(copied) == parts  # the block that is called twice


def test_each_activation_is_computed_again_once_a_pass() -> None:
    model = cases.filled(Net())
    model.reentrant = False
    calls: list[int] = []
    model.blocks[0].up.register_forward_hook(lambda *_: calls.append(1))
    fisher = Capture(model, fisher_type="mc", mc_samples=3)
    with fisher, fisher.batch():
        fisher.add(model(INDICES))
    assert len(calls) == 1 + 3
    assert fisher.layers["blocks.0.up"].A.count == 10
    assert fisher.layers["blocks.1.up"].A.count == 20
