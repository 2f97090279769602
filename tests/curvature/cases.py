"""Small nets in float64, and their Fisher by autograd: one backward pass per term and class.

Notation: N terms of the loss, V classes, B samples of S positions; rows x̃ of inputs and g of output
gradients are [B, S, d].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherkern.curvature import Capture, EMACovariance, capture

V = 4
B = 3
# both sides are float64 sums of at most 10³ products
EXACT = 1e-12


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def labels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(V, shape, generator=generator(seed + 100))


def filled(model: nn.Module, seed: int = 1) -> Any:
    """The model in float64, with weights of its own."""
    g = generator(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=g))
    return model.double()


def error(found: Tensor, truth: Tensor) -> float:
    """Relative, in the Euclidean norm; infinite where something is not finite."""
    assert found.shape == truth.shape, (found.shape, truth.shape)
    if not bool(found.isfinite().all()):
        return math.inf
    distance, scale = float((found - truth).norm()), float(truth.norm())
    return distance / scale if scale else distance


def averages(fisher: Capture) -> dict[str, Tensor]:
    """Every average of every layer, and every count."""
    found = {}
    for name, layer in fisher.layers.items():
        for key, average in layer.averages.items():
            whole = isinstance(average, EMACovariance)
            found[f"{name}.{key}"] = average.factor() if whole else average.mean()
            found[f"{name}.{key}.count"] = average.count
    return found


def assert_same(one: Capture, other: Capture, bits: bool = False) -> None:
    """The same averages and counts: bit by bit, or but for rounding."""
    mine, theirs = averages(one), averages(other)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.isfinite().all(), name
        if bits:
            assert torch.equal(value, theirs[name]), name
        else:
            assert error(theirs[name], value) < EXACT, name


# ---- layers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A layer, the shape of its input per sample, and what its rows are."""

    id: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    rows: Callable[[nn.Module, Tensor], Tensor]

    def inputs(self, samples: int = B, seed: int = 0) -> Tensor:
        return drawn(samples, *self.shape, seed=seed)


def tokens(x: Tensor) -> Tensor:
    """[B, S, d] of [B, *positions, d]."""
    return x.reshape(len(x), -1, x.shape[-1])


def channels_last(y: Tensor) -> Tensor:
    """[B, S, C] of [B, C, *positions]."""
    return y.flatten(2).mT


def patches(module: Any, x: Tensor) -> Tensor:
    """[B, S, C Π kernel], position by position."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    padding = module.padding
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True))
    elif padding == "valid":
        padding = (0,) * len(kernel)
    if x.ndim == 3:
        x, one = x.unsqueeze(2), (1,)
        kernel, stride, dilation = one + kernel, one + stride, one + dilation
        padding = (0, *padding)
    x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    rows = [
        x[:, :, i : i + spans[0] : dilation[0], j : j + spans[1] : dilation[1]].flatten(1)
        for i in range(0, x.shape[2] - spans[0] + 1, stride[0])
        for j in range(0, x.shape[3] - spans[1] + 1, stride[1])
    ]
    return torch.stack(rows, 1)


def conv1d_of_transformers(nx: int, nf: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(nf, nx)


LINEAR = [
    Case("linear", lambda: nn.Linear(3, 4), (3,), lambda m, x: tokens(x)),
    Case("linear-tokens", lambda: nn.Linear(3, 4), (5, 3), lambda m, x: tokens(x)),
    Case("linear-images", lambda: nn.Linear(3, 2), (2, 3, 3), lambda m, x: tokens(x)),
    Case("linear-no-bias", lambda: nn.Linear(3, 4, bias=False), (5, 3), lambda m, x: tokens(x)),
    Case("transposed", lambda: conv1d_of_transformers(3, 4), (5, 3), lambda m, x: tokens(x)),
]
CONVOLUTIONS = [
    Case("conv1d", lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 7), patches),
    Case("conv1d-dilated", lambda: nn.Conv1d(2, 3, 2, dilation=3, bias=False), (2, 7), patches),
    Case("conv1d-same", lambda: nn.Conv1d(2, 3, 3, dilation=2, padding="same"), (2, 5), patches),
    Case(
        "conv2d",
        lambda: nn.Conv2d(2, 3, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        (2, 4, 6),
        patches,
    ),
    Case("conv2d-same", lambda: nn.Conv2d(2, 3, 3, padding="same"), (2, 3, 2), patches),
    Case("conv2d-valid", lambda: nn.Conv2d(2, 3, 2, padding="valid"), (2, 3, 3), patches),
]


def matrix(module: nn.Module, values: dict[str, Tensor]) -> Tensor:
    """Values of the parameters as the matrix [d_out, d_in (+ 1)] of the layer, by hand."""
    if isinstance(module, nn.Embedding):
        return values["weight"].T
    if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("RMSNorm"):
        return torch.cat([v.flatten() for v in values.values()])[:, None]
    weight = values["weight"]
    weight = weight.T if type(module).__name__ == "Conv1D" else weight.flatten(1)
    return torch.cat([weight, values["bias"][:, None]], 1) if "bias" in values else weight


# ---- norms ---------------------------------------------------------------------------------------


def centred(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()


def scaled(x: Tensor, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


def llama_norm() -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    return LlamaRMSNorm(4)


def gemma_norm() -> nn.Module:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    return Gemma3RMSNorm(4)


# transformers' norms compute in float32 whatever they are given
NORMS = {
    "layer": (lambda: nn.LayerNorm(4), centred, EXACT),
    "layer-no-bias": (lambda: nn.LayerNorm(4, bias=False), centred, EXACT),
    "rms": (lambda: nn.RMSNorm(4, eps=1e-6), scaled, EXACT),
    "rms-eps-of-the-dtype": (
        lambda: nn.RMSNorm(4, dtype=torch.float64),
        lambda x: scaled(x, 2.0**-52),
        EXACT,
    ),
    "llama": (llama_norm, scaled, 1e-6),
    "gemma": (gemma_norm, scaled, 1e-6),
}


def scores(model: nn.Module, normalised: Tensor, g: Tensor) -> Tensor:
    """The gradient of weight and bias per token."""
    parts = [g * normalised]
    if getattr(model.layer, "bias", None) is not None:
        parts.append(g)
    return torch.cat(parts, -1)


# ---- nets ---------------------------------------------------------------------------------------


class Net(nn.Module):
    """A layer, tanh, and a fixed readout of all positions: one term of the loss per sample."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.layer(x)
        if mask is not None:  # over the first dimensions of y
            y = torch.where(mask.reshape(*mask.shape, *(1,) * (y.ndim - mask.ndim)), y, 0.0)
        h = y.tanh().flatten(1)
        return h @ drawn(h.shape[1], V, seed=7)


class TokenNet(nn.Module):
    """A layer, tanh, and a readout of each position: a term of the loss per token."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x).tanh()
        return h @ drawn(h.shape[-1], V, seed=7)


@contextmanager
def watched(module: nn.Module) -> Iterator[list[Tensor]]:
    """What a module returns, call by call."""
    outputs: list[Tensor] = []
    handle = module.register_forward_hook(lambda m, args, y: outputs.append(y))
    try:
        yield outputs
    finally:
        handle.remove()


# ---- truths -------------------------------------------------------------------------------------


def softmax_fisher(z: Tensor) -> Tensor:
    """diag p − p pᵀ of one token."""
    p = z.detach().softmax(-1)
    return p.diag() - torch.outer(p, p)


def jacobian(z: Tensor, of: Tensor) -> Tensor:
    """[V, *of.shape] of the logits [V] of one token."""
    rows = [torch.autograd.grad(c, of, retain_graph=True, allow_unused=True)[0] for c in z]
    return torch.stack([torch.zeros_like(of) if row is None else row for row in rows])


def terms(logits: Tensor, mask: Tensor | None = None) -> list[Tensor]:
    """The logits [V] of every term that counts."""
    flat = logits.reshape(-1, logits.shape[-1])
    return list(flat if mask is None else flat[mask.reshape(-1)])


def type_2(logits: Tensor, y: Tensor, rows: Callable[[Tensor], Tensor], mask: Any = None) -> Tensor:
    """(1/N) Σ over terms of Σ over rows of E[g gᵀ], g the gradients in y of one term."""
    chosen = terms(logits, mask)
    total: Any = 0.0
    for z in chosen:
        g = torch.stack([rows(c) for c in jacobian(z, y)])
        total = total + torch.einsum("cri,ce,erj->ij", g, softmax_fisher(z), g)
    return total / len(chosen)


def empirical(
    logits: Tensor, y: Tensor, labels: Tensor, rows: Callable[[Tensor], Tensor], mask: Any = None
) -> Tensor:
    """(1/N) Σ over rows of g gᵀ, g the gradients in y of the sum of the losses."""
    chosen = torch.stack(terms(logits, mask))
    targets = labels.reshape(-1) if mask is None else labels.reshape(-1)[mask.reshape(-1)]
    loss = functional.cross_entropy(chosen, targets, reduction="sum")
    g = rows(torch.autograd.grad(loss, y, retain_graph=True)[0])
    return g.T @ g / len(chosen)


def summed(rows: Tensor, mask: Tensor | None, approx: str) -> Tensor:
    """Rows [B, S, d] of gradients as [R, d]: those that count, or their sums over positions."""
    kept = torch.ones(rows.shape[:2], dtype=torch.bool) if mask is None else mask
    if approx == "expand":
        return rows[kept]
    return torch.where(kept[..., None], rows, 0.0).sum(1)[kept.any(1)]


def averaged(rows: Tensor, mask: Tensor | None, approx: str, bias: bool) -> Tensor:
    """A = mean of x̃ x̃ᵀ over rows [B, S, d] of inputs, or over their means over positions."""
    kept = torch.ones(rows.shape[:2], dtype=torch.bool) if mask is None else mask
    if approx == "expand":
        x = rows[kept]
    else:
        means = torch.where(kept[..., None], rows, 0.0).sum(1) / kept.sum(1, keepdim=True)
        x = means[kept.any(1)]
    if bias:
        x = torch.cat([x, x.new_ones(len(x), 1)], 1)
    return x.T @ x / len(x)


def block(
    model: nn.Module, module: nn.Module, logits: Tensor, mask: Tensor | None = None
) -> Tensor:
    """(1/N) Σ over terms of Jᵀ F J [P, P], J in the matrix of a module, row by row."""
    named = {k: p for k, p in module.named_parameters(recurse=False) if p.requires_grad}
    chosen = terms(logits, mask)
    total: Any = 0.0
    for z in chosen:
        parts = {name: jacobian(z, p) for name, p in named.items()}
        J = torch.stack(
            [matrix(module, {k: v[c] for k, v in parts.items()}).flatten() for c in range(V)]
        )
        total = total + J.T @ softmax_fisher(z) @ J
    return total / len(chosen)


# ---- what is captured ---------------------------------------------------------------------------

TYPES = ("type-2", "empirical-mean", "empirical-sum")


def captured(
    model: nn.Module,
    x: Tensor,
    fisher_type: str = "type-2",
    mask: Tensor | None = None,
    over: Tensor | None = None,
    arguments: tuple[Any, ...] = (),
    **options: Any,
) -> Capture:
    """`mask`: of the batch; `over`: of the terms."""
    kind, reduction = fisher_type, "mean"
    if fisher_type.startswith("empirical-"):
        kind, reduction = "empirical", fisher_type.removeprefix("empirical-")
    with capture(model, fisher_type=kind, loss_reduction=reduction, **options) as fisher:
        if kind != "empirical":
            with fisher.batch(mask=mask):
                fisher.add(model(x, *arguments), mask=over)
            return fisher
        logits = model(x, *arguments)
        y = labels(*logits.shape[:-1])
        kept = torch.ones_like(y, dtype=torch.bool) if over is None else over
        with fisher.batch(mask=mask, terms=kept.sum()):
            logits = model(x, *arguments)
            functional.cross_entropy(logits[kept], y[kept], reduction=reduction).backward()
    return fisher


def output_factor(
    model: nn.Module,
    x: Tensor,
    fisher_type: str,
    rows: Any,
    over: Tensor | None = None,
    arguments: tuple[Any, ...] = (),
) -> Tensor:
    with watched(model.layer) as outputs:
        logits = model(x, *arguments)
    if fisher_type == "type-2":
        return type_2(logits, outputs[0], rows, over)
    return empirical(logits, outputs[0], labels(*logits.shape[:-1]), rows, over)
