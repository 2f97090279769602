"""The reference itself, against autograd, dense algebra and the identities of the Fisher."""

from __future__ import annotations

from typing import Any

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


# ---- from hidden states -------------------------------------------------------------------------

WIDTH = 3
SOFTCAPS = pytest.mark.parametrize("softcap", [None, 2.0], ids=["linear", "capped"])
Head = dict[str, Any]


def head_inputs() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(6)
    shapes = (T, WIDTH), (V, WIDTH), (V,)
    h, W, b = (torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes)
    return h, W, b


def token_weights() -> Tensor:
    return torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)


def log_probabilities(h: Tensor, W: Tensor, b: Tensor, softcap: float | None) -> Tensor:
    """As a model with this head has them."""
    z = torch.nn.functional.linear(h, W, b)
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    return torch.log_softmax(z / TAU, -1)


def fisher_of_hidden(softcap: float | None) -> Tensor:
    """M [T, d, d] as the covariance of the score under the model, by autograd."""
    h, W, b = head_inputs()
    matrices = []
    for row in h:
        g = torch.func.jacrev(log_probabilities)(row, W, b, softcap)
        p = log_probabilities(row, W, b, softcap).exp()
        matrices.append(torch.einsum("v,vi,vj->ij", p, g, g))
    return torch.stack(matrices)


def head_arguments(softcap: float | None) -> Head:
    return {"bias": head_inputs()[2], "softcap": softcap, "temperature": TAU}


@SOFTCAPS
def test_logits_of_a_head_and_their_slope(softcap: float | None) -> None:
    h, W, b = head_inputs()
    z, slope = reference.head_logits(h, W, b, softcap)
    close(torch.log_softmax(z / TAU, -1), log_probabilities(h, W, b, softcap))

    def capped(a: Tensor) -> Tensor:
        return a if softcap is None else softcap * torch.tanh(a / softcap)

    a = torch.nn.functional.linear(h, W, b)
    close(slope, torch.autograd.functional.vjp(capped, a, torch.ones_like(a))[1])
    spoiled = torch.where((token_weights() == 0)[:, None], torch.nan, h)
    z, _ = reference.head_logits(spoiled, W, b, softcap, token_weights())
    close(z[1], capped(b))


@SOFTCAPS
def test_statistics_of_a_head(softcap: float | None) -> None:
    h, W, b = head_inputs()
    stats, expected = reference.head_fisher_stats(h, W, **head_arguments(softcap))
    categorical = torch.distributions.Categorical(logits=log_probabilities(h, W, b, softcap))
    close(stats.entropy, categorical.entropy())
    close(stats.max_probability, categorical.probs.amax(-1))
    close(stats.trace, (1 - categorical.probs.square().sum(-1)) / TAU**2)
    close(expected, torch.einsum("tv,vd->td", categorical.probs, W))
    if softcap is None:
        # Σ p W / τ is the derivative of log Σ exp(z / τ) in h

        def logsumexp(h: Tensor) -> Tensor:
            stats, _ = reference.head_fisher_stats(h, W, **head_arguments(None))
            return stats.logsumexp.sum()

        close(torch.func.grad(logsumexp)(h), expected / TAU)
    weighted, means = reference.head_fisher_stats(
        h, W, weights=token_weights(), **head_arguments(softcap)
    )
    for some, all_ in zip((*weighted, means.mT), (*stats, expected.mT), strict=True):
        close(some, all_ * token_weights())


@SOFTCAPS
def test_fisher_of_hidden_states(softcap: float | None) -> None:
    h, W, _ = head_inputs()
    given, M, w = head_arguments(softcap), fisher_of_hidden(softcap), token_weights()
    weighted = w[:, None, None] * M
    close(reference.head_fisher_pullback(h, W, reduction="none", **given), M)
    close(reference.head_fisher_pullback(h, W, reduction="sum", **given), M.sum(0))
    close(reference.head_fisher_pullback(h, W, **given), M.mean(0))
    each = reference.head_fisher_pullback(h, W, reduction="none", weights=w, **given)
    close(each, weighted)
    mean = reference.head_fisher_pullback(h, W, weights=w, **given)
    close(mean, weighted.sum(0) / w.sum())
    u = torch.randn(T, WIDTH, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    product = reference.head_fisher_matvec(h, W, u, weights=w, **given)
    close(product, torch.einsum("tij,tj->ti", weighted, u))


def test_fisher_of_hidden_states_is_a_hessian_without_a_cap() -> None:
    h, W, b = head_inputs()

    def logsumexp(row: Tensor) -> Tensor:
        return torch.logsumexp((W @ row + b) / TAU, -1)

    hessian = torch.stack([torch.func.hessian(logsumexp)(row) for row in h])
    close(reference.head_fisher_pullback(h, W, reduction="none", **head_arguments(None)), hessian)


@SOFTCAPS
def test_weight_diagonal_is_that_of_scores_in_the_parameters(softcap: float | None) -> None:
    h, W, b = head_inputs()
    w = token_weights()
    expected = [torch.zeros_like(W), torch.zeros_like(b)]
    for row, weight in zip(h, w, strict=True):
        scores = torch.func.jacrev(log_probabilities, argnums=(1, 2))(row, W, b, softcap)
        p = log_probabilities(row, W, b, softcap).exp()
        for total, score in zip(expected, scores, strict=True):
            total += weight * torch.einsum("v,v...->...", p, score**2)
    for reduction, count in {"sum": 1.0, "mean": w.sum()}.items():
        found = reference.head_fisher_weight_diagonal(
            h, W, weights=w, reduction=reduction, **head_arguments(softcap)
        )
        close(found.weight, expected[0] / count)
        close(found.bias, expected[1] / count)


@SOFTCAPS
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gram_matrix_of_the_woodbury_identity(reduction: str, softcap: float | None) -> None:
    """With X = Uᵀ (F̄ + λ)⁻¹ U of the dense mean Fisher F̄ of the logits, Γ = X (I + X)⁻¹."""
    h, W, b = head_inputs()
    w, lam = token_weights(), 0.05
    shares = w / w.sum() if reduction == "mean" else w
    z, _ = reference.head_logits(h, W, b, softcap)
    mean = torch.einsum("t,tij->ij", shares, dense(z))
    p = log_probabilities(h, W, b, softcap).exp()
    U = (shares.sqrt()[:, None] * p / TAU).mT
    X = U.mT @ torch.linalg.solve(mean + lam * torch.eye(V, dtype=torch.float64), U)
    given = {"weights": w, "reduction": reduction, **head_arguments(softcap)}
    found = reference.head_fisher_gram(h, W, lam, **given)
    close(found, X @ torch.linalg.inv(torch.eye(T, dtype=torch.float64) + X))
    probabilities = reference.head_fisher_mean_probs(h, W, **given)
    close(probabilities, shares @ p)


@SOFTCAPS
def test_sampled_gradient_is_that_of_the_cross_entropy(softcap: float | None) -> None:
    h, W, b = head_inputs()
    w, seed = token_weights(), torch.tensor([99, 5])
    labels, gradients = reference.head_fisher_sample(
        h, W, seed, weights=w, **head_arguments(softcap)
    )
    u = reference.philox_uniform(seed[0], 5 + torch.arange(T))
    ends = log_probabilities(h, W, b, softcap).exp().cumsum(-1)
    drawn = [int((row <= x).sum()) for row, x in zip(ends, u, strict=True)]
    assert labels.tolist() == [y if counts else -100 for y, counts in zip(drawn, w, strict=True)]

    def loss(h: Tensor) -> Tensor:
        log_p = log_probabilities(h, W, b, softcap)
        return -(w * log_p.gather(1, torch.tensor(drawn)[:, None])[:, 0]).sum()

    close(gradients, torch.func.grad(loss)(h))


@SOFTCAPS
def test_sampled_gradients_have_the_fisher_as_their_covariance(softcap: float | None) -> None:
    """To five standard errors of as many draws."""
    draws = 40_000
    h, W, _ = head_inputs()
    many = h[:1].expand(draws, WIDTH)
    seed = torch.tensor([1, 0])
    _, g = reference.head_fisher_sample(many, W, seed, **head_arguments(softcap))
    outer = g[:, :, None] * g[:, None, :]
    error = (outer.mean(0) - fisher_of_hidden(softcap)[0]).abs()
    assert (error <= 5 * outer.std(0) / draws**0.5).all()
    assert (g.mean(0).abs() <= 5 * g.std(0) / draws**0.5).all()


def test_masked_tokens_of_a_head_contribute_nothing() -> None:
    h, W, b = head_inputs()
    mask = token_weights() != 0
    spoiled = torch.where(mask[:, None], h, torch.nan)
    given: Head = {"bias": b, "softcap": 2.0}
    for reduction in ("sum", "mean"):
        how = {"reduction": reduction, **given}
        masked = reference.head_fisher_pullback(spoiled, W, mask=mask, **how)
        close(masked, reference.head_fisher_pullback(h[mask], W, **how))
        masked = reference.head_fisher_gram(spoiled, W, 0.1, mask=mask, **how)
        close(masked[mask][:, mask], reference.head_fisher_gram(h[mask], W, 0.1, **how))
        assert (masked[~mask] == 0).all()
        for name in ("weight", "bias"):
            some, few = (
                getattr(reference.head_fisher_weight_diagonal(x, W, mask=m, **how), name)
                for x, m in ((spoiled, mask), (h[mask], None))
            )
            close(some, few)
    each = reference.head_fisher_pullback(spoiled, W, mask=mask, reduction="none", **given)
    assert (each[~mask] == 0).all()
    assert (reference.head_fisher_matvec(spoiled, W, spoiled, mask=mask, **given)[1] == 0).all()
    stats, means = reference.head_fisher_stats(spoiled, W, mask=mask, **given)
    assert all((field[~mask] == 0).all() for field in (*stats, means))


def test_results_of_half_precision_heads_are_rounded_once() -> None:
    h, W, b = (x.bfloat16() for x in head_inputs())
    exact = reference.head_fisher_matvec(h.double(), W.double(), h.double(), bias=b.double())
    assert torch.equal(reference.head_fisher_matvec(h, W, h, bias=b), exact.bfloat16())
    exact = reference.head_fisher_pullback(h.double(), W.double())
    assert torch.equal(reference.head_fisher_pullback(h, W), exact.float())
