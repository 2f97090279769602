"""Panels u s exp((z − r) / τ): every back end, layout and dtype, any part of the classes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import fisherkern as fk
from conftest import DEVICE, SLOW
from fisherkern import reference
from softmax_fisher import cases

V = 70 if SLOW else 1000
TAU = 1.3


def tokens(dtype: torch.dtype, lead: tuple[int, ...] = (2, 19)) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, their largest, and units of which one is zero at a row of NaN."""
    z = cases.logits((*lead, V), dtype, 6.0)
    accumulation = reference.accumulation_dtype(dtype)
    u = torch.rand(lead, generator=cases.generator(1), dtype=accumulation).to(DEVICE)
    u.view(-1)[-2] = 0
    z.view(-1, V)[-2] = torch.nan
    return z, z.amax(-1).to(accumulation).nan_to_num(), u


def per_class(dtype: torch.dtype) -> Tensor:
    s = torch.rand(V, generator=cases.generator(2), dtype=torch.float64)
    return s.to(reference.accumulation_dtype(dtype)).to(DEVICE)


def check(found: Tensor, z: Tensor, r: Tensor, u: Tensor, s: Tensor | None, **options) -> None:
    scale = None if s is None else s.double()
    truth = reference.softmax_fisher_panel(
        z.double(), r.double(), u.double(), temperature=TAU, scale=scale, **options
    )
    assert found.shape == truth.shape
    assert found.dtype == r.dtype
    e = (z.to(r.dtype) - r[..., None]).div(TAU).exp()
    plain = torch.where((u == 0)[..., None], 0, e * u[..., None]).flatten(0, -2)
    plain = plain if s is None else plain * s
    plain = plain.mT if options.get("transposed") else plain
    assert cases.error(found, truth) <= cases.budget(found, plain, truth)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_panel(backend: str, dtype: torch.dtype, transposed: bool, scaled: bool) -> None:
    cases.require(backend, dtype)
    z, r, u = tokens(dtype)
    s = per_class(dtype) if scaled else None
    found = fk.softmax_fisher_panel(z, r, u, temperature=TAU, scale=s, transposed=transposed)
    check(found, z, r, u, s, transposed=transposed)
    row = found[:, -2] if transposed else found[-2]
    assert bool((row == 0).all())


@pytest.mark.parametrize("transposed", [False, True])
def test_part_of_the_classes_into_part_of_a_panel(backend: str, transposed: bool) -> None:
    z, r, u = tokens(torch.float32, (19,))
    s = per_class(torch.float32)
    whole = fk.softmax_fisher_panel(z, r, u, scale=s, transposed=transposed)
    begin, end = 3, V - 8
    n = end - begin
    memory = torch.full((n, 40) if transposed else (40, n), -1.0, device=DEVICE)
    out = memory[:, 5:24] if transposed else memory[5:24]
    part = fk.softmax_fisher_panel(
        z[:, begin:end], r, u, scale=s[begin:end], transposed=transposed, out=out
    )
    assert part is out
    expected = whole[begin:end] if transposed else whole[:, begin:end]
    assert cases.agree(backend, part, expected)
    rest = torch.cat([memory[:, :5], memory[:, 24:]], 1) if transposed else memory[:5]
    assert bool((rest == -1).all())


def test_minus_infinity_is_a_probability_of_zero(backend: str) -> None:
    z = cases.logits((3, V), torch.float32)
    z[1, ::2] = -torch.inf
    r = z.amax(-1)
    panel = fk.softmax_fisher_panel(z, r, torch.ones(3, device=DEVICE))
    assert bool((panel[1, ::2] == 0).all())
    assert bool(panel.isfinite().all())


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (2, 0, 4)])
def test_empty(backend: str, shape: tuple[int, ...]) -> None:
    z = torch.zeros(shape, device=DEVICE)
    u = torch.ones(shape[:-1], device=DEVICE)
    panel = fk.softmax_fisher_panel(z, u, u)
    assert panel.shape == (u.numel(), shape[-1])


def test_bad_input() -> None:
    z, r, u = torch.zeros(2, 3), torch.zeros(2), torch.ones(2)
    with pytest.raises(TypeError, match=r"reference has dtype torch\.float64; expected .*float32"):
        fk.softmax_fisher_panel(z, r.double(), u)
    with pytest.raises(ValueError, match=r"unit has shape \[3\]; expected \[2\]"):
        fk.softmax_fisher_panel(z, r, torch.ones(3))
    with pytest.raises(ValueError, match=r"scale has shape \[2\]; expected \[3\]"):
        fk.softmax_fisher_panel(z, r, u, scale=torch.ones(2))
    with pytest.raises(ValueError, match=r"out has shape \[2, 3\]; expected \[3, 2\]"):
        fk.softmax_fisher_panel(z, r, u, transposed=True, out=torch.empty(2, 3))
    with pytest.raises(ValueError, match="out overlaps logits"):
        fk.softmax_fisher_panel(z, r, u, out=z)


@pytest.mark.skipif(SLOW, reason="the compiled graph holds the op itself: covered by the main run")
def test_compiles_without_a_graph_break(backend: str) -> None:
    z, r, u = tokens(torch.float32)
    compiled = torch.compile(fk.softmax_fisher_panel, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(z, r, u), fk.softmax_fisher_panel(z, r, u))
