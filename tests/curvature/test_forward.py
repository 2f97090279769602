"""Ways to write a forward pass: in place, by keyword, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import cases
from fisherkern.curvature import capture

INDICES = torch.tensor([[1, 1, 0, 5, 2], [2, 0, 3, 2, 4]])


class Written(nn.Module):
    def __init__(self, layer: nn.Module, after: Callable[[Tensor], Tensor], **how: Any) -> None:
        super().__init__()
        self.layer, self.after, self.how = layer, after, how

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) if not self.how else self.layer(**{self.how["keyword"]: x})
        y = self.after(y).flatten(1)
        return y @ cases.drawn(y.shape[1], cases.V, seed=7)


IN_PLACE: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "rows": (lambda: nn.Linear(3, 4), (3,)),
    "tokens": (lambda: nn.Linear(3, 4), (5, 3)),
    "tokens-no-bias": (lambda: nn.Linear(3, 4, bias=False), (5, 3)),
    "transposed": (lambda: cases.conv1d_of_transformers(3, 4), (5, 3)),
    "convolution": (lambda: nn.Conv2d(2, 3, 2), (2, 3, 4)),
    "norm": (lambda: nn.LayerNorm(3), (5, 3)),
    "rms": (lambda: nn.RMSNorm(3), (5, 3)),
}


@pytest.mark.parametrize("fisher_type", cases.TYPES)
@pytest.mark.parametrize("kind", IN_PLACE)
def test_an_output_that_is_written_to(kind: str, fisher_type: str) -> None:
    make, shape = IN_PLACE[kind]
    layer, x = cases.filled(make()), cases.drawn(3, *shape)

    def in_place(y: Tensor) -> Tensor:
        return functional.relu_(y.mul_(2.0))

    one, other = (
        cases.captured(Written(layer, after), x, fisher_type)
        for after in (in_place, lambda y: (2 * y).relu())
    )
    cases.assert_same(one, other)
    assert all(value.any() for value in cases.averages(one).values())


def test_an_embedding_that_is_written_to() -> None:
    layer = cases.filled(nn.Embedding(6, 3))
    one, other = (
        cases.captured(Written(layer, after), INDICES)
        for after in (lambda y: y.mul_(2.0).relu_(), lambda y: (2 * y).relu())
    )
    cases.assert_same(one, other)
    assert one.layers["layer"].G.factor().any()


@pytest.mark.parametrize(
    ("make", "keyword"),
    [
        (lambda: nn.Linear(3, 4), "input"),
        (lambda: nn.LayerNorm(3), "input"),
        (lambda: nn.RMSNorm(3), "x"),
        (lambda: cases.conv1d_of_transformers(3, 4), "x"),
        (cases.llama_norm, "hidden_states"),
    ],
)
def test_inputs_by_keyword(make: Callable[[], nn.Module], keyword: str) -> None:
    layer = cases.filled(make())
    x = cases.drawn(2, 5, 4 if keyword == "hidden_states" else 3)
    one = cases.captured(Written(layer, torch.tanh, keyword=keyword), x)
    assert one.uncovered() == {}
    cases.assert_same(one, cases.captured(Written(layer, torch.tanh), x), bits=True)


def test_embedding_by_keyword() -> None:
    layer = cases.filled(nn.Embedding(6, 3))
    one = cases.captured(Written(layer, torch.tanh, keyword="input"), INDICES)
    cases.assert_same(one, cases.captured(Written(layer, torch.tanh), INDICES), bits=True)


def test_a_model_that_is_compiled_after_hooks_were_attached() -> None:
    model = cases.filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, cases.V)))
    x = cases.drawn(4, 3)
    torch._dynamo.reset()
    with capture(model, fisher_type="type-2") as fisher:
        compiled = torch.compile(model, backend="eager")
        with fisher.batch():
            fisher.add(compiled(x))
    cases.assert_same(fisher, cases.captured(model, x))


def test_a_model_that_was_compiled_before_is_told_of() -> None:
    """Its code does not ask for hooks."""
    model = cases.filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, cases.V)))
    x = cases.drawn(4, 3)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(x)
    with capture(model, fisher_type="type-2") as fisher, fisher.batch():
        logits = compiled(x)
        with pytest.warns(RuntimeWarning, match="must not have been compiled before hooks"):
            fisher.add(logits)
    assert not any(value.any() for value in cases.averages(fisher).values())
