"""Products with the factor U of the mean Fisher, and its Gram matrix: every back end and dtype."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fisherkern as fk
from conftest import DEVICE, SLOW
from fisherkern import reference
from fisherkern.ops.softmax_fisher import factor
from softmax_fisher import cases

V = 130 if SLOW else 1000
TAU = 1.3
SHAPES = [(1, 1), (19, 5), (2, 50, 3)] if SLOW else [(1, 1), (7, 0), (19, 5), (2, 50, 3), (201, 97)]


def _accumulation(dtype: torch.dtype) -> torch.dtype:
    return reference.accumulation_dtype(dtype)


def tokens(dtype: torch.dtype, lead: tuple[int, ...], seed: int = 0) -> dict[str, Any]:
    """Logits, their largest, units (one is zero, at a row of NaN), labels of some."""
    z = cases.logits((*lead, V), dtype, 4.0, seed)
    wide, g = _accumulation(dtype), cases.generator(seed + 1)
    r = z.amax(-1).to(wide)
    u = torch.rand(lead, generator=g, dtype=wide).to(DEVICE)
    if u.numel() > 1:
        u.view(-1)[-2] = 0
        z.view(-1, V)[-2] = torch.nan
    labels = torch.randint(V, lead, generator=g)
    labels.view(-1)[::3] = -100
    at_label = torch.randn(lead, generator=g, dtype=wide)
    return {
        "logits": z,
        "reference": r.nan_to_num(),
        "unit": u,
        "labels": labels.to(DEVICE),
        "at_label": torch.where(u.cpu() == 0, 0, at_label).to(DEVICE),
    }


def normal(dtype: torch.dtype, *shape: int, seed: int = 5) -> Tensor:
    x = torch.randn(shape, generator=cases.generator(seed), dtype=torch.float64)
    return x.to(_accumulation(dtype)).to(DEVICE)


def per_class(dtype: torch.dtype, seed: int = 6) -> Tensor:
    return normal(dtype, V, seed=seed).abs()


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
        for k, v in arguments.items()
    }


def plain_factor(a: dict[str, Any]) -> Tensor:
    """Uᵀ [T, V] as plain PyTorch has it."""
    e = (a["logits"].to(a["unit"].dtype) - a["reference"][..., None]).div(TAU).exp()
    u = torch.where((a["unit"] == 0)[..., None], 0, e * a["unit"][..., None]).flatten(0, -2)
    if a.get("labels") is not None:
        here = a["labels"].reshape(-1, 1) == torch.arange(V, device=DEVICE)
        u = torch.where(here, a["at_label"].reshape(-1, 1), u)
    return u


def check(
    found: Tensor,
    left: Tensor,
    right: Tensor,
    truth: Tensor,
    added: Any = 0,
    triangular: bool = False,
) -> None:
    """Found = left right + added, against twice the error of plain PyTorch.

    To it come SLACK roundings of the terms of these sums, which may cancel (Higham 2002, section
    3.1).
    """
    assert found.shape == truth.shape
    if truth.numel():
        plain = left @ right + added
        if triangular:
            plain = plain.tril()
        terms = left.abs() @ right.abs() + abs(added)
        # of each U that is in them
        roundings = cases.SLACK[found.dtype] * cases.EPSILON[found.dtype] * (1 + triangular)
        budget = 2 * cases.error(plain, truth)
        assert (
            cases.error(found, truth) <= budget + (roundings * terms.norm() / truth.norm()).item()
        )


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_project(backend: str, dtype: torch.dtype, shape: tuple[int, ...], labelled: bool) -> None:
    cases.require(backend, dtype)
    *lead, k = shape
    a = tokens(dtype, tuple(lead))
    if not labelled:
        a["labels"] = a["at_label"] = None
    y, s = normal(dtype, V, k), per_class(dtype)
    found, gram = fk.softmax_fisher_project(
        **a, y=y, scale=s, temperature=TAU, ones=True, gram=True
    )
    truth, gram_truth = reference.softmax_fisher_project(
        **in_float64(a), y=y.double(), scale=s.double(), temperature=TAU, ones=True, gram=True
    )
    scaled = plain_factor(a) * s
    check(found, scaled, torch.cat([y, torch.ones_like(s)[:, None]], 1), truth)
    check(gram, scaled, plain_factor(a).mT, gram_truth, triangular=True)
    assert found.dtype == gram.dtype == y.dtype
    alone = fk.softmax_fisher_project(**a, y=y, temperature=TAU)
    unscaled = reference.softmax_fisher_project(**in_float64(a), y=y.double(), temperature=TAU)
    check(alone, plain_factor(a), y, unscaled)


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_expand(backend: str, dtype: torch.dtype, shape: tuple[int, ...], labelled: bool) -> None:
    cases.require(backend, dtype)
    *lead, k = shape
    a = tokens(dtype, tuple(lead))
    if not labelled:
        a["labels"] = a["at_label"] = None
    c = normal(dtype, a["unit"].numel(), k)
    y, s, s_y = normal(dtype, V, k), per_class(dtype), per_class(dtype, 7)
    found = fk.softmax_fisher_expand(
        **a, c=c, y=y, scale=s, y_scale=s_y, alpha=-1.5, temperature=TAU
    )
    truth = reference.softmax_fisher_expand(
        **in_float64(a),
        c=c.double(),
        y=y.double(),
        scale=s.double(),
        y_scale=s_y.double(),
        alpha=-1.5,
        temperature=TAU,
    )
    u = plain_factor(a).mT
    check(found, -1.5 * s[:, None] * u, c, truth, s_y[:, None] * y)
    assert found.dtype == c.dtype
    alone = fk.softmax_fisher_expand(**a, c=c, temperature=TAU)
    bare = reference.softmax_fisher_expand(**in_float64(a), c=c.double(), temperature=TAU)
    check(alone, u, c, bare)
    added = fk.softmax_fisher_expand(**a, c=c, y=y, temperature=TAU)
    check(added, u, c, y.double() + bare.double(), y)


@pytest.mark.parametrize("precision", factor.PRECISIONS)
def test_precision(backend: str, precision: str) -> None:
    a = tokens(torch.float32, (40,))
    y, s = normal(torch.float32, V, 33), per_class(torch.float32)
    options = {"temperature": TAU, "precision": precision}
    found, gram = fk.softmax_fisher_project(**a, y=y, scale=s, gram=True, **options)
    truth, gram_truth = reference.softmax_fisher_project(
        **in_float64(a), y=y.double(), scale=s.double(), temperature=TAU, gram=True
    )
    bound = 1e-3 if precision == "tf32" else 1e-6
    assert cases.error(found, truth) <= bound
    assert cases.error(gram, gram_truth) <= bound
    c = normal(torch.float32, 40, 33)
    x = fk.softmax_fisher_expand(**a, c=c, scale=s, **options)
    expanded = reference.softmax_fisher_expand(
        **in_float64(a), c=c.double(), scale=s.double(), temperature=TAU
    )
    assert cases.error(x, expanded) <= bound


def test_batches_count_their_tokens_through(backend: str) -> None:
    a = tokens(torch.float32, (2, 15))
    b = tokens(torch.bfloat16, (7,), seed=3)
    both = {
        name: torch.cat([a[name].flatten(), b[name].flatten()])
        for name in ("reference", "unit", "labels", "at_label")
    }
    y, s = normal(torch.float32, V, 5), per_class(torch.float32)
    how = ("tf32x3", 1 << 24)
    found, gram = factor.project(
        [a["logits"], b["logits"]], *both.values(), TAU, s, y, True, True, *how
    )
    whole = torch.cat([a["logits"].flatten(0, 1), b["logits"].float()])
    joint, joint_gram = fk.softmax_fisher_project(
        whole, **both, y=y, scale=s, ones=True, gram=True, temperature=TAU
    )
    assert cases.agree(backend, found, joint)
    assert cases.agree(backend, gram, joint_gram)
    c = normal(torch.float32, 37, 5)
    x = factor.expand([a["logits"], b["logits"]], *both.values(), TAU, s, c, 0.5, y, None, *how)
    expected = fk.softmax_fisher_expand(
        whole, **both, c=c, scale=s, alpha=0.5, y=y, temperature=TAU
    )
    assert cases.agree(backend, x, expected)


def test_little_workspace_changes_little(backend: str) -> None:
    a = tokens(torch.float32, (150,))
    y, s = normal(torch.float32, V, 9), per_class(torch.float32)
    options = {"scale": s, "temperature": TAU}
    few = fk.softmax_fisher_project(**a, y=y, gram=True, workspace=1, **options)
    for x, expected in zip(
        few, fk.softmax_fisher_project(**a, y=y, gram=True, **options), strict=True
    ):
        assert cases.error(x, expected) <= 1e-6
    c = normal(torch.float32, 150, 9)
    x = fk.softmax_fisher_expand(**a, c=c, y=y, workspace=1, **options)
    assert cases.error(x, fk.softmax_fisher_expand(**a, c=c, y=y, **options)) <= 1e-6


def test_repeats_bit_for_bit(backend: str) -> None:
    a = tokens(torch.float32, (50,))
    y = normal(torch.float32, V, 33)
    first = fk.softmax_fisher_project(**a, y=y, gram=True)
    threads = torch.get_num_threads()
    # products of torch, which the emulation uses, depend on the number of threads
    torch.set_num_threads(1 if backend == "cpp" else threads)
    try:
        again = fk.softmax_fisher_project(**a, y=y, gram=True)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


@pytest.mark.skipif(SLOW, reason="about how the C++ back end shares out classes")
@pytest.mark.parametrize("k", [0, 1, 77])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_many_classes(
    backend: str, dtype: torch.dtype, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases.require(backend, dtype)
    monkeypatch.setitem(globals(), "V", 6001)
    a = tokens(dtype, (60,))
    y, s = normal(dtype, V, k), per_class(dtype)

    def project(y: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        return fk.softmax_fisher_project(
            **a, y=y, scale=s, temperature=TAU, ones=True, gram=True, **options
        )

    found, gram = project(y)
    truth, gram_truth = reference.softmax_fisher_project(
        **in_float64(a), y=y.double(), scale=s.double(), temperature=TAU, ones=True, gram=True
    )
    scaled = plain_factor(a) * s
    check(found, scaled, torch.cat([y, torch.ones_like(s)[:, None]], 1), truth)
    check(gram, scaled, plain_factor(a).mT, gram_truth, triangular=True)
    # in a workspace that leaves no room for the sums of shares
    for x, expected in zip(project(y, workspace=1), (found, gram), strict=True):
        assert cases.error(x, expected) <= 1e-6
    if backend == "cpp":
        threads = torch.get_num_threads()
        torch.set_num_threads(3 - min(threads, 2))
        try:
            again = project(y)
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(x, y) for x, y in zip(again, (found, gram), strict=True))


def test_strided_blocks(backend: str) -> None:
    a = tokens(torch.float32, (12,))
    wide = normal(torch.float32, 9, V)
    y = wide[::2].mT
    assert y.stride(1) != 1
    found = fk.softmax_fisher_project(**a, y=y)
    assert cases.agree(backend, found, fk.softmax_fisher_project(**a, y=y.contiguous()))
    c = normal(torch.float32, 5, 12).mT
    x = fk.softmax_fisher_expand(**a, c=c, y=y)
    expected = fk.softmax_fisher_expand(**a, c=c.contiguous(), y=y.contiguous())
    assert cases.agree(backend, x, expected)
    y = y.contiguous()
    scales = normal(torch.float32, V, 2).abs()
    for s in (scales[:, 0], scales[0, :1].expand(V)):
        dense = s.contiguous()
        found = fk.softmax_fisher_project(**a, y=y, scale=s)
        assert cases.agree(backend, found, fk.softmax_fisher_project(**a, y=y, scale=dense))
        found = fk.softmax_fisher_expand(**a, c=c, scale=s, y=y, y_scale=s)
        expected = fk.softmax_fisher_expand(**a, c=c, scale=dense, y=y, y_scale=dense)
        assert cases.agree(backend, found, expected)


@pytest.mark.parametrize("lead", [(0,), (2, 0)])
def test_no_tokens(backend: str, lead: tuple[int, ...]) -> None:
    z, u = torch.zeros(*lead, 4, device=DEVICE), torch.zeros(lead, device=DEVICE)
    y = normal(torch.float32, 4, 3)
    found, gram = fk.softmax_fisher_project(z, u, u, y, gram=True)
    assert found.shape == (0, 3)
    assert gram.shape == (0, 0)
    c = y.new_zeros(0, 3)
    assert torch.equal(fk.softmax_fisher_expand(z, u, u, c, y=y), y)
    assert bool((fk.softmax_fisher_expand(z, u, u, c) == 0).all())


def test_bad_input() -> None:
    z, r, u, y = torch.zeros(2, 3), torch.zeros(2), torch.ones(2), torch.ones(3, 4)
    project, expand = fk.softmax_fisher_project, fk.softmax_fisher_expand
    with pytest.raises(ValueError, match=r"y has shape \[4, 3\]; expected \[3, k\]"):
        project(z, r, u, y.mT)
    with pytest.raises(TypeError, match=r"y has dtype torch\.float64; expected torch\.float32"):
        project(z, r, u, y.double())
    with pytest.raises(ValueError, match="labels and at_label belong together"):
        project(z, r, u, y, labels=torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="precision is 'fp8'; allowed are"):
        project(z, r, u, y, precision="fp8")
    with pytest.raises(ValueError, match="workspace is 0; allowed are numbers of bytes >= 1"):
        project(z, r, u, y, workspace=0)
    with pytest.raises(ValueError, match=r"scale has shape \[2\]; expected \[3\]"):
        project(z, r, u, y, scale=r)
    with pytest.raises(ValueError, match=r"logits has shape \[2, 0\], no classes"):
        project(torch.zeros(2, 0), r, u, torch.zeros(0, 4))
    with pytest.raises(ValueError, match=r"c has shape \[3, 4\]; expected \[2, k\]"):
        expand(z, r, u, y)
    with pytest.raises(ValueError, match=r"y has shape \[3, 4\]; expected 5 columns"):
        expand(z, r, u, torch.ones(2, 5), y=y)
    with pytest.raises(ValueError, match="y_scale was given without y"):
        expand(z, r, u, torch.ones(2, 4), y_scale=torch.ones(3))
    with pytest.raises(ValueError, match="alpha is nan; allowed are numbers that are finite"):
        expand(z, r, u, torch.ones(2, 4), alpha=float("nan"))


@pytest.mark.skipif(SLOW, reason="the compiled graph holds the op itself: covered by the main run")
def test_compiles_without_a_graph_break(backend: str) -> None:
    a = tokens(torch.float32, (6,))
    y = normal(torch.float32, V, 2)

    def function(y: Tensor) -> Tensor:
        c = fk.softmax_fisher_project(**a, y=y * 2)
        return fk.softmax_fisher_expand(**a, c=c, y=y)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(y), function(y))
