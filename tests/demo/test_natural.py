"""The natural gradients of the head: against dense algebra, and models without a linear head."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fisherkern.demo import natural, report


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense_direction(G: torch.Tensor, A: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    pi = ((A.trace() / len(A)) / (G.trace() / len(G))).sqrt()
    left = G + natural.DAMPING**0.5 / pi * torch.eye(len(G), dtype=torch.float64)
    right = A + natural.DAMPING**0.5 * pi * torch.eye(len(A), dtype=torch.float64)
    return torch.linalg.solve(right, torch.linalg.solve(left, gradient).mT).mT


def test_directions_are_those_of_dense_algebra() -> None:
    T, V, d = 20, 30, 6
    h, z = seeded(T, d), seeded(T, V, seed=1) * 2
    labels = torch.arange(T) % V
    found = natural.solve(h, z, labels)
    p, x = z.double().softmax(-1), h.double()
    g = p - torch.nn.functional.one_hot(labels, V)
    gradient, A = g.mT @ x / T, x.mT @ x / T
    true = dense_direction(torch.diag(p.mean(0)) - p.mT @ p / T, A, gradient)
    empirical = dense_direction(g.mT @ g / T, A, gradient)
    assert found.cosine == pytest.approx(natural.cosine(true, empirical), abs=1e-5)
    for direction, truth in zip(found.directions, (true, empirical), strict=True):
        assert direction.along_gradient == pytest.approx(natural.cosine(truth, gradient), abs=1e-5)
        assert direction.residual < 1e-5
        assert direction.seconds > 0
    text = report.natural_gradients(found)
    assert "| true Fisher |" in text
    assert f"{found.cosine:+.3f}" in text


class Model(nn.Module):
    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 4), head

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, tokens: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.head(self.embedding(tokens)))


def test_the_head_is_measured_on_what_it_is_given() -> None:
    torch.manual_seed(0)
    model, tokens = Model(nn.Linear(4, 11)), torch.arange(11)
    found = natural.measure(model, tokens)
    h = model.embedding(tokens).detach()
    expected = natural.solve(h[:-1], model.head(h)[:-1].detach(), tokens[1:])
    assert found is not None
    assert (found.classes, found.width, found.tokens) == (11, 4, 10)
    assert found.cosine == pytest.approx(expected.cosine)
    assert not model.head._forward_pre_hooks


def test_nothing_to_say_without_a_linear_head_or_a_next_token() -> None:
    assert natural.measure(Model(nn.Identity()), torch.arange(5)) is None
    assert natural.measure(Model(nn.Linear(4, 11)), torch.arange(1)) is None
