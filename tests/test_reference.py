"""The reference itself, against autograd, dense algebra and the identities of the Fisher."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fisherkern import reference

T, V = 4, 7
TAU = 1.4


def logits(scale: float = 2.0) -> Tensor:
    return (
        torch.randn(T, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * scale
    )


def vectors(seed: int = 2) -> Tensor:
    return torch.randn(T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense(z: Tensor, tau: float = TAU) -> Tensor:
    """F of every token as a matrix, straight from its definition."""
    p = torch.softmax(z / tau, -1)
    return (torch.diag_embed(p) - p[..., None] * p[..., None, :]) / tau**2


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


def test_fisher_is_the_hessian_of_the_logsumexp() -> None:
    z = logits()
    hessian = torch.stack(
        [torch.func.hessian(lambda row: torch.logsumexp(row / TAU, -1))(row) for row in z]
    )
    close(hessian, dense(z))


def test_fisher_is_the_covariance_of_the_score() -> None:
    z = logits()
    p = torch.softmax(z / TAU, -1)
    labels = torch.arange(V).expand(T, V)
    scores = torch.stack(
        [reference.softmax_fisher_gradient(z, labels[:, k], temperature=TAU) for k in range(V)], 1
    )
    close(torch.einsum("tk,tki,tkj->tij", p, scores, scores), dense(z))
    close(torch.einsum("tk,tki->ti", p, scores), torch.zeros(T, V, dtype=torch.float64))


def test_products() -> None:
    z, v = logits(), vectors()
    F = dense(z)
    close(reference.softmax_fisher_matvec(z, v, temperature=TAU), (F @ v[..., None])[..., 0])
    quadratic = reference.softmax_fisher_quadratic(z, v, temperature=TAU)
    close(quadratic, torch.einsum("ti,tij,tj->t", v, F, v))
    several = torch.stack([v, vectors(3)], -2)
    close(reference.softmax_fisher_quadratic(z, several, temperature=TAU), several @ F @ several.mT)


def test_square_root() -> None:
    z = logits()
    eye = torch.eye(V, dtype=torch.float64)

    def matrix(function: object) -> Tensor:
        columns = [function(z, e.expand(T, V), temperature=TAU) for e in eye]  # type: ignore[operator]
        return torch.stack(columns, -1)

    L = matrix(reference.softmax_fisher_sqrt_matvec)
    close(L @ L.mT, dense(z))
    close(matrix(reference.softmax_fisher_sqrt_rmatvec), L.mT)


def test_diagonal_trace_and_statistics() -> None:
    z = logits()
    F = dense(z)
    diagonal = torch.diagonal(F, dim1=-2, dim2=-1)
    close(reference.softmax_fisher_diagonal(z, temperature=TAU), diagonal)
    close(reference.softmax_fisher_diagonal(z, temperature=TAU, reduction="sum"), diagonal.sum(0))
    close(reference.softmax_fisher_trace(z, temperature=TAU), diagonal.sum(-1))
    stats = reference.softmax_fisher_stats(z, temperature=TAU)
    categorical = torch.distributions.Categorical(logits=z / TAU)
    close(stats.logsumexp, torch.logsumexp(z / TAU, -1))
    close(stats.entropy, categorical.entropy())
    close(stats.trace, diagonal.sum(-1))
    close(stats.trace_squared, torch.linalg.eigvalsh(F).square().sum(-1))
    close(stats.max_probability, categorical.probs.amax(-1))


def test_statistics_of_a_peaked_row_in_closed_form() -> None:
    """Two classes, 1 − p = ε = e^-a / (1 + e^-a): tr F = 2 ε (1 − ε), tr F² = its square."""
    a = torch.tensor([5.0, 20.0, 30.0, 60.0], dtype=torch.float64)
    z = torch.stack([a, torch.zeros_like(a)], -1)
    epsilon = torch.exp(-a) / (1 + torch.exp(-a))
    trace = 2 * epsilon * (1 - epsilon)
    stats = reference.softmax_fisher_stats(z)
    torch.testing.assert_close(stats.trace, trace, rtol=1e-14, atol=0)
    torch.testing.assert_close(stats.trace_squared, trace**2, rtol=1e-14, atol=0)
    torch.testing.assert_close(
        reference.softmax_fisher_diagonal(z).sum(-1), trace, rtol=1e-14, atol=0
    )


def test_kullback_leibler_divergence_is_half_the_quadratic_form() -> None:
    z, v = logits(), vectors()
    for step in (1e-2, 1e-3):
        p, q = torch.log_softmax(z, -1), torch.log_softmax(z + step * v, -1)
        divergence = (p.exp() * (p - q)).sum(-1)
        half = 0.5 * step**2 * reference.softmax_fisher_quadratic(z, v)
        assert ((divergence - half).abs() <= 10 * step**3).all()


def test_gradient_is_that_of_the_cross_entropy() -> None:
    z = logits().requires_grad_()
    labels = torch.tensor([0, 6, -100, 3])
    loss = torch.nn.functional.cross_entropy(z / TAU, labels, reduction="sum")
    (expected,) = torch.autograd.grad(loss, z)
    close(reference.softmax_fisher_gradient(z.detach(), labels, temperature=TAU), expected)


def test_derivatives() -> None:
    z, v, g = logits(), vectors(), vectors(4)
    _, pullback = torch.func.vjp(
        lambda x: reference.softmax_fisher_matvec(x, v, temperature=TAU), z
    )
    close(reference.softmax_fisher_matvec_backward(z, v, g, temperature=TAU), pullback(g)[0])

    def stats(x: Tensor) -> Tensor:
        return torch.stack(reference.softmax_fisher_stats(x, temperature=TAU), -1)

    values, pullback = torch.func.vjp(stats, z)
    cotangent = vectors(5)[:, :5]
    found = reference.softmax_fisher_stats_backward(z, values, cotangent, temperature=TAU)
    close(found, pullback(cotangent)[0])


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_reductions(reduction: str) -> None:
    z = logits()
    w = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    scale = w / w.sum() if reduction == "mean" else w
    F = dense(z, 1.0)
    common = {"weights": w, "reduction": reduction}
    close(
        reference.softmax_fisher_trace(z, **common),  # type: ignore[arg-type]
        (scale * torch.diagonal(F, dim1=-2, dim2=-1).sum(-1)).sum(),
    )
    close(
        reference.softmax_fisher_mean_probs(z, **common),  # type: ignore[arg-type]
        (scale[:, None] * torch.softmax(z, -1)).sum(0),
    )
    mean_fisher = (scale[:, None, None] * F).sum(0)
    close(
        reference.softmax_fisher_diagonal(z, **common),  # type: ignore[arg-type]
        torch.diagonal(mean_fisher),
    )


def test_labels_are_drawn_by_inversion() -> None:
    z = logits()
    seed = torch.tensor([99, 5])
    labels, gradient = reference.softmax_fisher_sample(z, seed)
    u = reference.philox_uniform(seed[0], 5 + torch.arange(T))
    cumulative = torch.softmax(z, -1).cumsum(-1)
    expected = [int((row <= x).sum()) for row, x in zip(cumulative, u, strict=True)]
    assert labels.tolist() == expected
    close(gradient, reference.softmax_fisher_gradient(z, labels))


def test_half_precision_is_rounded_once() -> None:
    z = logits().bfloat16()
    exact = reference.softmax_fisher_diagonal(z.double())
    assert torch.equal(reference.softmax_fisher_diagonal(z), exact.bfloat16())
    assert reference.softmax_fisher_mean_probs(z).dtype == torch.float32
