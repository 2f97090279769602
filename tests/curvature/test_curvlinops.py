"""Captured curvature against curvlinops, and against the dense Fisher where that can be said.

The conventions of both, N the terms of the loss, a the inputs and g the gradients of its sum:

    here        A = Σ a aᵀ / rows, G = Σ g gᵀ / N: G ⊗ A is for the mean of the loss, whichever
                reduction was differentiated;
    curvlinops  the same A; with the mean of the loss the same G, with its sum N times as much.

Of "reduce" the rows are the means of inputs and the sums of gradients of each sample.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import DEVICE
from fisherkern.curvature import (
    BlockCurvature,
    Capture,
    EigenCurvature,
    KroneckerCurvature,
    LayerCurvature,
    capture,
)
from softmax_fisher.cases import error, generator

curvlinops = pytest.importorskip(
    "curvlinops", reason="`make` installs curvlinops without its dependencies"
)

# rounding of a few hundred sums, and of either side; far below any difference of convention
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
V = 4

Batch = tuple[Tensor, Tensor]


# ---- models and data ----------------------------------------------------------------------------


class Mean(nn.Module):
    """Over the positions of [B, S, d]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


class ClassesFirst(nn.Module):
    """Logits [B, S, V] as the losses of torch take them, [B, V, S]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mT


def linear(bias: bool) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, V, bias=bias))


def sequence(bias: bool) -> nn.Sequential:
    """Positions that are pooled before the logits."""
    shared = (nn.Linear(5, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias), nn.Tanh())
    return nn.Sequential(*shared, Mean(), nn.Linear(3, V, bias=bias))


def convolution(bias: bool) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=bias),
        nn.Tanh(),
        nn.Conv2d(3, 3, (2, 3), stride=(1, 2), padding=(0, 1), bias=bias),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(12, V, bias=bias),
    )


def tokens(bias: bool) -> nn.Sequential:
    """A term of the loss at every position."""
    return nn.Sequential(*linear(bias), ClassesFirst())


# model, shape of a sample, shape of its labels
NETWORKS: dict[str, tuple[Callable[[bool], nn.Sequential], tuple[int, ...], tuple[int, ...]]] = {
    "linear": (linear, (5,), ()),
    "sequence": (sequence, (3, 5), ()),
    # no narrower: else columns of a kernel meet the same pixels in all, A of "reduce" has equal
    # eigenvalues, zero, and Λ depends on the choice of their eigenvectors
    "convolution": (convolution, (2, 6, 8), ()),
    "tokens": (tokens, (3, 5), (3,)),
}
# more samples than any layer has inputs, for the same reason
SIZES = (14, 10)


def filled(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    g = generator(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * (1.5 / p[0].numel() ** 0.5))
    return model.to(DEVICE, dtype)


def data(
    inputs: tuple[int, ...], labels: tuple[int, ...], sizes: tuple[int, ...], dtype: torch.dtype
) -> list[Batch]:
    g = generator(2)
    batches = []
    for B in sizes:
        x = torch.randn(B, *inputs, generator=g, dtype=torch.float64)
        y = torch.randint(V, (B, *labels), generator=g)
        batches.append((x.to(DEVICE, dtype), y.to(DEVICE)))
    return batches


def network(name: str, bias: bool, dtype: torch.dtype) -> tuple[nn.Module, list[Batch]]:
    make, inputs, labels = NETWORKS[name]
    return filled(make(bias), dtype), data(inputs, labels, SIZES, dtype)


# ---- the three sides ----------------------------------------------------------------------------

Bases = dict[str, tuple[Tensor, Tensor]]


def captured(
    model: nn.Module,
    batches: list[Batch],
    reduction: str = "mean",
    bases: Bases | None = None,
    **options: Any,
) -> Capture:
    """What is captured in one pass over the batches, and a second one for "ekfac"."""
    loss = nn.CrossEntropyLoss(reduction=reduction)
    empirical = options["fisher_type"] == "empirical"

    def once(fisher: Capture) -> None:
        for x, y in batches:
            with fisher.batch(terms=y.numel() if empirical else None):
                outputs = model(x)
                if empirical:
                    loss(outputs, y).backward()
                else:
                    fisher.add(outputs.movedim(1, -1))

    with capture(model, loss_reduction=reduction, **options) as fisher:
        once(fisher)
        if fisher.structure == "ekfac":
            for name, curvature in fisher.layers.items():
                assert isinstance(curvature, EigenCurvature)
                curvature.refresh()
                if bases is not None:
                    curvature.bases = bases[name]
            once(fisher)
    return fisher


def referee(
    kind: str, model: nn.Module, batches: list[Batch], reduction: str, **options: Any
) -> tuple[Tensor, dict[str, dict[str, Tensor]]]:
    """The operator of curvlinops as a matrix, and what it is made of."""
    operator = getattr(curvlinops, kind)(
        model,
        nn.CrossEntropyLoss(reduction=reduction),
        list(model.parameters()),
        batches,
        check_deterministic=False,  # the check adds the factors up once more
        separate_weight_and_bias=False,
        **options,
    )
    dtype = batches[0][0].dtype
    matrix = operator @ torch.eye(operator.shape[0], dtype=dtype, device=DEVICE)
    return matrix, operator.state_dict()


def dense_fisher(model: nn.Module, batches: list[Batch], fisher_type: str) -> Tensor:
    """(1 / N) Σ Jᵀ H J over the terms of the loss, J from a gradient per logit, in float64."""
    model = copy.deepcopy(model).double()
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    z = model(x.double()).movedim(1, -1).flatten(0, -2)
    parameters = list(model.parameters())
    unit = torch.eye(z.numel(), dtype=z.dtype, device=z.device).view(-1, *z.shape)
    rows = torch.autograd.grad(z, parameters, unit, is_grads_batched=True)
    J = torch.cat([g.flatten(1) for g in rows], 1).view(*z.shape, -1)
    p = z.detach().softmax(-1)
    if fisher_type == "type-2":
        H = p.diag_embed() - p.unsqueeze(-1) * p.unsqueeze(-2)
    else:
        r = p - nn.functional.one_hot(y.flatten(), V)
        H = r.unsqueeze(-1) * r.unsqueeze(-2)
    return J.flatten(0, 1).mT @ (H @ J).flatten(0, 1) / len(z)


def basis(curvature: EigenCurvature) -> Tensor:
    """Q_G ⊗ Q_A."""
    assert curvature.bases is not None
    return torch.kron(*curvature.bases)


def block(curvature: LayerCurvature) -> Tensor:
    """The curvature of one layer as a dense matrix."""
    if isinstance(curvature, BlockCurvature):
        return curvature.matrix()
    if isinstance(curvature, EigenCurvature):
        Q = basis(curvature)
        return Q * curvature.eigenvalues().flatten() @ Q.mT
    assert isinstance(curvature, KroneckerCurvature)
    return torch.kron(*curvature.factors())


def part(matrix: Tensor, model: nn.Module, curvature: LayerCurvature) -> Tensor:
    """What a matrix over all parameters of the model has where that of :func:`block` is."""
    start, numbers = 0, {}
    for p in model.parameters():
        numbers[id(p)] = torch.arange(start, start + p.numel(), device=DEVICE).view(p.shape)
        start += p.numel()
    layer = curvature.layer
    i = layer.matrix({role: numbers[id(p)] for role, p in layer.parameters.items()}).flatten()
    return matrix[i][:, i]


def check_blocks(
    model: nn.Module, fisher: Capture, truth: Tensor, dtype: torch.dtype, scale: float = 1.0
) -> None:
    """Every parameter is covered, and `scale` times the block of every layer is that of `truth`."""
    assert fisher.uncovered() == {}
    for name, curvature in fisher.layers.items():
        expected = part(truth, model, curvature)
        assert error(block(curvature) * scale, expected) < TOLERANCE[dtype], name


def terms_if_summed(batches: list[Batch], reduction: str) -> int:
    return sum(y.numel() for _, y in batches) if reduction == "sum" else 1


# ---- curvlinops ---------------------------------------------------------------------------------

TYPES, APPROXIMATIONS = ("type-2", "empirical"), ("expand", "reduce")
# Type-2 "reduce" with several terms per sample is left out: curvlinops keeps products of gradients
# of positions whose labels are independent, here random signs are to average them away.
KFAC = [
    case
    for case in itertools.product(NETWORKS, TYPES, APPROXIMATIONS)
    if case != ("tokens", "type-2", "reduce")
]
ONE_TERM = ["linear", "sequence", "convolution"]  # per sample


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "fisher_type", "kfac_approx"), KFAC)
def test_kfac(
    name: str, fisher_type: str, kfac_approx: str, bias: bool, reduction: str, dtype: torch.dtype
) -> None:
    model, batches = network(name, bias, dtype)
    options = {"fisher_type": fisher_type, "kfac_approx": kfac_approx}
    fisher = captured(model, batches, reduction, **options)
    matrix, state = referee("KFACLinearOperator", model, batches, reduction, **options)
    N = terms_if_summed(batches, reduction)
    for layer, curvature in fisher.layers.items():
        assert isinstance(curvature, KroneckerCurvature)
        G, A = curvature.factors()
        assert error(A, state["input_covariances"][layer]) < TOLERANCE[dtype]
        assert error(G * N, state["gradient_covariances"][layer]) < TOLERANCE[dtype]
    check_blocks(model, fisher, matrix, dtype, N)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kfac_approx", APPROXIMATIONS)
@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ONE_TERM)  # curvlinops has no others
def test_ekfac(
    name: str, bias: bool, fisher_type: str, kfac_approx: str, reduction: str, dtype: torch.dtype
) -> None:
    model, batches = network(name, bias, dtype)
    options = {"fisher_type": fisher_type, "kfac_approx": kfac_approx}
    matrix, state = referee("EKFACLinearOperator", model, batches, reduction, **options)
    bases = None
    if dtype == torch.float32:
        # rounding turns eigenvectors by eps over the gap of their eigenvalues, and there are gaps
        # below 1e-2 here: both sides take one basis; in float64 each has its own
        left, right = (f"{side}_covariances_eigenvectors" for side in ("gradient", "input"))
        bases = {layer: (state[left][layer], state[right][layer]) for layer in state[left]}
    fisher = captured(model, batches, reduction, bases, structure="ekfac", **options)
    check_blocks(model, fisher, matrix, dtype, terms_if_summed(batches, reduction))


@pytest.mark.parametrize("name", ["sequence", "convolution"])
def test_the_approximations_differ(name: str) -> None:
    """Where weights are shared, so that the comparisons above tell them apart."""
    model, batches = network(name, True, torch.float64)
    expand, reduce = (
        block(captured(model, batches, fisher_type="type-2", kfac_approx=kfac_approx).layers["0"])
        for kfac_approx in APPROXIMATIONS
    )
    assert error(expand, reduce) > 0.1


# ---- the dense Fisher ---------------------------------------------------------------------------


def deep_linear(bias: bool) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(m, n, bias=bias) for m, n in ((5, 6), (6, 3), (3, V))))


def deep_linear_sequence(bias: bool) -> nn.Sequential:
    first, second, last = deep_linear(bias)
    return nn.Sequential(first, second, Mean(), last)


def linear_convolution(bias: bool) -> nn.Sequential:
    pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
    shared = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=bias)
    return nn.Sequential(shared, *pool, nn.Linear(3, V, bias=bias))


# what a datum is, and for which approximation one is enough
EXACT = [
    (deep_linear, (5,), "expand"),
    (deep_linear, (5,), "reduce"),
    (deep_linear_sequence, (3, 5), "reduce"),
    (linear_convolution, (2, 6, 5), "reduce"),
]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("make", "inputs", "kfac_approx"), EXACT)
def test_one_datum_of_a_linear_network_is_exact(
    make: Callable[[bool], nn.Module],
    inputs: tuple[int, ...],
    kfac_approx: str,
    bias: bool,
    fisher_type: str,
    structure: str,
    dtype: torch.dtype,
) -> None:
    """Its outputs are linear in a product of one input, or mean input, and one gradient."""
    model, batches = filled(make(bias), dtype), data(inputs, (), (1,), dtype)
    options = {"fisher_type": fisher_type, "kfac_approx": kfac_approx, "structure": structure}
    fisher = captured(model, batches, **options)
    check_blocks(model, fisher, dense_fisher(model, batches, fisher_type), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("positions", [(), (3,)])
@pytest.mark.parametrize("bias", [True, False])
def test_one_layer_of_equal_probabilities_is_exact(
    bias: bool, positions: tuple[int, ...], dtype: torch.dtype
) -> None:
    """With a weight of zero every term has the same H, and F = H ⊗ A."""
    last = (ClassesFirst(),) if positions else ()
    model = filled(nn.Sequential(nn.Linear(5, V, bias=bias), *last), dtype)
    with torch.no_grad():
        next(model.parameters()).zero_()
    batches = data((*positions, 5), positions, SIZES, dtype)
    fisher = captured(model, batches, fisher_type="type-2")
    check_blocks(model, fisher, dense_fisher(model, batches, "type-2"), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ONE_TERM)
def test_blocks_and_moments_of_ekfac_are_exact_in_any_network(
    name: str, bias: bool, fisher_type: str, dtype: torch.dtype
) -> None:
    """Λ = diag Qᵀ F Q for the basis Q that was taken."""
    model, batches = network(name, bias, dtype)
    truth = dense_fisher(model, batches, fisher_type)
    blocks = captured(model, batches, structure="block", fisher_type=fisher_type)
    check_blocks(model, blocks, truth, dtype)
    for kfac_approx in APPROXIMATIONS:
        options = {"fisher_type": fisher_type, "kfac_approx": kfac_approx}
        for curvature in captured(model, batches, structure="ekfac", **options).layers.values():
            assert isinstance(curvature, EigenCurvature)
            Q = basis(curvature).double()
            expected = (Q.mT @ part(truth, model, curvature) @ Q).diagonal()
            assert error(curvature.eigenvalues().flatten(), expected) < TOLERANCE[dtype]
