"""Solves beyond the memory of the Woodbury identity: conjugate gradients, and compression."""

from __future__ import annotations

import pytest
import torch

import fisherkern as fk
from conftest import SLOW
from fisherkern.operators import DiagonalMinusLowRank, DiagonalPlusLowRank, compress
from fisherkern.operators._base import LowRankOperator
from operators.cases import SCALES, block, empirical_fisher, error, logits, softmax_fisher, weights

T, V = (12, 50) if SLOW else (64, 400)
# Iterations are many launches: where each costs milliseconds, fewer of them say as much of kernels.
DAMPINGS = [1e-1] if SLOW else [1e-1, 1e-3, 1e-5]
DAMPING = 1e-1 if SLOW else 1e-3


def damped(dense: torch.Tensor, damping: float) -> torch.Tensor:
    return dense + damping * torch.eye(len(dense), dtype=dense.dtype, device=dense.device)


def test_the_operator_says_which_path() -> None:
    z = logits(64, 100, 1.0)
    assert fk.SoftmaxFisher(z).path == "woodbury"
    assert fk.SoftmaxFisher(z, memory=20 * 64**2).path == "woodbury"
    F = fk.SoftmaxFisher(z, memory=20 * 64**2 - 1)
    assert F.path == "conjugate gradients"
    assert "path='conjugate gradients'" in repr(F)
    with pytest.raises(ValueError, match=r"memory is 81919, and a determinant takes 81920 bytes"):
        F.logdet(1e-3)
    with pytest.raises(ValueError, match="the diagonal of the inverse takes"):
        F.inverse_diagonal(1e-3)
    with pytest.raises(ValueError, match="memory is 0; allowed are numbers of bytes >= 1"):
        fk.SoftmaxFisher(z, memory=0)
    with pytest.raises(TypeError, match="memory has type float"):
        fk.SoftmaxFisher(z, memory=1e9)


def check_solution(
    operator: LowRankOperator,
    dense: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    damping: float,
    tolerance: float,
) -> None:
    """What `tolerance` promises of an x that conjugate gradients found, in any order of sums.

    The residual that they carry along is within the tolerance. That of x differs from it by what
    products in float32 round off D x and U c, however little these leave of each other:
    2⁻²³ (‖D‖ + λ) ‖x‖, where ‖x‖ ≤ ‖y‖ / λ. The error is the residual over the least eigenvalue.
    """
    eigenvalues = torch.linalg.eigvalsh(dense)
    # of an operator without D it is ‖A‖
    largest = max(operator._diagonal_part.max().item() + damping, eigenvalues[-1].item())
    rounding = 2**-23 * largest / damping
    truth = torch.linalg.solve(dense, y.double())
    growth = (y.norm() / (eigenvalues[0] * truth.norm())).item()
    assert error(x, truth) <= tolerance * growth + rounding
    # whose product rounds as well
    assert operator.residual(x, y, damping) <= tolerance + 2 * rounding


@pytest.mark.parametrize("scale", SCALES[1::2] if SLOW else SCALES)
@pytest.mark.parametrize("damping", DAMPINGS)
def test_conjugate_gradients(backend: str, scale: float | str, damping: float) -> None:
    z, w, y = logits(T, V, scale), weights(T), block(V)
    F = fk.SoftmaxFisher(z, weights=w, memory=20 * T * T - 1)
    assert F.path == "conjugate gradients"
    dense = damped(softmax_fisher(z, w), damping)
    check_solution(F, dense, y, F.solve(y, damping, tolerance=1e-6), damping, 1e-6)
    x = F.solve(y[:, 1], damping, tolerance=1e-6)
    check_solution(F, dense, y[:, 1], x, damping, 1e-6)


@pytest.mark.parametrize("damping", DAMPINGS)
def test_conjugate_gradients_of_an_empirical_fisher(backend: str, damping: float) -> None:
    z, w, y = logits(T, V, 2.0), weights(T), block(V)
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(1)).to(z.device)
    E = fk.EmpiricalFisher(z, labels, weights=w, memory=20 * T * T - 1)
    dense = damped(empirical_fisher(z, labels, w), damping)
    check_solution(E, dense, y, E.solve(y, damping, tolerance=1e-6), damping, 1e-6)


def test_refinement_makes_up_for_a_factorisation_of_low_precision(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    z, y, damping = logits(T, V, 2.0), block(V), 1e-3
    F = fk.SoftmaxFisher(z)
    dense = damped(softmax_fisher(z), damping)
    truth = torch.linalg.solve(dense, y.double())
    whole = type(F)._capacitance
    monkeypatch.setattr(
        type(F),
        "_capacitance",
        lambda self, gram, sums, damping: whole(self, gram.bfloat16().float(), sums, damping),
    )
    assert error(F.solve(y, damping), truth) > 5e-6
    x = F.solve(y, damping, refine=True, tolerance=1e-6)
    assert error(x, truth) <= 2e-6
    assert F.residual(x, y, damping) <= 2e-6


def test_few_iterations_are_an_error_and_nan_stays(backend: str) -> None:
    F = fk.SoftmaxFisher(logits(T, V, 2.0), memory=1)
    y = block(V)
    with pytest.raises(torch.linalg.LinAlgError, match=r"iterations is 2, .*tolerance is 1e-06"):
        F.solve(y, 1e-5, tolerance=1e-6, iterations=2)
    # nor is anything written, though the first column converges at once
    mixed = y.clone()
    mixed[:, 0] = 0
    before = mixed.clone()
    with pytest.raises(torch.linalg.LinAlgError):
        F.solve(mixed, 1e-5, out=mixed, tolerance=1e-6, iterations=2)
    assert torch.equal(mixed, before)
    expected = F.solve(y, DAMPING)
    assert F.solve(mixed.copy_(y), DAMPING, out=mixed) is mixed
    assert torch.equal(mixed, expected)
    y[3, 1] = torch.nan
    x = F.solve(y, DAMPING)
    assert bool(x[:, 1].isnan().all())
    assert bool(x[:, 0].isfinite().all())


def test_zero_columns_and_right_hand_sides(backend: str) -> None:
    F = fk.SoftmaxFisher(logits(T, V, 2.0), memory=1)
    assert bool((F.solve(torch.zeros_like(block(V)), DAMPING) == 0).all())
    assert F.solve(block(V)[:, :0], DAMPING).shape == (V, 0)
    # beside others, which take more iterations
    y = block(V)
    y[:, 1] = 0
    G = fk.SoftmaxFisher(logits(T, V, 2.0))
    for x in (F.solve(y, DAMPING), G.solve(y, DAMPING, refine=True)):
        assert bool((x[:, 1] == 0).all())
        assert bool(x.isfinite().all())


def test_a_column_that_is_solved_at_once_stays(backend: str) -> None:
    z = logits(T, V, 2.0)
    z[:, -1] = -torch.inf
    y = block(V)
    y[:, 0] = 0
    y[-1, 0] = 1
    x = fk.SoftmaxFisher(z, memory=1).solve(y, DAMPING)
    assert bool(x.isfinite().all())
    assert x[-1, 0].item() == pytest.approx(1 / DAMPING, rel=1e-5)


def test_compressed_batches_without_tokens(backend: str) -> None:
    z = logits(T, V, 2.0)
    F = fk.SoftmaxFisher(z[:0])
    assert bool((compress(F, 3).operator @ block(V) == 0).all())
    F.update(z)
    F.update(z[:0])
    x = compress(F, T).operator @ block(V)
    assert error(x, (fk.SoftmaxFisher(z) @ block(V)).double()) <= 1e-5


@pytest.mark.parametrize("rank", [1, 7, 30, 500])
@pytest.mark.parametrize("kind", ["softmax", "empirical"])
def test_compressed_within_its_bound(backend: str, kind: str, rank: int) -> None:
    z, w = logits(2 * T, V, 3.0), weights(2 * T)
    labels = torch.randint(V, (2 * T,), generator=torch.Generator().manual_seed(1)).to(z.device)
    if kind == "softmax":
        operator, dense = fk.SoftmaxFisher(z, weights=w), softmax_fisher(z, w)
    else:
        operator = fk.EmpiricalFisher(z, labels, weights=w)
        dense = empirical_fisher(z, labels, w)
    small, bound = compress(operator, rank)
    assert type(small) is (DiagonalMinusLowRank if kind == "softmax" else DiagonalPlusLowRank)
    assert small.rank == min(rank, V)
    # U Uᵀ is above B Bᵀ, by the bound at most; rounding is relative to the largest eigenvalue
    missing = torch.linalg.eigvalsh((small.to_dense() - dense) * -operator._sign)
    rounding = 1e-6 * torch.linalg.eigvalsh(dense)[-1].item()
    assert missing[0] >= -rounding
    assert missing[-1] <= bound + rounding
    if rank >= 2 * T:
        assert bound <= rounding


def test_compressed_solves_are_near(backend: str) -> None:
    z, y, damping = logits(T, V, 2.0), block(V), 1e-2
    F = fk.SoftmaxFisher(z)
    small, bound = compress(F, T // 2)
    x, near = F.solve(y, damping), small.solve(y, damping)
    assert (near - x).norm() <= (bound / damping + 1e-5) * x.norm()


def test_compress_bad_input() -> None:
    F = fk.SoftmaxFisher(logits(4, 20, 1.0))
    with pytest.raises(ValueError, match="rank is 0; allowed are integers >= 1"):
        compress(F, 0)
    with pytest.raises(TypeError, match="rank has type float"):
        compress(F, 2.0)
    with pytest.raises(TypeError, match="operator has type int"):
        compress(3, 2)
