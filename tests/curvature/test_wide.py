"""Which tokens and logits a layer of too many outputs for a matrix keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import cases
from curvature.cases import EXACT
from fisherkern.curvature import WideCurvature, capture


@pytest.mark.parametrize("fisher_type", ["empirical", "type-2"])
def test_a_wide_layer_keeps_the_same_tokens_of_any_split(fisher_type: str) -> None:
    """One in `stride` of those that count in a sample, which may be few and late."""
    model = cases.filled(nn.Linear(3, 5))
    x, mask = cases.drawn(4, 7, 3), torch.rand(4, 7, generator=cases.generator(0)) > 0.4
    found = []
    for parts in ([slice(0, 4)], [slice(0, 1), slice(1, 4)]):
        options: dict[str, Any] = {"widest": 2, "stride": 3, "loss_reduction": "sum"}
        with capture(model, fisher_type=fisher_type, **options) as fisher:
            for number, part in enumerate(parts):
                with fisher.batch(mask=mask[part], new_step=number == 0):
                    if fisher_type == "empirical":
                        (model(x[part])[mask[part]] ** 2).sum().backward()
                    else:
                        fisher.add(model(x[part]))
        layer = fisher.layers[""]
        assert isinstance(layer, WideCurvature)
        G = layer.outputs()
        assert G is not None
        found.append(G.to_dense())
        kept = sum(len(rows) for rows in (*layer.kept.logits, *layer.kept.gradients))
        assert kept == sum(-(-int(n) // 3) for n in mask.sum(1))
    assert cases.error(*found) < EXACT


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        (lambda z: z, True),
        (lambda z: z.double(), True),
        (lambda z: z.bfloat16(), True),
        (lambda z: z * 2, False),
        (lambda z: z.mul_(2), False),
        (lambda z: z.double() * 2, False),
        (lambda z: z.flip(-1), False),
    ],
    ids=["as-it-is", "double", "bfloat16", "scaled", "in-place", "cast-scaled", "permuted"],
)
def test_a_wide_layer_knows_its_logits(change: Callable[[Tensor], Tensor], kept: bool) -> None:
    """Those of the model are its own as they are and cast; after anything else gradients count."""
    model = cases.filled(nn.Linear(3, 5))
    with capture(model, widest=2, stride=1) as fisher, fisher.batch():
        fisher.add(change(model(cases.drawn(4, 7, 3))))
    layer = fisher.layers[""]
    assert isinstance(layer, WideCurvature)
    assert (len(layer.kept.logits), len(layer.kept.gradients)) == ((1, 0) if kept else (0, 1))
