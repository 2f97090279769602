"""torch.library: opcheck of every raw op, torch.compile, fakes, CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import fisherkern as fk
from conftest import DEVICE, SLOW
from softmax_fisher import cases
from softmax_fisher.cases import IDS, OPS, Op

T, V = 4, 9
RAW = torch.ops.fisherkern


def raw_arguments(dtype: torch.dtype) -> dict[str, tuple[Any, dict[str, Tensor]]]:
    """Positional and keyword arguments of every raw op, differentiable inputs requiring grad."""

    def rows(seed: int, grad: bool = False) -> Tensor:
        return cases.logits((T, V), dtype, 1.0, seed).requires_grad_(grad)

    w = torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64, device=DEVICE)
    w = w if dtype == torch.float64 else w.float()
    valid = w != 0
    seed = torch.tensor([11, 0], device=DEVICE)
    labels = torch.tensor([0, -100, 8, 3], device=DEVICE)
    stats = RAW.softmax_fisher_stats(rows(0), None, None, 1.0)
    per_class = torch.zeros(V, dtype=w.dtype, device=DEVICE)
    g = rows(0, grad=True)
    calls: dict[str, tuple[Any, dict[str, Tensor]]] = {
        "softmax_fisher_matvec_backward": ((g, rows(1, True), rows(2, True), w, None, 1.3), {}),
        "softmax_fisher_quadratic": (
            (g, cases.logits((T, 2, V), dtype, 1.0).requires_grad_(), valid, None, 1.3),
            {},
        ),
        "softmax_fisher_diagonal": ((g, w, None, 1.3), {}),
        "softmax_fisher_diagonal.out": ((rows(0), w, None, 1.3), {"out": rows(1)}),
        "softmax_fisher_trace": ((g, valid, None, 1.3), {}),
        "softmax_fisher_stats": ((g, valid, None, 1.3), {}),
        "softmax_fisher_stats_backward": (
            (g, stats, torch.ones_like(stats).requires_grad_(), valid, 1.0),
            {},
        ),
        "softmax_fisher_gradient": ((g, labels, w, None, 1.3, -100), {}),
        "softmax_fisher_gradient_": ((rows(0), labels, w, None, 1.3, -100), {}),
        "softmax_fisher_gradient.out": (
            (rows(0), labels, w, None, 1.3, -100),
            {"out": rows(1)},
        ),
        "softmax_fisher_sample": ((rows(0), seed, w, None, 1.3), {}),
        "softmax_fisher_sample_": ((rows(0), seed, w, None, 1.3), {}),
        "softmax_fisher_sample.out": ((rows(0), seed, w, None, 1.3), {"out": rows(1)}),
        "checked_weights": ((w, w.dtype), {}),
    }
    panel = (rows(0), w, w, per_class + 0.5, 1.3)
    calls["softmax_fisher_panel"] = ((*panel, False), {})
    out = torch.zeros(V, T, dtype=w.dtype, device=DEVICE)
    calls["softmax_fisher_panel.out"] = ((*panel, True), {"out": out})
    factor = ([rows(0), rows(1)], torch.cat([w, w]), torch.cat([w, w]))
    at_labels = (torch.cat([labels, labels]), torch.cat([w, w]), 1.3, per_class + 0.5)
    how = ("tf32x3", 1 << 20)
    y = torch.ones(V, 3, dtype=w.dtype, device=DEVICE)
    c = torch.ones(2 * T, 3, dtype=w.dtype, device=DEVICE)
    calls["softmax_fisher_project"] = ((*factor, *at_labels, y, True, True, *how), {})
    calls["softmax_fisher_expand"] = ((*factor, *at_labels, c, 0.5, y, per_class, *how), {})
    for name in ("matvec", "sqrt_matvec", "sqrt_rmatvec"):
        product = f"softmax_fisher_{name}"
        calls[product] = ((g, rows(1, True), w, None, 1.3), {})
        calls[f"{product}.out"] = ((rows(0), rows(1), w, None, 1.3), {"out": rows(2)})
    for name in ("softmax_fisher_diagonal_sum", "softmax_fisher_mean_probs"):
        calls[name] = ((g, w, None, 1.3), {})
        calls[f"{name}.out"] = ((rows(0), w, None, 1.3), {"out": per_class.clone()})
    return calls


NAMES = sorted(raw_arguments(torch.float32))


def overload(name: str) -> Any:
    packet, _, which = name.partition(".")
    return getattr(getattr(RAW, packet), which or "default")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(backend: str, name: str, dtype: torch.dtype) -> None:
    cases.require(backend, dtype)
    positional, keywords = raw_arguments(dtype)[name]
    torch.library.opcheck(overload(name), positional, keywords)


@pytest.mark.skipif(SLOW, reason="the compiled graph holds the op itself: covered by the main run")
@pytest.mark.parametrize("op", OPS, **IDS)
def test_compiles_without_a_graph_break(backend: str, op: Op) -> None:
    z = cases.logits((T, V), torch.float32)
    operands = op.make(z, cases.generator(1))
    weights = torch.tensor([0.5, 0.0, 2.0, 1.0], device=DEVICE)

    def function(z: Tensor, weights: Tensor, *operands: Tensor) -> Any:
        return op.call(z * 2, *operands, weights=weights, temperature=1.3)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = function(z, weights, *operands)
    for a, b in zip(
        cases.tensors(compiled(z, weights, *operands)), cases.tensors(expected), strict=True
    ):
        assert torch.equal(a, b)
    leaf, other = z.clone().requires_grad_(), z.clone().requires_grad_()
    sum(x.float().sum() for x in cases.tensors(compiled(leaf, weights, *operands))).backward()
    sum(x.float().sum() for x in cases.tensors(function(other, weights, *operands))).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.skipif(SLOW, reason="the compiled graph holds the op itself: covered by the main run")
@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_that_change_do_not_break_the_graph(backend: str, dynamic: bool | None) -> None:
    def function(z: Tensor, W: Tensor, number: float) -> list[Tensor]:
        return [
            fk.softmax_fisher_trace(z, temperature=number),
            fk.covariance(z, scale=number),
            fk.head_fisher_mean_probs(z, W, softcap=number, temperature=number),
        ]

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for number in (1.5, 2.5, 3.5):
        operands = (cases.logits((T, V), torch.float32), cases.logits((7, V), torch.float32))
        for a, b in zip(compiled(*operands, number), function(*operands, number), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.skipif(SLOW, reason="the exported graph holds the op itself: covered by the main run")
def test_exports_for_any_number_of_tokens(backend: str) -> None:
    class Everything(torch.nn.Module):
        def forward(self, z: Tensor, W: Tensor) -> list[Tensor]:
            means = [fk.softmax_fisher_trace, fk.softmax_fisher_diagonal]
            return [
                *(function(z, reduction="mean") for function in means),
                *(fk.covariance(z, reduction=reduction) for reduction in ("mean", "sum")),
                fk.head_fisher_mean_probs(z, W),
            ]

    W, tokens = cases.logits((7, V), torch.float32), torch.export.Dim("tokens", min=2, max=1000)
    operands = (cases.logits((T, V), torch.float32), W)
    exported = torch.export.export(Everything(), operands, dynamic_shapes=({0: tokens}, {}))
    z = cases.logits((3 * T, V), torch.float32, seed=1)
    for a, b in zip(exported.module()(z, W), Everything()(z, W), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif(SLOW, reason="the compiled graph holds the op itself: covered by the main run")
def test_sampling_and_destinations_compile(backend: str) -> None:
    z = cases.logits((T, V), torch.float32)

    def function(z: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        labels, gradients = fk.softmax_fisher_sample(z)
        fk.softmax_fisher_matvec(z, gradients, out=out)
        scratch = z.clone()
        fk.softmax_fisher_gradient_(scratch, labels)
        return out + 1, scratch

    torch.compiler.reset()
    out = torch.zeros_like(z)
    torch.manual_seed(0)
    result, gradient = torch.compile(function, fullgraph=True, backend="aot_eager")(z, out)
    assert torch.equal(result, out + 1)
    assert out.any()
    assert gradient.sum(-1).abs().max() < 1e-6


@pytest.mark.skipif(SLOW, reason="shapes are the same for every back end: covered by the main run")
def test_inductor_runs_the_ops_among_its_own_code(backend: str) -> None:
    z = cases.logits((T, V), torch.float32)

    def function(z: Tensor) -> Tensor:
        return fk.softmax_fisher_trace(z.sin() * 3) + fk.softmax_fisher_stats(z).entropy.cos()

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(function, fullgraph=True)(z), function(z))


@pytest.mark.parametrize("op", OPS, **IDS)
def test_fake_cuda_tensors_have_the_shapes_of_real_results(op: Op) -> None:
    z = cases.logits((2, 3, V), torch.bfloat16).cpu()
    operands = [x.cpu() for x in op.make(z, cases.generator(1))]
    real = cases.tensors(op.call(z, *operands))
    with FakeTensorMode():
        fake_z = torch.empty(z.shape, dtype=z.dtype, device="cuda")
        fakes = [torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in operands]
        fake = cases.tensors(op.call(fake_z, *fakes))
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.device.type) == (b.shape, b.dtype, "cuda")


@pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a CUDA device")
@pytest.mark.parametrize("op", OPS, **IDS)
def test_cuda_graph(backend: str, op: Op) -> None:
    if backend == "reference":
        pytest.skip("the reference is plain PyTorch, whose own graph support is not ours to test")
    z = cases.logits((T, 1000), torch.float32)
    operands = op.make(z, cases.generator(1))
    weights = torch.ones(T, device=DEVICE)
    expected = cases.tensors(op.call(z, *operands, weights=weights))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            op.call(z, *operands, weights=weights)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = cases.tensors(op.call(z, *operands, weights=weights))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(
    DEVICE != "cuda" or torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)
def test_second_device(backend: str) -> None:
    z = cases.logits((T, V), torch.float32)
    other = fk.softmax_fisher_trace(z.to("cuda:1"))
    assert other.device.index == 1
    assert torch.equal(other.to(z.device), fk.softmax_fisher_trace(z))
