"""The scaling contract: masks, weights, reductions, splits, shifts, temperature; for every op."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fisherkern as fk
from conftest import DEVICE, SLOW
from head_fisher import cases
from head_fisher.cases import IDS, MEANS, OPS, PER_TOKEN, PLACELESS, SUMS, Inputs, Op, close

V, d = (40, 9) if SLOW else (257, 33)
GRAMS = [op for op in OPS if op.kind == "gram"]
OVER_TOKENS = [op for op in OPS if op.kind != "token"]
SOFTCAPS = cases.softcaps(4.0)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
SPOILS = pytest.mark.parametrize("value", [torch.nan] if SLOW else [torch.nan, torch.inf])


def setting(dtype: torch.dtype = torch.float32, T: int = 6, **head: Any) -> Inputs:
    return cases.make(T, V, d, dtype, seed=T, **head)


def some(values: list[float]) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def six_weights() -> Tensor:
    return some([0.3, 4.1, 1.0, 12.0, 0.0, 0.06])


def six_masked() -> Tensor:
    return some([1, 0, 1, 1, 0, 1]).bool()


@pytest.mark.parametrize("op", GRAMS, **IDS)
def test_masked_rows_are_zero_beside_a_nan_that_counts(backend: str, op: Op) -> None:
    mask = six_masked()
    gram = op.call(poisoned(setting(), 0), mask=mask)
    counts = mask[:, None] & mask
    assert gram[counts].isnan().all()
    assert (gram[~counts] == 0).all()


def poisoned(x: Inputs, index: Any, value: float = torch.nan) -> Inputs:
    """These tokens hold what no result may show."""
    hidden, u = x.hidden.clone(), x.u.clone()
    hidden[index] = u[index] = value
    return x.replace(hidden=hidden, u=u)


@SOFTCAPS
@SPOILS
@DTYPES
@pytest.mark.parametrize("op", PER_TOKEN, **IDS)
def test_masked_token_is_exactly_zero_and_disturbs_no_other(
    backend: str, op: Op, dtype: torch.dtype, value: float, softcap: float | None
) -> None:
    x, mask = setting(dtype, softcap=softcap), six_masked()
    masked = cases.tensors(op.call(poisoned(x, ~mask, value), mask=mask))
    for a, b in zip(masked, cases.tensors(op.call(x)), strict=True):
        assert torch.equal(a[mask], b[mask])
        assert (a[~mask] == (0 if a.is_floating_point() else -100)).all()


@SOFTCAPS
@SPOILS
@DTYPES
@pytest.mark.parametrize("op", OVER_TOKENS, **IDS)
def test_masked_tokens_leave_what_is_over_tokens(
    backend: str, op: Op, dtype: torch.dtype, value: float, softcap: float | None
) -> None:
    x, mask = setting(dtype, softcap=softcap), six_masked()
    masked, expected = op.call(poisoned(x, ~mask, value), mask=mask), op.call(x.tokens(mask))
    if op.kind == "gram":
        assert (masked[~mask] == 0).all()
        assert (masked[:, ~mask] == 0).all()
        masked = masked[mask][:, mask]
    close(masked, expected)


@pytest.mark.parametrize("op", OPS, **IDS)
def test_masked_token_beside_a_large_bias(backend: str, op: Op) -> None:
    """A masked row is that of h = 0: its logits are the bias, whose exponential overflows here."""
    x, mask = setting(), six_masked()
    x.bias[3] = 200.0
    # so that the class is out of reach of the tokens that count
    x.hidden[mask] -= 300 * x.weight[3] / x.weight[3].square().sum()
    results = cases.tensors(op.call(poisoned(x, ~mask), mask=mask))
    # the rounding of logits of a few hundred
    slack = 2 * (x.hidden[mask] @ x.weight.mT).abs().max().item()
    places = op.call(x) if op.short == "sample" else op.call(x.tokens(mask))
    for a, b in zip(results, cases.tensors(places), strict=True):
        if op.kind == "token":
            assert (a[~mask] == (0 if a.is_floating_point() else -100)).all()
            close(a[mask], b[mask] if op.short == "sample" else b, slack)
        else:
            close(a[mask][:, mask] if op.kind == "gram" else a, b, slack)


@pytest.mark.parametrize("op", OPS, **IDS)
def test_mask_is_weights_of_zero_and_one(backend: str, op: Op) -> None:
    mask = six_masked()
    x = poisoned(setting(), ~mask)
    cases.equal(op.call(x, mask=mask), op.call(x, weights=mask.float()))
    cases.equal(op.call(x, mask=mask), op.call(x, weights=mask.double()))


@pytest.mark.parametrize("op", OPS, **IDS)
def test_weights_of_one_are_none(backend: str, op: Op) -> None:
    x = setting()
    close(op.call(x, weights=torch.ones(6, device=DEVICE)), op.call(x))


@SOFTCAPS
@DTYPES
@pytest.mark.parametrize("op", PER_TOKEN, **IDS)
def test_weight_multiplies_the_token(
    backend: str, op: Op, dtype: torch.dtype, softcap: float | None
) -> None:
    x, w = setting(dtype, softcap=softcap), some([0.25, 4.0, 1.0, 16.0, 0.0, 0.0625])
    weighted, once = cases.tensors(op.call(x, weights=w)), cases.tensors(op.call(x))
    for a, b in zip(weighted, once, strict=True):
        if a.is_floating_point():
            # powers of two: nothing is rounded
            close(a, (b.float() * w.view(-1, *(1,) * (b.ndim - 1))).to(b.dtype), slack=1)
        else:
            assert torch.equal(a[w > 0], b[w > 0])


@pytest.mark.parametrize("op", SUMS, **IDS)
def test_doubled_weights_double_the_sum(backend: str, op: Op) -> None:
    x, w = setting(), six_weights()
    once, twice = (cases.tensors(op.call(x, weights=k * w)) for k in (1, 2))
    close(twice, tuple(2 * y for y in once))


@pytest.mark.parametrize("op", MEANS, **IDS)
def test_mean_is_scale_free_in_the_weights(backend: str, op: Op) -> None:
    x, w = setting(), six_weights()
    close(op.call(x, weights=1024 * w), op.call(x, weights=w))


@pytest.mark.parametrize("op", MEANS, **IDS)
def test_mean_is_the_sum_over_the_weight(backend: str, op: Op) -> None:
    x, w = setting(), six_weights()
    total = op.call(x, weights=w / w.sum(), reduction="sum")
    close(op.call(x, weights=w), total)
    close(op.call(x), op.call(x, weights=torch.full_like(w, 1 / 6), reduction="sum"))


def test_doubled_weights_and_damping_leave_the_gram_matrix(backend: str) -> None:
    """It is that of √w p / τ and of (Σ w p / τ² + λ)⁻¹: of degree 0 in w and λ together."""
    x, w = setting(), six_weights()
    once, twice = (
        GRAMS[0].call(x, weights=k * w, damping=k * 0.02, reduction="sum") for k in (1, 2)
    )
    close(twice, once)


@SOFTCAPS
@pytest.mark.parametrize("op", OPS, **IDS)
def test_no_valid_token_gives_zeros(backend: str, op: Op, softcap: float | None) -> None:
    x = poisoned(setting(softcap=softcap), slice(None))
    nothing = torch.zeros(6, dtype=torch.bool, device=DEVICE)
    for given in ({"mask": nothing}, {"weights": nothing.float()}):
        for result in cases.tensors(op.call(x, **given)):
            assert (result == (0 if result.is_floating_point() else -100)).all()


@SOFTCAPS
@pytest.mark.parametrize("op", SUMS, **IDS)
def test_sum_of_parts_is_the_sum_of_the_whole(backend: str, op: Op, softcap: float | None) -> None:
    x, w = setting(T=7, softcap=softcap), torch.linspace(0, 2, 7, device=DEVICE)
    parts = [
        cases.tensors(op.call(x.tokens(part), weights=w[part]))
        for part in (slice(0, 1), slice(1, 4), slice(4, 7))
    ]
    close(tuple(map(sum, zip(*parts, strict=True))), op.call(x, weights=w))


@pytest.mark.parametrize("op", [op for op in PER_TOKEN if op in PLACELESS], **IDS)
def test_a_token_does_not_depend_on_its_batch(backend: str, op: Op) -> None:
    x = setting(T=7)
    whole, part = cases.tensors(op.call(x)), op.call(x.tokens(slice(2, 5)))
    close(tuple(y[2:5] for y in whole), part)


@pytest.mark.parametrize("op", PLACELESS, **IDS)
def test_permuted_tokens(backend: str, op: Op) -> None:
    x, w = setting(), six_weights()
    order = torch.tensor([4, 2, 0, 5, 1, 3], device=DEVICE)
    results = cases.tensors(op.call(x, weights=w))
    if op.kind != "sum":
        results = tuple(y[order] for y in results)
    if op.kind == "gram":
        results = (results[0][:, order],)
    close(op.call(x.tokens(order), weights=w[order]), results)


@pytest.mark.parametrize("op", PLACELESS, **IDS)
def test_permuted_classes(backend: str, op: Op) -> None:
    x = setting(softcap=4.0)
    order = torch.randperm(V, generator=cases.generator(1)).to(DEVICE)
    results = cases.tensors(op.call(x))
    if op.short in ("mean_probs", "weight_diagonal"):
        results = tuple(y[order] for y in results)
    close(op.call(x.replace(weight=x.weight[order], bias=x.bias[order])), results)


@pytest.mark.parametrize("op", OPS, **IDS)
def test_shift_of_the_bias_shifts_the_logsumexp_alone(backend: str, op: Op) -> None:
    x = setting()
    # multiples of 2⁻³ and 2⁻⁶, small: the logits, shifted or not, are exact in float32
    h, W = ((8 * y).round() / 8 for y in (x.hidden, x.weight))
    x = x.replace(hidden=h, weight=W, bias=(64 * x.bias).round() / 64)
    plain, shifted = (cases.tensors(op.call(y)) for y in (x, x.replace(bias=x.bias + 128)))
    if op.short == "stats":
        close(shifted[0], plain[0] + 128, slack=1)
        plain, shifted = plain[1:], shifted[1:]
    close(shifted, plain, slack=1)


@SOFTCAPS
@pytest.mark.parametrize("op", OPS, **IDS)
def test_temperature_is_a_head_of_smaller_logits(
    backend: str, op: Op, softcap: float | None
) -> None:
    """(W, b, c, τ) has the p of (W, b, c) / τ at 1, and the gradients and M in h as well.

    The factors: E W is τ times that of W / τ; tr F 1 / τ², tr F² 1 / τ⁴, the Fisher of W and b
    1 / τ²; and the Gram matrix is that of the damping τ² λ.
    """
    tau, x = 2.0, setting(softcap=softcap)
    scaled = x.replace(
        weight=x.weight / tau,
        bias=x.bias / tau,
        softcap=None if softcap is None else softcap / tau,
    )
    at_tau = cases.tensors(op.call(x, temperature=tau))
    factors: dict[str, tuple[float, ...]] = {
        "stats": (1, 1, tau**-2, tau**-4, 1, tau),
        "weight_diagonal": (tau**-2, tau**-2),
        "sample": (1, 1),
    }
    damping = {"damping": tau**2 * dict(op.options)["damping"]} if op in GRAMS else {}
    at_one = cases.tensors(op.call(scaled, **damping))
    pairs = zip(at_one, factors.get(op.short, (1,)), strict=True)
    close(at_tau, tuple(y * factor if factor != 1 else y for y, factor in pairs))


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("op", OPS, **IDS)
def test_any_leading_dimensions(backend: str, op: Op, lead: tuple[int, ...]) -> None:
    x = cases.make(lead, V, d)
    w = torch.rand(lead, generator=cases.generator(2)).to(DEVICE)
    flat = x.replace(hidden=x.hidden.reshape(-1, d), u=x.u.reshape(-1, d))
    shaped, plain = op.call(x, weights=w), op.call(flat, weights=w.reshape(-1))
    for a, b in zip(cases.tensors(shaped), cases.tensors(plain), strict=True):
        if op.kind == "token":
            assert a.shape == (*lead, *b.shape[1:])
        cases.equal(a.reshape(b.shape), b)


def test_vectors_for_all_tokens_alike(backend: str) -> None:
    x = cases.make((2, 3), V, d)
    one = fk.head_fisher_matvec(x.hidden, x.weight, x.u[0, 0])
    many = fk.head_fisher_matvec(x.hidden, x.weight, x.u[0, 0].expand(2, 3, d).contiguous())
    cases.equal(one, many)


# ---- ops against each other ---------------------------------------------------------------------


@SOFTCAPS
def test_matvec_is_the_product_with_the_pullback(backend: str, softcap: float | None) -> None:
    x, w = setting(softcap=softcap), six_weights()
    given = {"bias": x.bias, "softcap": softcap, "temperature": 1.3, "weights": w}
    M = fk.head_fisher_pullback(x.hidden, x.weight, reduction="none", **given)
    assert torch.equal(M, M.mT)
    product = fk.head_fisher_matvec(x.hidden, x.weight, x.u, **given)
    close(product, (M @ x.u[..., None])[..., 0])
    assert (torch.linalg.eigvalsh(M.double()) >= -1e-6 * M.abs().max().item()).all()


def test_traces(backend: str) -> None:
    """tr F is the sum of the Fisher diagonal of b."""
    x, w = setting(), six_weights()
    given = {"bias": x.bias, "temperature": 1.3, "weights": w}
    diagonal = fk.head_fisher_weight_diagonal(x.hidden, x.weight, reduction="sum", **given)
    close(diagonal.bias.sum(), fk.head_fisher_stats(x.hidden, x.weight, **given).trace.sum())


def test_means_of_probabilities(backend: str) -> None:
    x, w = setting(), six_weights()
    given = {"bias": x.bias, "weights": w}
    mean = fk.head_fisher_mean_probs(x.hidden, x.weight, **given)
    assert abs(mean.double().sum().item() - 1) < 1e-6
    embeddings = fk.head_fisher_stats(
        x.hidden, x.weight, expected_embedding=True, **given
    ).expected_embedding
    close(embeddings.sum(0) / w.sum(), mean @ x.weight)


@SOFTCAPS
def test_gram_matrix_has_eigenvalues_in_the_unit_interval(
    backend: str, softcap: float | None
) -> None:
    """The mean Fisher D̄ / τ² − U Uᵀ + λ is positive: so is I − Γ."""
    x, w = setting(softcap=softcap), six_weights()
    gram = fk.head_fisher_gram(
        x.hidden, x.weight, 1e-4, bias=x.bias, softcap=softcap, temperature=0.7, weights=w
    )
    assert torch.equal(gram, gram.mT)
    values = torch.linalg.eigvalsh(gram.double())
    assert values.min() >= -1e-6
    assert 0.5 < values.max() < 1
