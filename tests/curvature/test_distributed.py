"""Capture of a model inside DistributedDataParallel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from curvature import cases
from fisherkern.curvature import Capture

SPLIT = (slice(0, 3), slice(3, 8))
TYPES = ("empirical", "type-2")


def made() -> nn.Module:
    return cases.filled(
        nn.Sequential(
            nn.Linear(3, 4), nn.ReLU(inplace=True), nn.LayerNorm(4), nn.Linear(4, cases.V)
        )
    )


def captured(model: nn.Module, inner: nn.Module, part: slice, fisher_type: str) -> Capture:
    x, y = cases.drawn(8, 3)[part], cases.labels(8)[part]
    fisher = Capture(inner, fisher_type=fisher_type)
    with fisher, fisher.batch(terms=len(x)):
        logits = model(x)
        if fisher_type != "empirical":
            fisher.add(logits)
        functional.cross_entropy(logits, y).backward()
    return fisher


def _rank(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    for fisher_type in TYPES:
        inner = made()
        fisher = captured(DistributedDataParallel(inner), inner, SPLIT[rank], fisher_type)
        reduced = {
            (name, key): average.all_reduced().mean().tril()
            for name, layer in fisher.layers.items()
            for key, average in layer.averages.items()
        }
        gradients = [p.grad for p in inner.parameters()]
        torch.save((fisher.state_dict(), reduced, gradients), f"{folder}/{fisher_type}{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two ranks saved."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(_rank, args=(str(folder),), nprocs=2)
    return folder


@pytest.mark.parametrize("fisher_type", TYPES)
def test_two_ranks(fisher_type: str, folder: Path) -> None:
    """Each captures what it saw; together that is the whole, and gradients are averaged as ever."""
    parts = [torch.load(folder / f"{fisher_type}{rank}.pt") for rank in range(2)]
    model = made()
    whole = captured(model, model, slice(0, 8), fisher_type)
    one, other = (Capture(model, fisher_type=fisher_type) for _ in range(2))
    one.load_state_dict(parts[0][0])
    other.load_state_dict(parts[1][0])
    cases.assert_same(one.merge_(other), whole)
    for (layer, key), value in parts[0][1].items():
        assert torch.equal(value, parts[1][1][layer, key])
        expected = whole.layers[layer].averages[key].mean().tril()
        assert cases.error(value, expected) < cases.EXACT
    alone = []
    for part in SPLIT:
        model = made()
        captured(model, model, part, fisher_type)
        alone.append([p.grad for p in model.parameters()])
    for first, second, together in zip(*alone, parts[0][2], strict=True):
        assert cases.error(together, (first + second) / 2) < cases.EXACT
