"""Shapes, strides and extremes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fisherkern as fk
from conftest import DEVICE, SLOW
from head_fisher import cases
from head_fisher.cases import IDS, ONE_EACH, OPS, PLACELESS, Inputs, Op

V, d = (33, 8) if SLOW else (129, 24)
SOFTCAPS = cases.softcaps(30.0)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "every other": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "padded": lambda x: torch.nn.functional.pad(x, (3, 5), value=torch.nan)[..., 3:-5],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    "first dimension last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


@pytest.mark.parametrize("layout", list(LAYOUTS)[: 3 if SLOW else None])
@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_any_strides(backend: str, op: Op, layout: str) -> None:
    lay = LAYOUTS[layout]
    for dtype in (torch.bfloat16,) if SLOW else (torch.float32, torch.bfloat16):
        x = cases.make((2, 3), V, d, dtype)
        strided = Inputs(lay(x.hidden), lay(x.weight), lay(x.u), lay(x.bias))
        cases.close(op.call(strided), op.call(x))
    w = torch.rand(2, 3, generator=cases.generator(1)).to(DEVICE)
    cases.close(op.call(x, weights=lay(w)), op.call(x, weights=w))


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_weight_diagonal_into_out(backend: str, layout: str, dtype: torch.dtype) -> None:
    x = cases.make((2, 3), V, d, dtype)
    expected = fk.head_fisher_weight_diagonal(x.hidden, x.weight)
    base = torch.full((3 * (V + 1) * (d + 8),), 55.0, device=DEVICE)
    laid = LAYOUTS[layout](torch.zeros_like(expected.weight))
    out = base.as_strided(laid.shape, laid.stride(), laid.storage_offset())
    for hidden in (x.hidden, x.hidden[:0]):  # what was there is not added to
        found = fk.head_fisher_weight_diagonal(hidden, x.weight, out=out)
        assert found.weight is out
        assert torch.equal(out, expected.weight if len(hidden) else torch.zeros_like(laid))
        assert torch.equal(found.bias, expected.bias if len(hidden) else found.bias * 0)
    out.fill_(55)
    assert (base == 55).all()


@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_expanded_inputs(backend: str, op: Op) -> None:
    one = cases.make((1, 3), V, d)
    x = Inputs(
        one.hidden.expand(4, 3, d),
        one.weight[:1].expand(V, d),
        one.u[:, :1].expand(4, 3, d),
        one.bias[:1].expand(V),
    )
    copies = Inputs(*(y.contiguous() for y in (x.hidden, x.weight, x.u, x.bias)))
    cases.close(op.call(x), op.call(copies))


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("op", OPS, **IDS)
def test_no_tokens(backend: str, op: Op, lead: tuple[int, ...]) -> None:
    for softcap in (None, 5.0):
        x = cases.make(lead, V, d, softcap=softcap)
        for arguments in ({}, {"weights": torch.ones(lead, device=DEVICE)}, {"workspace": 1}):
            results = cases.tensors(op.raw(x, **arguments))
            if op.short != "sample":
                shapes = [y.shape for y in op.truth(x)]
                assert [y.shape for y in results] == shapes
            assert all((y == 0).all() for y in results)


@cases.softcaps(5.0)
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("op", PLACELESS, **IDS)
def test_classes_of_no_probability(
    backend: str, op: Op, dtype: torch.dtype, softcap: float | None
) -> None:
    """A bias of −∞: p is 0; under a soft-cap z = −c, whatever h holds."""
    cases.require(backend, dtype)
    x = cases.make(5, V, d, dtype, softcap=softcap)
    x.bias[::3] = -torch.inf
    for result in cases.check(backend, op, x):
        assert result.isfinite().all()
    if softcap is None:
        x.bias[0] = 1.0
        x.bias[1:] = -torch.inf
        for result in cases.check(backend, op, x):
            assert result.isfinite().all()


def extreme(softcap: float | None) -> Inputs:
    """One-hot rows, of ties between two classes, at logits of ten thousand and more."""
    x = cases.make(5, V, d, bias=False, softcap=softcap)
    # integers, so that logits are exact: their rounding would swamp any other
    hidden, weight = (512 * x.hidden).round(), (4 * x.weight).round()
    weight[1::2] = weight[::2][: len(weight[1::2])]
    assert (hidden @ weight.mT).abs().max() > 10_000
    return x.replace(hidden=hidden, weight=weight)


@pytest.mark.parametrize("op", PLACELESS, **IDS)
def test_extreme_logits(backend: str, op: Op) -> None:
    for result in cases.check(backend, op, extreme(None), exact_logits=True):
        assert result.isfinite().all()


@pytest.mark.parametrize("op", PLACELESS, **IDS)
def test_saturated_soft_cap(backend: str, op: Op) -> None:
    """Nearly all of z is ±c, in ties, and ∂z / ∂(W h + b) = 1 − (z / c)² zero to a rounding."""
    x = extreme(30.0)
    if not op.sloped:
        cases.check(backend, op, x, exact_logits=True)
        return
    # what results with a slope of one would have as their bound
    square = x.weight.square().sum(-1).max()
    bounds = {"matvec": [square * x.u.norm()], "weight_diagonal": [x.hidden.square().sum(), 5.0]}
    results = cases.tensors(op.call(x))
    for result, truth, bound in zip(
        results, op.truth(x), bounds.get(op.short, [5 * square]), strict=True
    ):
        assert (result - truth).norm() <= 4 * cases.EPSILON[torch.float32] * bound


@pytest.mark.parametrize("op", PLACELESS, **IDS)
def test_largest_numbers_of_half_precision(backend: str, op: Op) -> None:
    """Logits beyond the largest number of float16: they are never stored in it."""
    x = cases.make(4, V, d, torch.float16, bias=False)
    hidden = torch.where(x.hidden > 0, 16384.0, -16384.0).half()
    for result in cases.check(backend, op, x.replace(hidden=hidden, weight=8 * x.weight)):
        assert result.isfinite().all()


@SOFTCAPS
@pytest.mark.parametrize("value", [torch.nan] if SLOW else [torch.nan, torch.inf])
@pytest.mark.parametrize("op", OPS, **IDS)
def test_nan_stays_in_its_token_and_reaches_every_sum(
    backend: str, op: Op, value: float, softcap: float | None
) -> None:
    """An infinite h is one too: ∞ − ∞ in the product with a W of both signs."""
    x = cases.make(3, V, d, softcap=softcap)
    x.weight[:, ::2].abs_()
    x.weight[:, 1::2].abs_().neg_()
    hidden = x.hidden.clone()
    hidden[1] = value
    before = cases.tensors(op.call(x))
    results = cases.tensors(op.call(x.replace(hidden=hidden)))
    for result, other in zip(results, before, strict=True):
        if op.kind == "token":
            assert torch.equal(result[::2], other[::2])
            assert (result[1].isnan() if result.is_floating_point() else result[1] == -100).all()
        else:
            assert result.isnan().all()


@pytest.mark.parametrize("op", OPS, **IDS)
def test_weight_of_nan(backend: str, op: Op) -> None:
    """Seen by every token that counts, and by no other."""
    x = cases.make(3, V, d)
    x.weight[5] = torch.nan
    mask = torch.tensor([True, False, True], device=DEVICE)
    for result in cases.tensors(op.call(x, mask=mask)):
        if not result.is_floating_point():
            assert (result == -100).all()
        elif op.kind == "token":
            assert result[mask].isnan().all()
            assert (result[~mask] == 0).all()
        elif op.kind == "gram":
            assert result[mask][:, mask].isnan().all()
        else:
            assert result.isnan().all()


@settings(max_examples=10 if SLOW else 50, deadline=None)
@given(
    tokens=st.integers(0, 5),
    classes=st.integers(1, 40),
    width=st.integers(1, 9),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    softcap=st.sampled_from([None, 0.5, 10.0]),
    tau=st.floats(0.1, 10.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    workspace=st.sampled_from([1, 500, 1 << 20]),
    data=st.data(),
)
def test_properties_of_any_input(
    tokens: int,
    classes: int,
    width: int,
    scale: float,
    softcap: float | None,
    tau: float,
    dtype: torch.dtype,
    workspace: int,
    data: st.DataObject,
) -> None:
    """Bounds that hold whatever the head: on the back end that would serve it."""
    seed = data.draw(st.integers(0, 2**20))
    x = cases.make(tokens, classes, width, dtype, scale=scale, seed=seed)
    drawn = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    mask = torch.tensor(drawn, dtype=torch.bool, device=DEVICE)
    given = {"bias": x.bias, "softcap": softcap, "temperature": tau, "mask": mask}
    given["workspace"] = workspace
    slack = 1e-5
    stats = fk.head_fisher_stats(x.hidden, x.weight, expected_embedding=True, **given)
    assert (stats.entropy >= 0).all()
    assert (stats.entropy <= torch.tensor(classes).log() * (1 + slack) + slack).all()
    largest = x.weight.float().amax(0)
    assert (stats.expected_embedding[mask] <= largest + slack * (1 + largest.abs())).all()
    mean = fk.head_fisher_mean_probs(x.hidden, x.weight, **given)
    assert abs(mean.sum().item() - float(mask.any())) < slack
    diagonal = fk.head_fisher_weight_diagonal(x.hidden, x.weight, reduction="sum", **given)
    assert (diagonal.bias >= 0).all()
    assert (diagonal.bias <= mask.sum() / 4 / tau**2 * (1 + slack)).all()
    assert (diagonal.weight >= 0).all()
    gram = fk.head_fisher_gram(x.hidden, x.weight, 0.1, **given)
    assert torch.equal(gram, gram.mT)
    assert (torch.linalg.eigvalsh(gram.double()).clamp(-slack, 1) + slack >= 0).all()
    assert not tokens or torch.linalg.eigvalsh(gram.double()).max() < 1 + slack
    M = fk.head_fisher_pullback(x.hidden, x.weight, accuracy="high", **given)
    size = x.weight.float().square().sum().item() / tau**2
    assert M.isfinite().all()
    assert torch.linalg.eigvalsh(M.double()).min() >= -slack * size


@pytest.mark.parametrize("weight", [1e-4, 1e5])
def test_weights_and_temperature_do_not_leave_the_range_of_float16(
    backend: str, weight: float
) -> None:
    """They scale what is multiplied by W, in float16 where W is."""
    h = torch.randn(4, 16, generator=cases.generator(0))
    W = torch.randn(200, 16, generator=cases.generator(1))
    u = torch.randn(4, 16, generator=cases.generator(2)).half().to(DEVICE)
    h, W = h.half().to(DEVICE), (W / 3000).half().to(DEVICE)
    w = torch.full((4,), weight, device=DEVICE)

    def both(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = torch.Generator(DEVICE).manual_seed(0)
        options = {"weights": w, "temperature": 3.0}
        rows = fk.head_fisher_matvec(h.to(dtype), W.to(dtype), u.to(dtype) * 1000, **options)
        drawn = fk.head_fisher_sample(h.to(dtype), W.to(dtype), key, **options)
        return rows, drawn.gradients

    for found, exact in zip(both(torch.float16), both(torch.float32), strict=True):
        top = exact.abs().amax()
        bound = 2e-3 * top + torch.finfo(torch.float16).smallest_normal * 2**-9
        assert (found - exact).abs().amax() <= bound
