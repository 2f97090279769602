"""SoftmaxFisher against dense float64 algebra, and what holds of it without a truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fisherkern as fk
from conftest import DEVICE, SLOW
from fisherkern.operators import DiagonalPlusLowRank, Kronecker, compress
from fisherkern.operators._base import LowRankOperator
from operators import cases
from operators.cases import SCALES, block, error, logits, softmax_fisher, weights

TOKENS = (1, 20) if SLOW else (1, 7, 64, 300)
CLASSES = (7, 90) if SLOW else (7, 300, 2000)
# relative error of a float32 solve, by damping
SOLVED = {1e-1: 1e-6, 1e-2: 1e-6, 1e-4: 1e-6, 1e-6: 2e-6, 1e-8: 1e-4}
TAU = 1.3


def operator(z: Tensor, w: Tensor, **options) -> fk.SoftmaxFisher:
    return fk.SoftmaxFisher(z, weights=w, temperature=TAU, **options)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("V", CLASSES)
@pytest.mark.parametrize("T", TOKENS)
def test_solve(backend: str, T: int, V: int, scale: float | str) -> None:
    z, w, y = logits(T, V, scale), weights(T), block(V)
    F, dense = operator(z, w), softmax_fisher(z, w, TAU)
    eye = torch.eye(V, dtype=torch.float64, device=DEVICE)
    for damping, allowed in SOLVED.items():
        truth = torch.linalg.solve(dense + damping * eye, y.double())
        assert error(F.solve(y, damping), truth) <= allowed, damping


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("T", TOKENS)
def test_determinant_and_diagonals(backend: str, T: int, scale: float | str) -> None:
    V = 130 if SLOW else 400
    z, w = logits(T, V, scale), weights(T)
    F, dense = operator(z, w), softmax_fisher(z, w, TAU)
    eye = torch.eye(V, dtype=torch.float64, device=DEVICE)
    if scale != "one-hot":
        assert error(F.diagonal(), dense.diagonal()) <= 1e-6
        assert error(F.trace(), dense.trace()) <= 1e-6
        assert error(F.to_dense(), dense) <= 2e-6
    for damping, allowed in SOLVED.items():
        damped = dense + damping * eye
        # every eigenvalue has a relative error: that of their logarithms adds up
        assert abs(F.logdet(damping) - torch.logdet(damped)) <= 2e-6 * V
        truth = torch.linalg.inv(damped).diagonal()
        assert error(F.inverse_diagonal(damping), truth) <= allowed


@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
@pytest.mark.parametrize(("V", "k"), [(7, 7), (90, 3)] if SLOW else [(7, 7), (300, 5), (900, 1)])
def test_largest_eigenvalues(backend: str, V: int, k: int, scale: float) -> None:
    z = logits(30, V, scale)
    values, vectors = fk.SoftmaxFisher(z).eigsh(k)
    dense = softmax_fisher(z)
    truth = torch.linalg.eigvalsh(dense).flip(0)[:k]
    # the error of an eigenvalue is at most the residual of its vector
    assert (values.double() - truth).abs().max() <= 1e-5 * truth[0]
    gram = vectors.mT.double() @ vectors.double()
    assert (gram - torch.eye(k, device=DEVICE)).abs().max() <= 1e-5
    residual = dense @ vectors.double() - vectors.double() * values.double()
    assert residual.norm(dim=0).max() <= 2e-5 * truth[0]


def test_eigenvalues_that_are_out_of_reach() -> None:
    F = fk.SoftmaxFisher(logits(30, 400, 2.0))
    with pytest.raises(torch.linalg.LinAlgError, match=r"rounds is 1, .* tolerance is 1e-12"):
        F.eigsh(5, tolerance=1e-12, rounds=1)
    for count in (0, 401):
        with pytest.raises(ValueError, match=f"count is {count}; allowed are 1 to 400"):
            F.eigsh(count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and backend not in ("cpp", "reference"):
        pytest.skip(f"{backend} has no float64 kernels (that it says so is tested)")
    z = logits(9, 50, 3.0, dtype)
    F, dense = fk.SoftmaxFisher(z), softmax_fisher(z)
    x = block(50).to(F.dtype)
    damped = dense + 1e-3 * torch.eye(50, dtype=torch.float64, device=DEVICE)
    allowed = 1e-13 if dtype == torch.float64 else 1e-6
    assert error(F @ x, dense @ x.double()) <= allowed
    assert error(F.solve(x, 1e-3), torch.linalg.solve(damped, x.double())) <= allowed


@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
@pytest.mark.parametrize("T", TOKENS)
def test_products(backend: str, T: int, scale: float) -> None:
    V = CLASSES[-1]
    z, w, x = logits(T, V, scale), weights(T), block(V)
    F, dense = operator(z, w), softmax_fisher(z, w, TAU)
    truth = dense @ x.double()
    assert error(F @ x, truth) <= 2e-6
    assert error(F @ x[:, 0], truth[:, 0]) <= 2e-6
    form = x.double().mT @ truth
    assert error(F.quadratic(x), form) <= 2e-6
    assert error(F.quadratic(x[:, 1]), form[1, 1]) <= 2e-6


def test_small_workspace_is_the_same_operator(backend: str) -> None:
    V = 300
    z, w, x = logits(20, V, 3.0), weights(20), block(V)
    whole, small = operator(z, w), operator(z, w, workspace=1)
    assert error(small @ x, (whole @ x).double()) <= 1e-6
    assert error(small.solve(x, 1e-4), whole.solve(x, 1e-4).double()) <= 1e-6
    assert error(small.inverse_diagonal(1e-4), whole.inverse_diagonal(1e-4).double()) <= 1e-6


def test_solve_undoes_the_product(backend: str) -> None:
    V = 200
    F, x = operator(logits(30, V, 2.0), weights(30)), block(V)
    for damping in (1e-1, 1e-3):
        y = F @ x + damping * x
        assert error(F.solve(y, damping), x.double()) <= 2e-5
        assert F.residual(F.solve(x, damping), x, damping) <= 1e-5


def test_symmetric_positive_and_null_on_constants(backend: str) -> None:
    V = 100
    F, x = operator(logits(20, V, 2.0), weights(20)), block(V, 2)
    a, b = x[:, 0], x[:, 1]
    assert torch.isclose(torch.dot(a, F @ b), torch.dot(b, F @ a), rtol=1e-4, atol=1e-7)
    assert F.quadratic(a) > 0
    assert (F @ torch.ones(V, device=DEVICE)).abs().max() <= 1e-8
    # and so (F + λ)⁻¹ 1 = 1 / λ
    ones = torch.ones(V, device=DEVICE)
    assert error(F.solve(ones, 1e-6), ones.double() / 1e-6) <= 1e-6
    least = torch.linalg.eigvalsh(F.solve(torch.eye(V, device=DEVICE), 1e-3).double())[0]
    assert least > 0


def test_shifts_of_the_logits_change_nothing(backend: str) -> None:
    z, w, y = logits(12, 80, 2.0), weights(12), block(80)
    # a power of two: the shifted logits have the same bits after the subtraction
    shifted = (z.double() + 4.0).float()
    a, b = operator(z, w).solve(y, 1e-4), operator(shifted, w).solve(y, 1e-4)
    assert error(b, a.double()) <= 1e-5


def test_batches_and_merges_are_one_batch(backend: str) -> None:
    z, w, y = logits(31, 90, 2.0), weights(31), block(90)
    whole = operator(z, w)
    split = operator(z[:10], w[:10])
    split.update(z[10:17], weights=w[10:17])
    split.update(z[17:], weights=w[17:])
    merged = fk.SoftmaxFisher.merge([operator(z[:8], w[:8]), operator(z[8:], w[8:])])
    for other in (split, merged):
        assert other.rank == 31
        assert error(other @ y, (whole @ y).double()) <= 1e-6
        assert error(other.solve(y, 1e-5), whole.solve(y, 1e-5).double()) <= 1e-6
        assert abs(other.logdet(1e-5) - whole.logdet(1e-5)) <= 1e-4


def test_merge_leaves_its_shards_alone(backend: str) -> None:
    a, b = operator(logits(3, 9, 1.0), weights(3)), operator(logits(4, 9, 1.0), weights(4))
    before = a @ block(9)
    fk.SoftmaxFisher.merge([a, b])
    assert a.rank == 3
    assert torch.equal(a @ block(9), before)


def test_update_forgets_the_factorisation(backend: str) -> None:
    z, w, y = logits(20, 60, 2.0), weights(20), block(60)
    F = operator(z[:10], w[:10])
    F.solve(y, 1e-4)
    F.update(z[10:], weights=w[10:])
    assert torch.equal(F.solve(y, 1e-4), operator_of(z, w).solve(y, 1e-4))


def operator_of(z: Tensor, w: Tensor) -> fk.SoftmaxFisher:
    made = operator(z[:10], w[:10])
    made.update(z[10:], weights=w[10:])
    return made


def test_masked_tokens_may_hold_anything(backend: str) -> None:
    z, y = logits(12, 70, 2.0), block(70)
    mask = torch.arange(12, device=DEVICE) % 3 != 0
    expected = fk.SoftmaxFisher(z[mask])
    z[~mask] = torch.nan
    F = fk.SoftmaxFisher(z, mask=mask)
    assert error(F @ y, (expected @ y).double()) <= 1e-6
    assert error(F.solve(y, 1e-5), expected.solve(y, 1e-5).double()) <= 1e-6
    assert error(F.inverse_diagonal(1e-5), expected.inverse_diagonal(1e-5).double()) <= 1e-6


def test_no_token_at_all(backend: str) -> None:
    z, y = logits(4, 30, 1.0), block(30)
    nothing = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    for F in (fk.SoftmaxFisher(z, mask=nothing), fk.SoftmaxFisher(z[:0])):
        assert bool((F @ y == 0).all())
        assert torch.allclose(F.solve(y, 0.5), 2 * y)
        assert torch.allclose(F.inverse_diagonal(0.5), torch.full((30,), 2.0, device=DEVICE))


def test_nan_of_a_row_that_counts_is_never_lost(backend: str) -> None:
    z = logits(5, 20, 1.0)
    z[2, 3] = torch.nan
    F = fk.SoftmaxFisher(z)
    assert bool((F @ block(20)).isnan().all())
    assert bool(F.solve(block(20), 1e-3).isnan().all())
    values, vectors = F.eigsh(2)
    assert values.shape == (2,)
    assert vectors.shape == (20, 2)
    assert bool(values.isnan().all())
    assert bool(vectors.isnan().all())


def test_autocast_rounds_nothing(backend: str) -> None:
    T = 3 if SLOW else 9  # as many iterations have conjugate gradients
    z, y = logits(T, 40, 2.0), block(40)
    U, d = logits(40, 3, 1.0), torch.rand(40, generator=cases.generator(1)).to(DEVICE) + 1
    core, A = 2 * torch.eye(3, device=DEVICE), torch.eye(5, device=DEVICE) * 1.2345

    def everything() -> list[torch.Tensor]:
        F, D = operator(z, weights(T)), DiagonalPlusLowRank(d, U, core)
        K, small = Kronecker(D, A), fk.SoftmaxFisher(z, memory=1)
        verbs = [f(x) for x in (F, D) for f in (lambda x: x.inverse_diagonal(1e-2), to_dense)]
        products = [F @ y, D @ y, K @ y, F.quadratic(y), compress(F, 2).operator @ y]
        solved = [x.solve(y, 1e-2) for x in (F, D, K, small)]
        return [*verbs, *products, *solved, F.eigsh(2)[0], F.logdet(1e-2)]

    def to_dense(x: LowRankOperator) -> torch.Tensor:
        return x.to_dense()

    expected = everything()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = everything()
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_minus_infinity_is_a_class_of_probability_zero(backend: str) -> None:
    z, y = logits(6, 40, 2.0), block(40)
    z[:, 30:] = -torch.inf
    F, part = fk.SoftmaxFisher(z), fk.SoftmaxFisher(z[:, :30])
    solved = F.solve(y, 1e-3)
    assert error(solved[:30], part.solve(y[:30], 1e-3).double()) <= 1e-6
    assert torch.allclose(solved[30:], y[30:] / 1e-3)


def test_sum_is_the_mean_times_its_count(backend: str) -> None:
    z, w, x = logits(9, 25, 2.0), weights(9), block(25)
    mean, total = operator(z, w), operator(z, w, reduction="sum")
    N = w.sum().item()
    assert error(total @ x, N * (mean @ x).double()) <= 1e-6
    assert error(total.solve(x, 1e-3 * N), mean.solve(x, 1e-3).double() / N) <= 1e-6


def test_logsumexp_that_is_at_hand(backend: str) -> None:
    z, x = logits(9, 60, 2.0), block(60)
    given = fk.SoftmaxFisher(z, logsumexp=torch.logsumexp(z, -1))
    assert error(given @ x, (fk.SoftmaxFisher(z) @ x).double()) <= 1e-5


def test_same_bits_on_every_run(backend: str) -> None:
    z, w, y = logits(33, 210, 3.0), weights(33), block(210)
    first, again = (operator(z, w) for _ in range(2))
    assert torch.equal(first.solve(y, 1e-5), again.solve(y, 1e-5))
    assert torch.equal(first @ y, again @ y)


def test_samples_have_the_operator_as_second_moment() -> None:
    z, w = logits(4, 6, 1.0), torch.tensor([1.0, 0.0, 2.0, 0.5])
    F = fk.SoftmaxFisher(z, weights=w, temperature=TAU)
    g = F.sample(200_000, cases.generator(0)).double()
    moment = g.mT @ g / len(g)
    # 200 000 draws of numbers below 1: a standard error below 2e-3
    assert (moment - softmax_fisher(z, w, TAU)).abs().max() <= 8e-3
    total = fk.SoftmaxFisher(z, weights=w, temperature=TAU, reduction="sum")
    scaled = total.sample(10, cases.generator(0))
    plain = F.sample(10, cases.generator(0))
    assert torch.allclose(scaled, plain * w.sum().sqrt())
    assert F.sample(0).shape == (0, 6)


def test_state() -> None:
    z, w = logits(8, 20, 2.0), weights(8)
    F = operator(z[:5], w[:5])
    F.update(z[5:])
    again = fk.SoftmaxFisher.from_state_dict(F.state_dict())
    assert repr(again) == repr(F)
    assert torch.equal(again.solve(block(20), 1e-3), F.solve(block(20), 1e-3))
    low = fk.SoftmaxFisher(z, precision="tf32").state_dict()
    assert low["precision"] == "tf32"
    for kind, other in (
        (fk.SoftmaxFisher, low),
        (fk.EmpiricalFisher, fk.EmpiricalFisher(z, z.argmax(-1), precision="tf32").state_dict()),
        (fk.HeadFisher, fk.HeadFisher(z, torch.eye(20, device=DEVICE)).state_dict()),
    ):
        little = kind.from_state_dict(other, memory=1, workspace=1000)
        assert little.path == "conjugate gradients"
        assert little.state_dict()["precision"] == other["precision"]
    state = F.state_dict()
    del state["weights"]
    with pytest.raises(KeyError, match="weights"):
        fk.SoftmaxFisher.from_state_dict(state)


def test_bad_input() -> None:
    F = fk.SoftmaxFisher(logits(4, 20, 1.0))
    for damping in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="damping is"):
            F.solve(block(20), damping)
    with pytest.raises(ValueError, match=r"y has shape \[19, 5\]; expected \[20\] or \[20, k\]"):
        F.solve(block(20)[:19], 1e-3)
    with pytest.raises(TypeError, match=r"x has dtype torch\.float64; expected torch\.float32"):
        F @ block(20).double()
    with pytest.raises(ValueError, match="max_bytes is 100"):
        F.to_dense(max_bytes=100)
    with pytest.raises(ValueError, match="no classes"):
        fk.SoftmaxFisher(torch.zeros(3, 0))
    with pytest.raises(ValueError, match=r"logits has shape \[2, 19\].*20 classes"):
        F.update(logits(2, 19, 1.0))
    with pytest.raises(ValueError, match="shards is empty"):
        fk.SoftmaxFisher.merge([])
    with pytest.raises(ValueError, match="must be alike"):
        fk.SoftmaxFisher.merge([F, fk.SoftmaxFisher(logits(4, 20, 1.0), temperature=2.0)])
    with pytest.raises(TypeError, match="shards holds a HeadFisher; expected SoftmaxFisher"):
        fk.SoftmaxFisher.merge([F, fk.HeadFisher(logits(4, 20, 1.0), torch.eye(20))])
    with pytest.raises(TypeError, match="shards holds a str"):
        fk.SoftmaxFisher.merge(["F"])
    with pytest.raises(ValueError, match=r"x has shape \[20, 1\]; expected that of y, \[20\]"):
        F.residual(torch.zeros(20, 1), torch.ones(20), 1e-3)
    with pytest.raises(ValueError, match="damping is -1"):
        F.residual(torch.zeros(20), torch.ones(20), -1.0)
    with pytest.raises(ValueError, match="rounds is 0; allowed are ints >= 1"):
        F.eigsh(2, rounds=0)
    with pytest.raises(ValueError, match="workspace is .*; allowed are ints of 64 bits"):
        fk.SoftmaxFisher(logits(4, 20, 1.0), workspace=2**63)
    with pytest.raises(ValueError, match="no token"):
        fk.SoftmaxFisher(logits(4, 20, 1.0)[:0]).sample(1)
    before = F @ block(20)
    with pytest.raises(ValueError, match="mask and weights"):
        F.update(logits(2, 20, 1.0), mask=torch.ones(2).bool(), weights=torch.ones(2))
    assert torch.equal(F @ block(20), before)


def test_solve_into_a_destination(backend: str) -> None:
    V = 200
    F, y = operator(logits(30, V, 2.0), weights(30)), block(V)
    expected = F.solve(y, 1e-3)
    out = torch.empty_like(y)
    assert F.solve(y, 1e-3, out=out) is out
    assert torch.equal(out, expected)
    # a destination with gaps, and y itself
    wide = torch.zeros(V, 9, device=y.device)
    F.solve(y, 1e-3, out=wide[:, 2:7])
    assert torch.equal(wide[:, 2:7], expected)
    assert bool((wide[:, :2] == 0).all())
    assert bool((wide[:, 7:] == 0).all())
    column, expected_column = y[:, 1].clone(), F.solve(y[:, 1], 1e-3)
    F.solve(column, 1e-3, out=column)
    assert torch.equal(column, expected_column)
    assert F.solve(y, 1e-3, out=y) is y
    assert torch.equal(y, expected)
    with pytest.raises(ValueError, match=r"out has shape \[200, 4\]; expected that of y"):
        F.solve(y, 1e-3, out=y[:, :4])
    with pytest.raises(ValueError, match="out overlaps y in memory"):
        F.solve(wide[:, :5], 1e-3, out=wide[:, 1:6])
    with pytest.raises(TypeError, match=r"out has dtype torch\.float64"):
        F.solve(y, 1e-3, out=y.double())
