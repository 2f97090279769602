"""Every op against the float64 truth, within twice the error of plain PyTorch."""

from __future__ import annotations

import math

import pytest
import torch

import fisherkern as fk
from conftest import DEVICE, SLOW, serving
from fisherkern import reference
from softmax_fisher import cases
from softmax_fisher.cases import DTYPES, IDS, OPS, Op

SIZES = (1, 2, 7, 64, 65, 255, 1000) if SLOW else (1, 2, 7, 63, 64, 65, 127, 1000, 4097, 50257)
SCALES = (0.5, 6.0) if SLOW else (0.5, 2.0, 6.0)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS, **IDS)
def test_error_within_twice_that_of_pytorch(
    backend: str, op: Op, dtype: torch.dtype, classes: int, scale: float
) -> None:
    cases.require(backend, dtype)
    tau = 1.3
    z = cases.logits((3, classes), dtype, scale, seed=classes)
    operands = op.make(z, cases.generator(classes + 1))
    results = cases.tensors(op.call(z, *operands, temperature=tau))
    truths = cases.tensors(op.truth(z, *operands, temperature=tau))
    # plain PyTorch gets float32 for half-precision logits, and rounds at the end as we do
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    upcast = [x.to(wide) if x.is_floating_point() else x for x in operands]
    plain = cases.plain(op, z.to(wide), *upcast, temperature=tau)
    for result, ordinary, truth in zip(results, plain, truths, strict=True):
        assert result.shape == truth.shape
        found = cases.error(result, truth)
        allowed = cases.budget(result, ordinary.to(result.dtype), truth)
        assert found <= allowed


def _rising_rows() -> torch.Tensor:
    """Rows on which a running maximum is wrong again and again, or for long."""
    V = 300 if SLOW else 5000
    noise = cases.logits((5, V), torch.float32, 0.5).cpu()
    climb = torch.linspace(0, 1, V)
    noise[0] += 12 * climb  # a new maximum in every stretch
    noise[1] += 300 * climb  # far above what came first
    noise[2, : V // 2] = -torch.inf
    noise[3, -1] = 40.0  # overflows the powers of what came first
    noise[4] = climb.round()  # ties
    return noise


@pytest.mark.parametrize("op", OPS, **IDS)
def test_maximum_that_comes_late(backend: str, op: Op) -> None:
    z = _rising_rows().to(DEVICE)
    operands = op.make(z, cases.generator(5))
    truths = cases.tensors(op.truth(z, *operands))
    plain = cases.plain(op, z, *operands)
    results = cases.tensors(op.call(z, *operands))
    for result, ordinary, truth in zip(results, plain, truths, strict=True):
        assert cases.error(result, truth) <= cases.budget(result, ordinary, truth)


def test_labels_where_the_maximum_comes_late(backend: str) -> None:
    z = _rising_rows().to(DEVICE)
    for seed in range(8):
        drawn = torch.Generator(device=DEVICE).manual_seed(seed)
        labels = fk.softmax_fisher_sample(z, drawn).labels
        with serving("reference"):
            drawn.manual_seed(seed)
            assert torch.equal(labels, fk.softmax_fisher_sample(z, drawn).labels)


def test_float64_on_a_gpu_back_end_is_refused_with_its_reason() -> None:
    with fk.backend("triton"), pytest.raises(fk.BackendUnavailableError, match="no float64"):
        fk.softmax_fisher_trace(torch.zeros(2, 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS, **IDS)
def test_logsumexp_that_is_at_hand(backend: str, op: Op, dtype: torch.dtype) -> None:
    cases.require(backend, dtype)
    z = cases.logits((4, 130), dtype, 3.0)
    operands = op.make(z, cases.generator(1))
    accumulation = reference.accumulation_dtype(dtype)
    lse = torch.logsumexp(z.to(accumulation) / 0.7, -1)
    given = cases.tensors(op.call(z, *operands, temperature=0.7, logsumexp=lse))
    # the statistics of an earlier call are columns of one tensor
    strided = torch.stack([lse, lse + 1], -1)[:, 0]
    again = cases.tensors(op.call(z, *operands, temperature=0.7, logsumexp=strided))
    assert all(torch.equal(a, b) for a, b in zip(given, again, strict=True))
    # every p has the relative error of the rounded logsumexp; tr F² is of fourth order in p
    inherited = 4 * lse.abs().max().item() * cases.EPSILON[accumulation]
    truths = cases.tensors(op.truth(z, *operands, temperature=0.7))
    for result, truth in zip(given, truths, strict=True):
        assert cases.error(result, truth) <= inherited + 4 * cases.EPSILON[result.dtype]


@pytest.mark.parametrize("op", OPS, **IDS)
def test_peaked_rows_keep_relative_accuracy(backend: str, op: Op) -> None:
    """1 − p of the arg-max is 1e-9: float32 formulas with 1 − p would give 0 or noise."""
    z = torch.zeros(2, 257, device="cpu")
    z[:, 41] = 26.0
    z = z.to(DEVICE)
    operands = op.make(z, cases.generator(3))
    if "labels" in op.operands:
        operands = [torch.full_like(operands[0], 41)]
    results = cases.tensors(op.call(z, *operands))
    truths = cases.tensors(op.truth(z, *operands))
    for result, truth in zip(results, truths, strict=True):
        assert cases.error(result, truth) <= 1e-5


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_diagonal_of_two_classes(backend: str, dtype: torch.dtype, reduction: str) -> None:
    """Both have p (1 − p) of the unlikely one: good to the exponential of −24."""
    cases.require(backend, dtype)
    star, V = (200, 300) if SLOW else (4096, 5000)
    z = torch.full((1, V), -torch.inf, dtype=dtype)
    z[0, 3], z[0, star] = 0.0, 24.0
    found = fk.softmax_fisher_diagonal(z.to(DEVICE), reduction=reduction).flatten().double().cpu()
    p = 1 / (1 + math.exp(24))
    truth = torch.zeros(V, dtype=torch.float64)
    truth[[3, star]] = p * (1 - p)
    assert (found - truth).abs().max() <= 40 * cases.EPSILON[dtype] * p


@pytest.mark.parametrize("op", OPS, **IDS)
def test_same_bits_on_every_run(backend: str, op: Op) -> None:
    shape = (5, 300) if SLOW else (70, 5000)
    z = cases.logits(shape, torch.float32)
    operands = op.make(z, cases.generator(2))
    first = cases.tensors(op.call(z, *operands))
    for _ in range(2):
        again = cases.tensors(op.call(z, *operands))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(SLOW, reason="threads are those of the C++ back end: covered by the main run")
@pytest.mark.parametrize("op", OPS, **IDS)
def test_same_bits_for_any_number_of_threads(op: Op) -> None:
    if "cpp" not in fk.available("cpu"):
        pytest.skip("the C++ back end is not built here")
    z = cases.logits((70, 5000), torch.float32).cpu()
    operands = [x.cpu() for x in op.make(z, cases.generator(2))]
    before = torch.get_num_threads()
    results = []
    with serving("cpp"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(cases.tensors(op.call(z, *operands)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
