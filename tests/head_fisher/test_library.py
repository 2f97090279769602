"""torch.library: opcheck of every raw op, torch.compile, fakes, autograd and autocast around."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fisherkern as fk
from conftest import DEVICE, SLOW
from head_fisher import cases
from head_fisher.cases import IDS, ONE_EACH, OPS, Inputs, Op

T, V, d = 4, 9, 5
RAW = torch.ops.fisherkern


Call = tuple[tuple[Any, ...], dict[str, Any]]


def raw_arguments(dtype: torch.dtype, softcap: float | None) -> dict[str, Call]:
    """Arguments of every raw op."""
    x = cases.make(T, V, d, dtype)
    w = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64, device=DEVICE)
    w = w if dtype == torch.float64 else w.float()
    seed = torch.tensor([11, 0], device=DEVICE)
    # the workspace makes several chunks
    rest = (x.bias, w, softcap, 1.3, 8 * V * w.itemsize)
    head = (x.hidden, x.weight)
    arguments: dict[str, tuple[Any, ...]] = {
        "head_fisher_stats": (*head, *rest, True),
        "head_fisher_matvec": (*head, x.u, *rest),
        "head_fisher_pullback": (*head, *rest, softcap is None, True, "tf32x3"),
        "head_fisher_mean_probs": (*head, *rest),
        "head_fisher_weight_diagonal": (*head, *rest),
        "head_fisher_gram": (*head, *rest, 0.1, "ieee"),
        "head_fisher_sample": (*head, seed, *rest),
    }
    calls: dict[str, Call] = {name: (positional, {}) for name, positional in arguments.items()}
    out = torch.full((V, d), 55.0, dtype=w.dtype, device=DEVICE)
    calls["head_fisher_weight_diagonal.out"] = ((*head, *rest), {"out": out})
    return calls


NAMES = sorted(raw_arguments(torch.float32, None))


@pytest.mark.parametrize(("dtype", "softcap"), [(torch.float32, 3.0), (torch.float64, None)])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend: str, name: str, dtype: torch.dtype, softcap: float | None) -> None:
    cases.require(backend, dtype)
    packet, _, overload = name.partition(".")
    positional, named = raw_arguments(dtype, softcap)[name]
    torch.library.opcheck(getattr(getattr(RAW, packet), overload or "default"), positional, named)


def test_every_op_has_a_raw_one() -> None:
    """But for the root, whose eigenvalues are those of PyTorch."""
    public = {name for name in fk.__all__ if name.startswith("head_fisher_")}
    assert public - set(NAMES) == {"head_fisher_pullback_root"}
    assert {op.name for op in OPS} == public


@pytest.mark.skipif(SLOW, reason="the compiled graph holds the op itself: covered by the main run")
@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_compiles_without_a_graph_break(backend: str, op: Op) -> None:
    x = cases.make(T, V, d, softcap=5.0)
    w = torch.tensor([0.5, 0.0, 2.0, 1.0], device=DEVICE)

    def function(h: Tensor, W: Tensor, u: Tensor, b: Tensor, w: Tensor) -> Any:
        doubled = Inputs(2 * h, W, u, b, 5.0)
        if op.short == "sample":  # a generator is no input of a graph
            return fk.head_fisher_sample(doubled.hidden, W, bias=b, softcap=5.0, weights=w)
        return op.raw(doubled, weights=w, temperature=1.3)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaf = x.hidden.clone().requires_grad_()
    results = []
    for run in (function, compiled):
        for h in (x.hidden, leaf):
            torch.manual_seed(0)
            results.append(run(h, x.weight, x.u, x.bias, w))
    for other in results[1:]:
        cases.equal(results[0], other)
        assert not any(y.requires_grad for y in cases.tensors(other))


@pytest.mark.skipif(SLOW, reason="shapes are the same for every back end: covered by the main run")
def test_inductor_runs_the_ops_among_its_own_code(backend: str) -> None:
    x = cases.make(T, V, d)

    def function(h: Tensor, W: Tensor) -> Tensor:
        entropy = fk.head_fisher_stats(h.sin() * 3, W).entropy
        return fk.head_fisher_pullback(h, W, weights=entropy.cos().abs())

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    torch.testing.assert_close(compiled(x.hidden, x.weight), function(x.hidden, x.weight))


# a root is no op: what it takes is torch's own, whose fakes ask a build without CUDA for a device
@pytest.mark.parametrize("op", [op for op in ONE_EACH if op.short != "pullback_root"], **IDS)
def test_fake_cuda_tensors_have_the_shapes_of_real_results(op: Op) -> None:
    x = cases.make((2, 3), V, d, torch.bfloat16)
    real = cases.tensors(op.raw(x))

    def fake(y: Tensor) -> Tensor:
        return torch.empty(y.shape, dtype=y.dtype, device="cuda")

    with FakeTensorMode():
        head, bias = [fake(x.hidden), fake(x.weight)], fake(x.bias)
        operands = [fake(x.u)] if op.short == "matvec" else []
        results = getattr(fk, op.name)(*head, *operands, bias=bias, **dict(op.options))
    for a, b in zip(cases.tensors(results), real, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "cuda")


@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_inputs_in_an_autograd_graph(backend: str, op: Op) -> None:
    """As they are in a hook: results stay out of the graph."""
    x = cases.make(T, V, d, softcap=5.0)
    leaves = [y.clone().requires_grad_() for y in (x.hidden, x.weight, x.u, x.bias)]
    graph = Inputs(*(y * 1 for y in leaves), softcap=5.0)
    for inputs in (Inputs(*leaves, softcap=5.0), graph):
        result = op.raw(inputs)
        assert not any(y.requires_grad for y in cases.tensors(result))
        cases.equal(result, op.raw(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@cases.softcaps(5.0)
@pytest.mark.parametrize("op", OPS, **IDS)
def test_autocast_changes_nothing(
    backend: str, op: Op, softcap: float | None, dtype: torch.dtype
) -> None:
    """A hook runs under the autocast of the model."""
    x = cases.make(T, V, d, dtype, softcap=softcap)
    w = torch.tensor([0.5, 0.0, 2.0, 1.0], device=DEVICE)
    expected = op.raw(x, weights=w)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cases.equal(op.raw(x, weights=w), expected)


@cases.softcaps(5.0)
@pytest.mark.parametrize("op", ONE_EACH, **IDS)
def test_inputs_are_not_written_to(backend: str, op: Op, softcap: float | None) -> None:
    x = cases.make(T, V, d, softcap=softcap)
    w = torch.tensor([0.5, 0.0, 2.0, 1.0], device=DEVICE)
    inputs = (x.hidden, x.weight, x.u, x.bias, w)
    before = [y.clone() for y in inputs]
    for given in ({}, {"weights": w}, {"mask": w > 0}):
        results = cases.tensors(op.raw(x, **given))
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
        memory = {y.untyped_storage().data_ptr() for y in inputs}
        assert all(y.untyped_storage().data_ptr() not in memory for y in results)


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("op", [op for op in ONE_EACH if op.short != "pullback_root"], **IDS)
def test_cuda_graph(backend: str, op: Op) -> None:
    if backend == "reference":
        pytest.skip("the reference is not meant for CUDA graphs")
    x = cases.make(T, 1000, 64, softcap=5.0)
    weights = torch.ones(T, device=DEVICE)
    given = {"bias": x.bias, "softcap": x.softcap, "weights": weights, **dict(op.options)}
    operands = [x.u] if op.short == "matvec" else []

    def call() -> tuple[Tensor, ...]:
        return cases.tensors(getattr(fk, op.name)(x.hidden, x.weight, *operands, **given))

    expected = call()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    graph.replay()
    torch.cuda.synchronize()
    if op.short == "sample":  # a replay draws its own numbers
        labels, gradients = results
        assert ((labels >= 0) & (labels < 1000)).all()
        assert gradients.isfinite().all()
    else:
        cases.equal(results, expected)
