"""A diagonal and a low-rank matrix, the empirical Fisher, Kronecker products."""

from __future__ import annotations

import pytest
import torch

import fisherkern as fk
from conftest import DEVICE, SLOW
from fisherkern.operators import DiagonalMinusLowRank, DiagonalPlusLowRank, Kronecker
from operators import cases
from operators.cases import SCALES, block, error, logits, weights

N = 60 if SLOW else 300
TAU = 1.3


def parts(r: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A diagonal, a factor and a positive definite core."""
    made = cases.generator(r)
    d = torch.rand(N, generator=made) + 0.5
    u = torch.randn(N, r, generator=made) / (4 * N**0.5)
    c = torch.randn(r, r, generator=made)
    core = c @ c.mT / r + torch.eye(r)
    return d.to(DEVICE), u.to(DEVICE), core.to(DEVICE)


@pytest.mark.parametrize("with_core", [False, True])
@pytest.mark.parametrize("r", [0, 1, 12])
@pytest.mark.parametrize("kind", [DiagonalPlusLowRank, DiagonalMinusLowRank])
def test_diagonal_and_low_rank(backend: str, kind: type, r: int, with_core: bool) -> None:
    d, u, core = parts(r)
    A = kind(d, u, core if with_core else None)
    c = core.double() if with_core else torch.eye(r, dtype=torch.float64, device=DEVICE)
    dense = torch.diag(d.double()) + kind._sign * u.double() @ c @ u.double().mT
    x = block(N)
    damped = dense + 1e-2 * torch.eye(N, dtype=torch.float64, device=DEVICE)
    assert error(A @ x, dense @ x.double()) <= 1e-6
    assert error(A.diagonal(), dense.diagonal()) <= 1e-6
    assert error(A.trace(), dense.trace()) <= 1e-6
    assert error(A.to_dense(), dense) <= 1e-6
    assert error(A.quadratic(x), x.double().mT @ dense @ x.double()) <= 1e-6
    assert error(A.solve(x, 1e-2), torch.linalg.solve(damped, x.double())) <= 2e-6
    for B in (A, kind(d, u, core if with_core else None)):  # after a solve, and before any
        assert abs(B.logdet(1e-2) - torch.logdet(damped)) <= 2e-6 * N
    B = kind(d, u, core if with_core else None)
    for C in (A, B):
        assert error(C.inverse_diagonal(1e-2), torch.linalg.inv(damped).diagonal()) <= 2e-6


def test_indefinite_operator_is_refused(backend: str) -> None:
    one = torch.ones(4, device=DEVICE)
    A = DiagonalMinusLowRank(one, one[:, None])
    # 1 + λ − 4 on the vector of ones
    with pytest.raises(torch.linalg.LinAlgError, match=r"damping is 1, .*; it is above 3$"):
        A.solve(one, 1.0)
    assert torch.allclose(A.solve(one, 4.0), one)
    assert torch.allclose(A.solve(one, 3.5), 2 * one, rtol=1e-5)
    # a diagonal that is not constant: the bound is enough
    d, u = torch.tensor([0.1, 2.0, 0.5, 1.0], device=DEVICE), torch.rand(4, 2, device=DEVICE) + 1
    B = DiagonalMinusLowRank(d, u)
    with pytest.raises(torch.linalg.LinAlgError) as failure:
        B.solve(one, 0.25)
    enough = float(str(failure.value).rpartition(" ")[2])
    assert (
        error(
            B @ B.solve(one, 1.01 * enough) + 1.01 * enough * B.solve(one, 1.01 * enough),
            one.double(),
        )
        <= 1e-4
    )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("T", [1, 7, 40])
def test_empirical(backend: str, T: int, scale: float | str) -> None:
    V = 60 if SLOW else 500
    z, w, x = logits(T, V, scale), weights(T), block(V, 200)
    y = torch.randint(V, (T,), generator=cases.generator(T)).to(DEVICE)
    y[::2] = z.argmax(-1)[::2]  # where the model is right
    F = fk.EmpiricalFisher(z, y, weights=w, temperature=TAU, precision="ieee")
    dense = cases.empirical_fisher(z, y, w, TAU)
    assert error(F.to_dense(), dense) <= 2e-6
    assert error(F @ x, dense @ x.double()) <= 2e-6
    eye = torch.eye(V, dtype=torch.float64, device=DEVICE)
    # against plain float32 Woodbury, whose Y / λ − U C cancels as ours does, with probabilities
    # that may be a unit in the last place off: it turns the range of U by its condition number
    g = (z / TAU).softmax(-1)
    g[torch.arange(T), y] -= 1
    U = (g * (w / w.sum()).sqrt()[:, None] / TAU).mT
    values = torch.linalg.svdvals(U[:, w > 0].double())
    turned = 2**-23 * (values[0] / values[values > 1e-7 * values[0]][-1]).item()
    for damping in (1e-1, 1e-4, 1e-6):
        damped = dense + damping * eye
        truth = torch.linalg.solve(damped, x.double())
        S = torch.eye(T, device=DEVICE) + U.mT @ U / damping
        plain = (x - U @ torch.linalg.solve(S, U.mT @ x) / damping) / damping
        assert error(F.solve(x, damping), truth) <= 2 * error(plain, truth) + turned
        inverse = torch.linalg.inv(damped).diagonal()
        plain = (1 - (U * torch.linalg.solve(S, U.mT).mT).sum(1) / damping) / damping
        assert error(F.inverse_diagonal(damping), inverse) <= 2 * error(plain, inverse) + turned


def test_gradients_of_certain_rows_keep_relative_accuracy(backend: str) -> None:
    """1 − p of the label is 1e-11: 1 − p in float32 would be zero."""
    z = torch.zeros(1, 8, device=DEVICE)
    z[0, 3] = 28.0
    y = torch.tensor([3], device=DEVICE)
    dense = cases.empirical_fisher(z, y, torch.ones(1, device=DEVICE))
    assert error(fk.EmpiricalFisher(z, y).to_dense(), dense) <= 1e-6


def test_tokens_without_a_label_do_not_count(backend: str) -> None:
    z, x = logits(9, 30, 2.0), block(30)
    y = torch.randint(30, (9,), generator=cases.generator(1)).to(DEVICE)
    kept = torch.arange(9, device=DEVICE) % 4 != 1
    expected = fk.EmpiricalFisher(z[kept], y[kept])
    z[~kept] = torch.nan
    unused = int(next(c for c in range(30) if c not in y[kept].tolist()))
    for ignored in (-100, unused):  # the latter is a class, too
        y[~kept] = ignored
        F = fk.EmpiricalFisher(z, y, ignore_index=ignored)
        again = fk.EmpiricalFisher.from_state_dict(F.state_dict())
        again.update(z[~kept], y[~kept])
        for operator in (F, again):
            assert operator.count == kept.sum()
            assert error(operator @ x, (expected @ x).double()) <= 1e-6
            assert error(operator.solve(x, 1e-3), expected.solve(x, 1e-3).double()) <= 1e-6


def test_empirical_batches_merges_and_state(backend: str) -> None:
    z, w, x = logits(12, 40, 2.0), weights(12), block(40)
    y = torch.randint(40, (12,), generator=cases.generator(2)).to(DEVICE)
    whole = fk.EmpiricalFisher(z, y, weights=w)
    split = fk.EmpiricalFisher(z[:5], y[:5], weights=w[:5])
    split.update(z[5:], y[5:], weights=w[5:])
    merged = fk.EmpiricalFisher.merge(
        [fk.EmpiricalFisher(z[a:b], y[a:b], weights=w[a:b]) for a, b in ((0, 3), (3, 12))]
    )
    again = fk.EmpiricalFisher.from_state_dict(split.state_dict())
    for other in (split, merged, again):
        assert error(other @ x, (whole @ x).double()) <= 1e-6
        assert error(other.solve(x, 1e-2), whole.solve(x, 1e-2).double()) <= 1e-6


def test_samples_of_an_empirical_fisher_have_it_as_second_moment() -> None:
    z, w = logits(4, 6, 1.0), torch.tensor([1.0, 0.0, 2.0, 0.5], device=DEVICE)
    y = torch.tensor([0, 1, -100, 5], device=DEVICE)
    F = fk.EmpiricalFisher(z, y, weights=w, temperature=1.3)
    g = F.sample(200_000, torch.Generator(DEVICE).manual_seed(0)).double()
    truth = cases.empirical_fisher(z[[0, 3]], y[[0, 3]], w[[0, 3]], 1.3)
    # 200 000 draws of numbers below 1: a standard error below 2e-3
    assert (g.mT @ g / len(g) - truth).abs().max() <= 8e-3
    total = fk.EmpiricalFisher(z, y, weights=w, temperature=1.3, reduction="sum")
    drawn = [x.sample(10, torch.Generator(DEVICE).manual_seed(0)) for x in (F, total)]
    assert torch.allclose(drawn[1], drawn[0] * F.count.sqrt())


def test_kronecker(backend: str) -> None:
    V, n = 40, 6
    F = fk.SoftmaxFisher(logits(9, V, 2.0))
    a = torch.randn(20, n, generator=cases.generator(0)).to(DEVICE)
    A = a.mT @ a / 20
    K, X = Kronecker(F, A), block(V, n)
    G = cases.softmax_fisher(logits(9, V, 2.0))
    assert K.shape == (V * n, V * n)
    assert error(K @ X, G @ X.double() @ A.double()) <= 2e-6
    pi = ((A.trace() / n) / (F.trace() / V)).sqrt().item()
    assert K.pi() == pytest.approx(pi, rel=1e-5)
    lam = 1e-2
    left = G + lam**0.5 / pi * torch.eye(V, dtype=torch.float64, device=DEVICE)
    right = A.double() + lam**0.5 * pi * torch.eye(n, dtype=torch.float64, device=DEVICE)
    truth = torch.linalg.solve(right, torch.linalg.solve(left, X.double()).mT).mT
    assert error(K.solve(X, lam), truth) <= 2e-6
    # against the explicit Kronecker product, without the split of the damping
    whole = torch.kron(left, right) @ K.solve(X, lam).double().flatten()
    assert error(whole, X.double().flatten()) <= 1e-5


def test_bad_input() -> None:
    d, u, core = (x.cpu() for x in parts(3))
    with pytest.raises(ValueError, match=r"factor has shape \[2, 3\]; expected \[\d+, r\]"):
        DiagonalPlusLowRank(d, u[:2])
    with pytest.raises(TypeError, match=r"factor has dtype torch\.float64; allowed are float32"):
        DiagonalPlusLowRank(d, u.double())
    with pytest.raises(TypeError, match="diagonal has dtype .*; allowed are float32, float64"):
        DiagonalPlusLowRank(d.bfloat16(), u)
    with pytest.raises(ValueError, match="diagonal holds -1; allowed are values >= 0"):
        DiagonalPlusLowRank(-torch.ones_like(d), u)
    with pytest.raises(ValueError, match=r"core has shape \[2, 3\]; expected \[r, r\]"):
        DiagonalPlusLowRank(d, u, core[:2])
    with pytest.raises(ValueError, match=r"core has shape \[2, 2\]; expected \[3, 3\]"):
        DiagonalPlusLowRank(d, u, core[:2, :2])
    with pytest.raises(ValueError, match="precision is 'half'"):
        DiagonalPlusLowRank(d, u, precision="half")
    with pytest.raises(ValueError, match="labels holds 9; allowed are 0 to 2"):
        fk.EmpiricalFisher(torch.zeros(2, 3), torch.tensor([0, 9]))
    K = Kronecker(torch.eye(2), torch.eye(3))
    with pytest.raises(ValueError, match=r"x has shape \[3, 2\]; expected \[2, 3\]"):
        K @ torch.ones(3, 2)
    with pytest.raises(ValueError, match="damping is 0"):
        K.solve(torch.ones(2, 3), 0)
    with pytest.raises(ValueError, match="left has shape .*; expected"):
        Kronecker(torch.ones(2, 3), torch.eye(3))
    indefinite = Kronecker(-torch.eye(2), torch.eye(3))
    with pytest.raises(torch.linalg.LinAlgError, match="has an eigenvalue of -1"):
        indefinite.solve(torch.ones(2, 3), 1e-2)
