"""Factors of real layers: unfolded patches, one-hot inputs, and the gradients of autograd."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fisherkern as fk
from conftest import DEVICE, SLOW
from covariance import cases
from fisherkern import reference


@pytest.mark.parametrize("workspace", [1, 4000, 1 << 24])
@pytest.mark.parametrize("dims", [1, 2])
def test_patches_are_those_the_convolution_sees(backend: str, dims: int, workspace: int) -> None:
    """Σ over positions of weight · patch is the output: so A gives the norm of the outputs."""
    layer = (nn.Conv1d if dims == 1 else nn.Conv2d)(
        4, 6, 3, stride=2, padding=1, dilation=2, groups=2, dtype=torch.float64
    )
    x = torch.randn(3, 4, *(9, 7)[:dims], generator=cases.generator(0), dtype=torch.float64)
    outputs = layer(x).detach().movedim(1, -1).flatten(0, -2)
    D = 2 * 3**dims + 1
    dtype = torch.float64 if backend in ("cpp", "reference") else torch.float32
    A = torch.zeros(2, D, D, dtype=dtype, device=DEVICE)
    fk.convolution_covariance_update_(
        A,
        x.to(dtype).to(DEVICE),
        3,
        stride=2,
        padding=1,
        dilation=2,
        groups=2,
        bias=True,
        ema_decay=0.0,
        reduction="sum",
        workspace=workspace,
    )
    assert layer.bias is not None
    w = torch.cat([layer.weight.flatten(1), layer.bias[:, None]], 1).detach().view(2, 3, -1)
    norms = torch.einsum("goi,gij,goj->go", w, A.double().cpu(), w).flatten()
    assert cases.error(norms, outputs.square().sum(0)) < (1e-12 if dtype == torch.float64 else 1e-5)


def test_embedding_counts_are_the_one_hot_covariance(backend: str) -> None:
    i = torch.tensor([[0, 3, 3], [9, -7, 1]], device=DEVICE)
    w = torch.tensor([[1.0, 0.5, 2.0], [0.0, 0.0, 1.5]], device=DEVICE)
    counts = fk.embedding_counts(i, 5, weights=w)
    one_hot = nn.functional.one_hot(i.clamp(0, 4), 5).float()
    torch.testing.assert_close(counts.diag(), fk.covariance(one_hot, weights=w))
    mask = w != 0
    expected = reference.embedding_counts(i, 5, mask=mask, reduction="sum")
    assert torch.equal(fk.embedding_counts(i, 5, mask=mask, reduction="sum"), expected)
    none = torch.zeros_like(mask)
    assert (fk.embedding_counts(i, 5, mask=none) == 0).all()
    assert (fk.embedding_counts(i[:0], 5) == 0).all()


def test_squared_gradients_are_those_of_autograd(backend: str) -> None:
    """Per sample over a sequence, and per token, for a linear layer with bias."""
    layer = nn.Linear(5, 3).to(DEVICE)
    x = torch.randn(4, 6, 5, generator=cases.generator(0)).to(DEVICE)
    y = torch.randn(4, 6, 3, generator=cases.generator(1)).to(DEVICE)

    def gradient(xs: torch.Tensor, ys: torch.Tensor) -> torch.Tensor:
        loss = (layer(xs) - ys).square().sum()
        w, b = torch.autograd.grad(loss, list(layer.parameters()))
        return torch.cat([w, b[:, None]], 1)

    g = 2 * (layer(x) - y).detach()
    for per_sample, pieces in (
        (True, [(x[i], y[i]) for i in range(4)]),
        (
            False,
            [(a[None], b[None]) for a, b in zip(x.flatten(0, 1), y.flatten(0, 1), strict=True)],
        ),
    ):
        D = torch.zeros(3, 6, device=DEVICE)
        fk.squared_gradient_update_(
            D, x, g, ema_decay=None, bias=True, per_sample=per_sample, reduction="sum"
        )
        expected = sum(gradient(a, b).square() for a, b in pieces)
        torch.testing.assert_close(D, expected, rtol=1e-5, atol=1e-5)
    expected = gradient(x, y)
    torch.testing.assert_close(
        fk.cross_covariance(g, x, bias=True, reduction="sum"), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.skipif(SLOW, reason="a matter of memory, not of kernels")
def test_offsets_past_two_to_the_31(backend: str) -> None:
    """An expanded batch of more elements than an int32 counts, without the memory."""
    if backend == "reference":
        pytest.skip("the reference makes float64 copies")
    row = torch.randn(1, 64, generator=cases.generator(0)).to(torch.bfloat16).to(DEVICE)
    x = row.expand((1 << 25) + 1, 64)
    mask = torch.zeros(len(x), dtype=torch.bool, device=DEVICE)
    mask[-1] = True
    expected = row.double().T @ row.double()
    assert cases.error(fk.covariance(x, mask=mask), expected) < 1e-6
