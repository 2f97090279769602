"""Backward passes that break off, and those inside autocast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from curvature import cases
from fisherkern.curvature import Capture, EigenCurvature, KroneckerCurvature, capture, fisher_types


def broken(passes: Any, after: int) -> Any:
    """The same passes, until an error comes."""

    def some(*arguments: Any) -> Iterator[torch.Tensor]:
        whole = passes(*arguments)
        for _ in range(after):
            yield next(whole)
        raise KeyboardInterrupt

    return some


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block"])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_add_is_tried_again_in_the_batch(
    after: int, structure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the broken passes added is taken back, inputs too, and they come with the next ones."""
    model = cases.filled(nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, cases.V)))
    x = cases.drawn(4, 3)
    options = {"fisher_type": "type-2", "structure": structure}
    with capture(model, **options) as fisher, fisher.batch():
        logits = model(x)
        with monkeypatch.context() as patched:
            patched.setattr(fisher_types, "columns", broken(fisher_types.columns, after))
            with pytest.raises(KeyboardInterrupt):
                fisher.add(logits)
        fisher.add(logits)
    cases.assert_same(fisher, cases.captured(model, x, **options), bits=True)


def test_labels_that_were_sampled_before_an_error_keep_their_inputs() -> None:
    """Of two draws the second is taken back alone, of a layer that is called twice."""
    layer = nn.Linear(cases.V, cases.V)
    model, x = cases.filled(nn.Sequential(layer, nn.Tanh(), layer)), cases.drawn(4, cases.V)
    came = []

    def break_off(gradient: torch.Tensor) -> None:
        came.append(gradient)
        if len(came) == 2:
            raise KeyboardInterrupt

    with capture(model, fisher_type="mc", mc_samples=2) as fisher, fisher.batch():
        hidden = model[:2](x)
        hidden.register_hook(break_off)
        logits = layer(hidden)
        with pytest.raises(KeyboardInterrupt):
            fisher.add(logits)
        fisher.add(logits)
    rows = torch.cat([x, hidden.detach()])
    rows = torch.cat([rows, torch.ones(8, 1, dtype=torch.float64)], 1)
    kept = fisher.layers["0"]
    assert isinstance(kept, KroneckerCurvature)
    assert kept.A.count == 8
    assert cases.error(kept.factors()[1], rows.mT @ rows / 8) < cases.EXACT
    assert kept.G.count == 3 * 4  # terms of a draw that was whole, and of two more


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_a_backward_pass_inside_autocast(fisher_type: str) -> None:
    """Factors and the moments of EKFAC are products of float32 all the same."""
    model = nn.Linear(3, cases.V)
    x, y = cases.drawn(64, 3).float(), cases.labels(64)
    fisher = Capture(model, structure="ekfac", fisher_type=fisher_type).attach()
    layer = fisher.layers[""]
    assert isinstance(layer, EigenCurvature)
    for inside in (False, True):
        with fisher.batch(terms=64 if fisher_type == "empirical" else None):
            logits = model(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                if fisher_type == "empirical":
                    functional.cross_entropy(logits, y).backward()
                else:
                    fisher.add(logits)
        if not inside:
            layer.refresh()
    assert layer.bases is not None
    Q_G, Q_A = (Q.double() for Q in layer.bases)
    p = logits.detach().double().softmax(-1)
    rows = torch.cat([x.double(), torch.ones(64, 1, dtype=torch.float64)], 1) @ Q_A
    unit = torch.eye(cases.V, dtype=torch.float64)
    if fisher_type == "empirical":
        squares = ((p - unit[y]) @ Q_G).square()
    else:
        columns = p.unsqueeze(1) - unit  # of every label, weighed by its probability
        squares = ((columns @ Q_G).square() * p.unsqueeze(-1)).sum(1)
    expected = squares.mT @ rows.square() / 64
    assert cases.error(layer.eigenvalues().double(), expected) < 1e-5
