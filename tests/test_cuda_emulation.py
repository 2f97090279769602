"""The host emulation of CUDA reports planted bugs; the kernels do not depend on the schedule."""

from __future__ import annotations

import ctypes
import math

import pytest
import torch
from cuda_emulation import build
from torch import Tensor

from fisherkern.ops import _reference_kernels

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing() or "can be built")

SEEDS = (0, 1, 2, 3)


@pytest.fixture(scope="module")
def planted() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build.build([build.HERE / "planted_bugs.cu"], "planted_bugs")))
    library.emulation_error.restype = ctypes.c_char_p
    return library


@pytest.fixture(scope="module")
def emulated() -> build.Emulated:
    kernels, reason = build.load()
    assert kernels is not None, reason
    return kernels


def _int_buffer() -> tuple[Tensor, ctypes.c_void_p]:
    values = torch.full((64,), -7, dtype=torch.int32)
    return values, ctypes.c_void_p(values.data_ptr())


@pytest.mark.parametrize("seed", SEEDS)
def test_barrier(planted: ctypes.CDLL, seed: int) -> None:
    mirrored = torch.arange(63, -1, -1, dtype=torch.int32)
    planted.emulation_seed(seed)
    values, pointer = _int_buffer()
    assert planted.planted_mirror(pointer, 1) == 0
    assert torch.equal(values, mirrored)
    assert planted.planted_mirror(pointer, 0) == 0
    assert not torch.equal(values, mirrored), "the missing __syncthreads went unseen"


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("planted_divergent_shuffle", "exited"),
        ("planted_divergent_barrier", "__syncthreads|barriers"),
        ("planted_mixed_operations", "different warp operations"),
    ],
)
def test_divergence_is_reported(planted: ctypes.CDLL, kernel: str, message: str) -> None:
    _, pointer = _int_buffer()
    assert getattr(planted, kernel)(pointer) != 0
    said = planted.emulation_error().decode()
    assert any(part in said for part in message.split("|")), said


@pytest.mark.parametrize("seed", SEEDS)
def test_cluster_barrier(planted: ctypes.CDLL, seed: int) -> None:
    """Blocks of a cluster read what their neighbours wrote, before those are gone."""
    planted.emulation_seed(seed)
    values, pointer = _int_buffer()
    assert planted.planted_neighbours(pointer, 1, 1) == 0
    assert values[:4].tolist() == [1, 2, 3, 0]
    assert planted.planted_neighbours(pointer, 0, 1) == 0
    assert values[:4].tolist() != [1, 2, 3, 0], "the missing barrier of the cluster went unseen"
    assert planted.planted_neighbours(pointer, 1, 0) != 0
    assert "exited" in planted.emulation_error().decode()


def test_copy_that_none_begins(planted: ctypes.CDLL) -> None:
    _, pointer = _int_buffer()
    assert planted.planted_endless_copy(pointer) != 0
    assert "copy" in planted.emulation_error().decode()


def test_dynamic_shared_memory_starts_poisoned(planted: ctypes.CDLL) -> None:
    values, pointer = _int_buffer()
    assert planted.planted_unwritten_shared(pointer) == 0
    assert (values == 1).all()


def _case() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 300, generator=generator) * 3
    v = torch.randn(1, 3, 300, generator=generator)
    return logits, v, torch.tensor([0.5, 0.0, 2.0])


def _results(kernels: object) -> list[Tensor]:
    """A result of each kind of kernel: rows, per token, per class, and the sampler."""
    logits, v, weights = _case()
    matvec, gradient = torch.full_like(v, math.nan), torch.full_like(v, math.nan)
    stats, quadratic = torch.full((3, 5), math.nan), torch.full((3, 2, 2), math.nan)
    total, sums = torch.full((300,), math.nan), torch.full((300,), math.nan)
    reference, unit = torch.full((3,), math.nan), torch.full((3,), math.nan)
    labels = torch.full((3,), -7)
    seed = torch.tensor([1234, 0])
    kernels.softmax_fisher_matvec(logits, v, weights, None, 1.5, matvec)
    kernels.softmax_fisher_stats(logits, weights != 0, None, 1.5, stats)
    directions = torch.stack([v, v.roll(1, -1)], -2)
    kernels.softmax_fisher_quadratic(logits, directions, None, None, 1.5, quadratic)
    kernels.softmax_fisher_diagonal_sum(logits, weights, None, 1.5, total)
    kernels.softmax_fisher_powers(logits, weights, None, 1.5, sums, reference, unit)
    kernels.softmax_fisher_sample(logits, seed, weights, None, 1.5, labels, gradient)
    return [matvec, stats, quadratic, total, sums, reference, unit, labels, gradient]


def test_results_do_not_depend_on_the_schedule(emulated: build.Emulated) -> None:
    runs = []
    for seed in SEEDS:
        emulated.seed(seed)
        runs.append(_results(emulated))
    for run in runs[1:]:
        for result, first in zip(run, runs[0], strict=True):
            assert torch.equal(result, first)


@pytest.mark.parametrize("size", [0, 512, 4096], ids=["streamed", "cluster", "block"])
def test_close_to_the_reference(emulated: build.Emulated, size: int) -> None:
    """Rows read twice, kept by a cluster of blocks in slices of 512 bytes, and by one block."""
    emulated.slice_bytes(size)
    try:
        results = _results(emulated)
    finally:
        emulated.slice_bytes(build.SLICE_BYTES)
    for result, expected in zip(results, _results(_reference_kernels), strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
