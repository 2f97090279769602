"""torch.library: opcheck of every raw op, torch.compile, autograd around the ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import DEVICE, SLOW
from covariance import cases
from covariance.cases import IDS, OPS, Op

RAW = torch.ops.fisherkern


def raw_arguments(dtype: torch.dtype) -> dict[str, tuple[Any, ...]]:
    def random(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=cases.generator(len(shape)), dtype=torch.float64)
        return x.to(dtype).to(DEVICE)

    mask = torch.tensor([True, False, True, True], device=DEVICE)
    w = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=dtype, device=DEVICE)
    alpha = torch.tensor([0.25], dtype=dtype, device=DEVICE)
    return {
        "covariance_update_": (
            random(2, 4, 4),
            random(4, 2, 3),
            mask,
            None,
            alpha,
            0.5,
            True,
            "ieee",
            True,
        ),
        "cross_update_": (
            random(5, 3),
            random(4, 3),
            random(4, 5),
            None,
            w,
            alpha,
            0.5,
            False,
            "squares",
            "ieee",
        ),
        "mirror_": (random(2, 3, 3),),
        "embedding_counts": (torch.tensor([0, 2, 2, 1], device=DEVICE), w, 3),
    }


NAMES = sorted(raw_arguments(torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend: str, name: str, dtype: torch.dtype) -> None:
    cases.require(backend, dtype)
    torch.library.opcheck(getattr(RAW, name).default, raw_arguments(dtype)[name])


@pytest.mark.skipif(SLOW, reason="the compiled graph holds the op itself: covered by the main run")
@pytest.mark.parametrize("op", OPS, **IDS)
def test_compiles_without_a_graph_break(backend: str, op: Op) -> None:
    inputs, w = op.make(torch.float32), cases.some_weights(op, torch.float32)
    start = torch.zeros_like(op.new(*inputs))

    def function(factor: Tensor, w: Tensor, *inputs: Tensor) -> Tensor:
        doubled = [2 * x for x in inputs]
        decay = 0.0 if op.id == "cross" else 0.5
        return 3 * op.update(factor, *doubled, ema_decay=decay, weights=w, **op.options)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    a, b = start.clone(), start.clone()
    assert torch.equal(compiled(a, w, *inputs), function(b, w, *inputs))
    assert torch.equal(a, b)


@pytest.mark.parametrize("op", OPS, **IDS)
def test_inputs_in_an_autograd_graph(backend: str, op: Op) -> None:
    """As they are in a hook: the factor stays out of the graph."""
    inputs = [x.requires_grad_() * 1 for x in op.make(torch.float32)]
    factor = op.new(*inputs)
    assert not factor.requires_grad
    assert torch.equal(factor, op.new(*(x.detach() for x in inputs)))


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("op", OPS, **IDS)
def test_cuda_graph(backend: str, op: Op) -> None:
    if backend == "reference":
        pytest.skip("the reference is not meant for CUDA graphs")
    inputs, mask = op.make(torch.float32), cases.some_tokens(op)
    expected = op.new(*inputs, mask=mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = op.new(*inputs, mask=mask)
    graph.replay()
    assert torch.equal(captured, expected)
