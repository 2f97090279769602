"""HeadFisher against dense float64 algebra, and against SoftmaxFisher of the same logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fisherkern as fk
from conftest import DEVICE, SLOW
from fisherkern import reference
from fisherkern.operators import compress
from operators import cases
from operators.cases import block, error, softmax_fisher, weights

T, V, D = (9, 61, 5) if SLOW else (40, 300, 24)
TAU, DAMPING = 1.3, 1e-4


def head(scale: float = 2.0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias whose logits have about this standard deviation."""
    made = cases.generator(3)
    h = torch.randn(T, D, generator=made)
    W = torch.randn(V, D, generator=made) * scale / D**0.5
    b = torch.randn(V, generator=made)
    return tuple(x.to(dtype).to(DEVICE) for x in (h, W, b))  # type: ignore[return-value]


def truth(h: Tensor, W: Tensor, b: Tensor | None, softcap: float | None, w: Tensor) -> Tensor:
    z, _ = reference.head_logits(h, W, b, softcap)
    return softmax_fisher(z, w, TAU)


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("workspace", [20_000, None])
def test_products_and_solves(backend: str, workspace: int | None, softcap: float | None) -> None:
    (h, W, b), w, y = head(), weights(T), block(V)
    F = fk.HeadFisher(
        h, W, bias=b, softcap=softcap, weights=w, temperature=TAU, workspace=workspace
    )
    dense = truth(h, W, b, softcap, w)
    damped = dense + DAMPING * torch.eye(V, dtype=torch.float64, device=DEVICE)
    assert error(F @ y, dense @ y.double()) <= 2e-6
    assert error(F.solve(y, DAMPING), torch.linalg.solve(damped, y.double())) <= 2e-6
    assert error(F.diagonal(), dense.diagonal()) <= 1e-6
    assert error(F.trace(), dense.trace()) <= 1e-6
    assert error(F.to_dense(), dense) <= 2e-6
    assert error(F.quadratic(y), y.double().mT @ dense @ y.double()) <= 2e-6
    assert abs(F.logdet(DAMPING) - torch.logdet(damped)) <= 2e-6 * V
    inverse = torch.linalg.inv(damped).diagonal()
    assert error(F.inverse_diagonal(DAMPING), inverse) <= 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(backend: str, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and backend not in ("cpp", "reference"):
        pytest.skip(f"{backend} has no float64 kernels (that it says so is tested)")
    h, W, b = head(dtype=dtype)
    w = torch.ones(T, device=DEVICE)
    F, dense = fk.HeadFisher(h, W, bias=b, temperature=TAU), truth(h, W, b, None, w)
    x = block(V).to(F.dtype)
    assert error(F @ x, dense @ x.double()) <= (1e-13 if dtype == torch.float64 else 2e-6)


def test_is_the_operator_of_its_logits(backend: str) -> None:
    h, W, _ = head()
    y = block(V)
    F, G = fk.HeadFisher(h, W), fk.SoftmaxFisher(reference.head_logits(h, W)[0].float())
    assert F.shape == G.shape
    assert F.rank == G.rank
    assert error(F.solve(y, DAMPING), G.solve(y, DAMPING).double()) <= 2e-6
    values, _ = F.eigsh(3)
    assert error(values, G.eigsh(3)[0].double()) <= 2e-5


def test_largest_eigenvalues_without_the_matrix(backend: str) -> None:
    h, W, _ = head(scale=4.0)
    W = W.repeat(4, 1) if SLOW else W.repeat(3, 1)
    F = fk.HeadFisher(h, W, workspace=50_000)
    values, _ = F.eigsh(2)
    dense = softmax_fisher(reference.head_logits(h, W)[0])
    assert error(values, torch.linalg.eigvalsh(dense).flip(0)[:2]) <= 1e-5


def test_batches_merges_and_state_are_one_batch(backend: str) -> None:
    (h, W, b), w, y = head(), weights(T), block(V)
    how = {"bias": b, "softcap": 3.0, "temperature": TAU}
    whole = fk.HeadFisher(h, W, weights=w, **how) @ y
    first, rest = (h[:4].view(2, 2, D), w[:4].view(2, 2)), (h[4:], w[4:])
    grown = fk.HeadFisher(first[0], W, weights=first[1], **how)
    grown.update(rest[0], weights=rest[1])
    shards = [fk.HeadFisher(x, W.clone(), weights=v, **how) for x, v in (first, rest)]
    merged = fk.HeadFisher.merge(shards)
    again = fk.HeadFisher.from_state_dict(grown.state_dict())
    for F in (grown, merged, again):
        assert F.rank == T
        assert error(F @ y, whole.double()) <= 2e-6
        assert error(F.diagonal(), truth(h, W, b, 3.0, w).diagonal()) <= 1e-6
    assert torch.equal(again @ y, grown @ y)


def test_merging_another_head_is_an_error() -> None:
    h, W, b = head()
    F = fk.HeadFisher(h, W)
    for other in (
        fk.HeadFisher(h, 2 * W),
        fk.HeadFisher(h, W, bias=b),
        fk.HeadFisher(h, W, softcap=1.0),
        fk.HeadFisher(h, W, temperature=2.0),
    ):
        with pytest.raises(ValueError, match="shards holds .* they must be alike"):
            fk.HeadFisher.merge([F, other])


def test_a_bad_update_leaves_the_operator_as_it_was() -> None:
    h, W, _ = head()
    F, y = fk.HeadFisher(h, W), block(V)
    before = F @ y
    with pytest.raises(
        ValueError, match=r"hidden has shape \[\d+, \d+\]; expected \[\.\.\., \d+\]"
    ):
        F.update(h[:, :-1])
    with pytest.raises(TypeError, match="hidden has dtype .* that of the operator"):
        F.update(h.double())
    with pytest.raises(ValueError, match="mask"):
        F.update(h, mask=torch.ones(3, dtype=torch.bool))
    assert F.rank == T
    assert torch.equal(F @ y, before)


def test_state_that_lacks_something() -> None:
    state = fk.HeadFisher(*head()[:2]).state_dict()
    state.pop("weight")
    with pytest.raises(KeyError, match="state lacks weight"):
        fk.HeadFisher.from_state_dict(state)


def test_no_tokens(backend: str) -> None:
    h, W, _ = head()
    F, y = fk.HeadFisher(h[:0], W), block(V)
    assert (F @ y == 0).all()
    assert torch.allclose(F.solve(y, 0.5), y / 0.5)
    assert torch.equal(F.diagonal(), y.new_zeros(V))
    assert F.trace() == 0
    assert (F.eigsh(2)[0] == 0).all()
    F.update(h)
    assert error(F @ y, (fk.HeadFisher(h, W) @ y).double()) <= 1e-6


def test_masked_hidden_states_are_not_read(backend: str) -> None:
    h, W, _ = head()
    y, mask = block(V), torch.arange(T, device=DEVICE) % 3 > 0
    spoilt = torch.where(mask[:, None], h, torch.nan)
    F = fk.HeadFisher(spoilt, W, mask=mask)
    G = fk.HeadFisher(h[mask], W)
    for a, b in ((F @ y, G @ y), (F.solve(y, 0.1), G.solve(y, 0.1)), (F.diagonal(), G.diagonal())):
        assert error(a, b.double()) <= 2e-6


def test_gradients_of_samples_have_the_operator_as_second_moment(backend: str) -> None:
    h, W, _ = head(scale=1.0)
    W = W[:6]
    count = 200 if SLOW else 20_000
    F = fk.HeadFisher(h, W, workspace=2000)
    g = F.sample(count, torch.Generator(device=DEVICE).manual_seed(0)).double()
    assert g.shape == (count, 6)
    assert (g.mT @ g / count - F.to_dense()).abs().max() < 3 / count**0.5 * 0.5


def test_compressed(backend: str) -> None:
    h, W, _ = head()
    F = fk.HeadFisher(h, W, workspace=20_000)
    small, bound = compress(F, T // 2)
    G, _ = compress(fk.SoftmaxFisher(reference.head_logits(h, W)[0].float()), T // 2)
    difference = torch.linalg.eigvalsh((small.to_dense() - F.to_dense()).double())
    assert difference.min() >= -1e-6
    assert difference.max() <= bound + 1e-6
    assert error(small.to_dense(), G.to_dense().double()) <= 1e-4
