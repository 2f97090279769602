"""The head without logits: against float64, and models whose logits are not those of a head."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fisherkern.demo import head, report


class Model(nn.Module):
    """Logits `scale` times those of its head, soft-capped if the configuration says so."""

    def __init__(self, softcap: float | None = None, scale: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(40, 6), nn.Linear(6, 40, bias=bias)
        self.config = SimpleNamespace(final_logit_softcapping=softcap)
        self.scale = scale

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        z = self.head(self.embedding(tokens)) * self.scale
        cap = self.config.final_logit_softcapping
        return SimpleNamespace(logits=z if cap is None else cap * torch.tanh(z / cap))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [True, False])
def test_both_sides_are_right(softcap: float | None, bias: bool) -> None:
    found = head.measure(Model(softcap, bias=bias), torch.arange(24))
    assert found is not None
    assert (found.tokens, found.classes, found.width) == (24, 40, 6)
    assert len(found.rows) == 4
    for row in found.rows:
        assert row.ours.relative_error < 1e-6
        assert row.plain.relative_error < 1e-5
    assert found.jacobian.error < 1e-5
    assert found.jacobian.our_error < 1e-6
    text = report.head(found)
    assert "h [24, 6] and W [40, 6]" in text
    assert "jacobian of 40 log-probabilities" in text


def test_autograd_takes_classes_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    weight, bias = model.head.weight.detach(), model.head.bias.detach()
    h = head.Head(torch.randn(3, 6), weight, bias, None)
    whole = head.by_autograd(h, h.hidden[0])
    monkeypatch.setattr(head, "_AT_ONCE", 7)
    assert torch.allclose(head.by_autograd(h, h.hidden[0]), whole, atol=1e-7)


def test_nothing_to_say_without_a_linear_head_that_gives_the_logits() -> None:
    assert head.measure(Model(scale=0.5), torch.arange(5)) is None
    model = Model()
    model.head = nn.Identity()  # type: ignore[assignment]
    assert head.measure(model, torch.arange(5)) is None
