"""Shapes, strides, extremes and destinations, drawn from the issue trackers of the field."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fisherkern as fk
from conftest import DEVICE, SLOW
from softmax_fisher import cases
from softmax_fisher.cases import IDS, OPS, PER_TOKEN, Op

V = 33 if SLOW else 129
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": lambda x: torch.cat([x, x[:, :1]], 1)[:, :-1],
    "time-major": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "class-major": lambda x: x.movedim(-1, 0).contiguous().movedim(0, -1),
    "every other class": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "padded rows": lambda x: torch.nn.functional.pad(x, (3, 5))[..., 3:-5],
    "unaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS, **IDS)
def test_strides_do_not_change_a_bit(backend: str, op: Op, layout: str) -> None:
    z = cases.logits((2, 3, V), torch.float32)
    operands = op.make(z, cases.generator(1))
    lay = LAYOUTS[layout]
    strided = [lay(x) if x.is_floating_point() and x.ndim == 3 else x for x in operands]
    assert torch.equal(lay(z), z)
    assert cases.agree(backend, op.call(lay(z), *strided), op.call(z, *operands))


@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (2, 1, 3), (1, 2, 2, 2)])
@pytest.mark.parametrize("op", PER_TOKEN, **IDS)
def test_any_leading_dimensions(backend: str, op: Op, lead: tuple[int, ...]) -> None:
    z = cases.logits((*lead, V), torch.float32)
    operands = op.make(z, cases.generator(1))
    shaped = cases.tensors(op.call(z, *operands))
    flat = [x.reshape(-1, *x.shape[len(lead) :]) for x in operands]
    for a, b in zip(shaped, cases.tensors(op.call(z.reshape(-1, V), *flat)), strict=True):
        assert a.shape[: len(lead)] == lead
        assert torch.equal(a.reshape(b.shape), b)


@pytest.mark.parametrize("op", [op for op in OPS if op.takes_out and op.kind == "row"], **IDS)
def test_out_beside_the_logits(backend: str, op: Op) -> None:
    """In other columns of one buffer; a column further they overlap."""
    z = cases.logits((3, 2, V), torch.float32)
    operands = op.make(z, cases.generator(1))
    buffer = torch.zeros(3, 2, 2 * V, device=DEVICE)
    buffer[..., V:] = z
    expected = op.call(z, *operands)
    assert cases.agree(backend, op.call(buffer[..., V:], *operands, out=buffer[..., :V]), expected)
    assert cases.agree(backend, buffer[..., :V], expected)
    assert torch.equal(buffer[..., V:], z)
    with pytest.raises(ValueError, match="out overlaps logits"):
        op.call(buffer[..., V:], *operands, out=buffer[..., 1 : V + 1])


@pytest.mark.parametrize("op", OPS, **IDS)
def test_one_token_without_leading_dimensions(backend: str, op: Op) -> None:
    z = cases.logits((V,), torch.float32)
    operands = op.make(z, cases.generator(1))
    flat = [x.reshape(1, *x.shape) for x in operands]
    for options in ({"mask": torch.tensor(True)}, {"weights": torch.tensor(2.0)}):
        here = {name: x.to(DEVICE) for name, x in options.items()}
        batched = {name: x[None] for name, x in here.items()}
        found = cases.tensors(op.call(z, *operands, **here))
        expected = cases.tensors(op.call(z[None], *flat, **batched))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a.reshape(b.shape), b)


@pytest.mark.parametrize("op", OPS, **IDS)
def test_expanded_rows(backend: str, op: Op) -> None:
    z = cases.logits((1, 3, V), torch.float32)
    operands = op.make(z, cases.generator(1))
    many = [x.expand(4, *x.shape[1:]) for x in operands]
    repeated = [x.contiguous() for x in many]
    assert cases.agree(
        backend,
        op.call(z.expand(4, 3, V), *many),
        op.call(z.expand(4, 3, V).contiguous(), *repeated),
    )


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0), (2, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("op", OPS, **IDS)
def test_empty(backend: str, op: Op, shape: tuple[int, ...]) -> None:
    z = cases.logits(shape, torch.float32)
    if "labels" in op.operands:
        operands = [torch.full(shape[:-1], -100, device=z.device)]
    else:
        operands = op.make(z, cases.generator(1))
    results = cases.tensors(op.call(z, *operands))
    truths = cases.tensors(op.truth(z, *operands))
    for index, (result, truth) in enumerate(zip(results, truths, strict=True)):
        assert result.shape == truth.shape
        if op.name == "softmax_fisher_stats" and index == 0:
            assert (result == -torch.inf).all()
        else:
            assert (result == 0).all()


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("op", OPS, **IDS)
def test_logits_of_minus_infinity_have_no_probability(
    backend: str, op: Op, dtype: torch.dtype
) -> None:
    cases.require(backend, dtype)
    z = cases.logits((3, V), dtype)
    operands = op.make(z, cases.generator(1))
    z[:, ::3] = -torch.inf
    z[0, 1:] = -torch.inf
    z[0, 0] = 1.0
    if "labels" in op.operands:
        operands = [torch.tensor([0, 1, 3], device=z.device)]
    results = cases.tensors(op.call(z, *operands))
    for result, truth in zip(results, cases.tensors(op.truth(z, *operands)), strict=True):
        assert result.isfinite().all()
        assert cases.error(result, truth) <= 16 * cases.SLACK[dtype] * cases.EPSILON[result.dtype]


@pytest.mark.parametrize("value", ["nan", "+inf", "all -inf", "all nan"])
@pytest.mark.parametrize("op", OPS, **IDS)
def test_row_without_a_distribution_is_nan(backend: str, op: Op, value: str) -> None:
    z = cases.logits((3, V), torch.float32)
    operands = op.make(z, cases.generator(1))
    healthy = cases.tensors(op.call(z, *operands))
    if value.startswith("all"):
        z[1] = -torch.inf if value == "all -inf" else torch.nan
    else:
        z[1, V // 2] = torch.nan if value == "nan" else torch.inf
    for result, before in zip(cases.tensors(op.call(z, *operands)), healthy, strict=True):
        if op in PER_TOKEN:
            assert torch.equal(result[0], before[0])
            assert torch.equal(result[2], before[2])
            per_token = result[1]
        else:
            per_token = result
        if op.name == "softmax_fisher_stats" and value in ("+inf", "all -inf"):
            continue  # the logsumexp of such a row is infinite, and that is right
        assert per_token.isnan().all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_statistics_of_an_infinite_row(backend: str, value: float) -> None:
    z = cases.logits((1, V), torch.float32)
    if value > 0:
        z[0, 3] = value
    else:
        z[0] = value
    stats = fk.softmax_fisher_stats(z)
    assert not stats.logsumexp.isfinite().any()
    assert torch.stack(stats[1:]).isnan().all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16))
@pytest.mark.parametrize("op", OPS, **IDS)
def test_extreme_logits(backend: str, op: Op, dtype: torch.dtype) -> None:
    """The largest finite logits of the type, and rows that are all alike."""
    z = cases.logits((3, V), dtype)
    z[0, 5] = torch.finfo(dtype).max
    z[1] = torch.finfo(dtype).max / 2
    z[2] = 0
    operands = op.make(z, cases.generator(1))
    results = cases.tensors(op.call(z, *operands))
    for result, truth in zip(results, cases.tensors(op.truth(z, *operands)), strict=True):
        if op.name == "softmax_fisher_stats":
            truth = truth.to(result.dtype)
        assert cases.error(result, truth) <= 4 * cases.SLACK[dtype] * cases.EPSILON[result.dtype]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("op", [op for op in OPS if op.takes_out], **IDS)
def test_out_is_written_and_returned(backend: str, op: Op, dtype: torch.dtype) -> None:
    z = cases.logits((2, 3, V), dtype)
    operands = op.make(z, cases.generator(1))
    expected = op.call(z, *operands)
    out = torch.full_like(expected, 123.0)
    assert op.call(z, *operands, out=out) is out
    assert torch.equal(out, expected)
    strided = torch.full((*expected.shape[:-1], 2 * expected.shape[-1]), 55.0).to(expected)
    view = strided[..., ::2]
    op.call(z, *operands, out=view)
    assert torch.equal(view, expected)
    assert (strided[..., 1::2] == 55).all()


@pytest.mark.parametrize("layout", ["contiguous", "shifted", "class-major"])
def test_gradient_over_the_logits(backend: str, layout: str) -> None:
    z = cases.logits((2, 4, V), torch.float32)
    labels = torch.tensor([[0, 1, -100], [V - 1, 5, 6]], device=z.device)
    view = z if layout == "contiguous" else LAYOUTS["class-major"](z)
    view = view[:, :3]
    rest = z[:, 3:].clone()
    expected = fk.softmax_fisher_gradient(view, labels)
    assert fk.softmax_fisher_gradient_(view, labels) is view
    assert torch.equal(view, expected)
    if layout != "class-major":
        assert torch.equal(z[:, 3:], rest)


@pytest.mark.skipif(DEVICE != "cpu", reason="needs 4 GiB of address space: lazily on the CPU only")
@pytest.mark.parametrize("op", PER_TOKEN, **IDS)
def test_offsets_beyond_int32(backend: str, op: Op) -> None:
    """Two rows 2³¹ + 7 elements apart: an offset kept in 32 bits reads or writes elsewhere."""
    step = 2**31 + 7
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        memory = torch.empty(step + V, dtype=torch.bfloat16)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    z = memory.as_strided((2, V), (step, 1))
    z.copy_(cases.logits((2, V), torch.bfloat16))
    operands = op.make(z, cases.generator(1))
    assert cases.agree(backend, op.call(z, *operands), op.call(z.contiguous(), *operands))


def test_class_axis_longer_than_int16_blocks(backend: str) -> None:
    z = torch.full((1, 65537), -8.0, device=DEVICE)
    z[0, 65536] = 3.0
    stats = fk.softmax_fisher_stats(z)
    truth = torch.logsumexp(z.double(), -1)
    assert abs(stats.logsumexp.item() - truth.item()) < 1e-6


@settings(max_examples=15 if SLOW else 60, deadline=None)
@given(
    tokens=st.integers(0, 5),
    classes=st.integers(1, 70),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    tau=st.floats(0.1, 10.0),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    data=st.data(),
)
def test_properties_of_any_input(
    tokens: int, classes: int, scale: float, tau: float, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Bounds that hold whatever the logits: on the back end that would serve them."""
    seed = data.draw(st.integers(0, 2**20))
    z = cases.logits((tokens, classes), dtype, scale, seed)
    masked = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    mask = torch.tensor(masked, dtype=torch.bool, device=z.device)
    stats = fk.softmax_fisher_stats(z, temperature=tau, mask=mask)
    slack = 1 + 1e-5
    assert (stats.entropy >= 0).all()
    assert (stats.entropy <= torch.tensor(classes).log() * slack + 1e-6).all()
    assert (stats.trace >= 0).all()
    assert (stats.trace * tau**2 <= (1 - 1 / classes) * slack + 1e-7).all()
    assert (stats.trace_squared <= stats.trace**2 * slack + 1e-30).all()
    assert (stats.max_probability[mask] * classes * slack >= 1).all()
    assert all((field[~mask] == 0).all() for field in stats)
    mean = fk.softmax_fisher_mean_probs(z, temperature=tau, mask=mask)
    assert (mean >= 0).all()
    assert abs(mean.sum().item() - float(mask.any())) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_result_that_is_not_aligned_to_its_elements(dtype: torch.dtype) -> None:
    """So large that it is written past the caches, by whole vectors at addresses of vectors."""
    T, V = 3, (6 << 20) // dtype.itemsize + 7
    memory = bytearray(T * V * dtype.itemsize + 1)
    z = torch.frombuffer(memory, dtype=dtype, count=T * V, offset=1).view(T, V).zero_()
    z[:, 0] = 3
    labels = torch.zeros(T, dtype=torch.int64)
    exact = fk.softmax_fisher_gradient(z.clone(), labels)
    assert torch.equal(fk.softmax_fisher_gradient_(z, labels), exact)


def test_more_directions_than_pairs_of_them_fit_into_a_grid(backend: str) -> None:
    if SLOW:
        pytest.skip("a million programs, one after the other")
    v = torch.randn(1, 1449, 2, generator=cases.generator(0)).to(DEVICE)
    Q = fk.softmax_fisher_quadratic(torch.zeros(1, 2, device=DEVICE), v)
    difference = (v[..., 0] - v[..., 1]).double() / 2
    exact = difference[..., None] * difference[..., None, :]
    assert (Q - exact).abs().amax() <= 1e-6 * exact.abs().amax()


def test_squares_of_a_rate_may_be_beyond_float32(backend: str) -> None:
    stats = fk.softmax_fisher_stats(torch.tensor([[0.0, 1.0]], device=DEVICE), temperature=1e-10)
    assert stats.trace_squared.item() == 0


def test_weights_whose_sum_is_beyond_float32(backend: str) -> None:
    z, w = torch.zeros(3, 2, device=DEVICE), torch.full((3,), 3e38, device=DEVICE)
    half = torch.full((2,), 0.5, device=DEVICE)
    torch.testing.assert_close(fk.softmax_fisher_mean_probs(z, weights=w), half)
