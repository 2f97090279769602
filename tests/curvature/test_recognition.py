"""Which modules have a rule: those whose forward pass is that of the rule, and no others."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import cases
from curvature.cases import EXACT, Net
from fisherkern.curvature import Capture

# ---- forward passes that are those of no rule ---------------------------------------------------


class ScaledLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * 0.1, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, w / w.std((1, 2, 3), keepdim=True), self.bias)


class Causal(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(functional.pad(x, (2, 0)))


class Positions(nn.Embedding):
    """As of OPT: what it is given is a mask, its indices it counts by itself."""

    def forward(self, mask: Tensor, past: int = 0) -> Tensor:
        return super().forward(mask.cumsum(1) * mask + past)


class TwentyFour(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 24.0


class Offset(nn.Embedding):
    """It has the attribute of scaled embeddings, but is none."""

    embed_scale = 2.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale + super().forward(x).square()


class ChannelsFirst(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mT).mT


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def root(self, x: Tensor) -> Tensor:
        return (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class GatedRMSNorm(Gated):
    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        return self.weight * x / self.root(x) * (1.0 if gate is None else gate)


class InputScaledRMSNorm(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight / self.root(x * self.weight)


class OutsideRMSNorm(Gated):
    """eps outside of the root: seen only where inputs are small."""

    def root(self, x: Tensor) -> Tensor:
        return x.square().mean(-1, keepdim=True).sqrt() + self.eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x / self.root(x)


def replaced() -> nn.Module:
    module = nn.Linear(3, 4)
    module.forward = lambda x: nn.Linear.forward(module, 2 * x)  # type: ignore[method-assign]
    return module


OWN = "a subclass of {} with a forward of its own"


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: ScaledLinear(3, 4), OWN.format("Linear")),
        (lambda: Standardised(3, 4, 3), OWN.format("Conv2d")),
        (lambda: Causal(2, 3, 3), OWN.format("Conv1d")),
        (lambda: Positions(6, 3), OWN.format("Embedding")),
        (lambda: TwentyFour(6, 3), OWN.format("Embedding")),
        (lambda: Offset(6, 3), OWN.format("Embedding")),
        (lambda: ChannelsFirst(4), OWN.format("LayerNorm")),
        (lambda: GatedRMSNorm(4), OWN.format("RMSNorm")),
        (lambda: InputScaledRMSNorm(4), OWN.format("RMSNorm")),
        (lambda: OutsideRMSNorm(4), OWN.format("RMSNorm")),
        (replaced, "its forward was replaced: it is that of Linear no more"),
    ],
)
def test_a_forward_that_is_not_that_of_the_rule(make: Callable[[], nn.Module], reason: str) -> None:
    fisher = Capture(nn.ModuleDict({"one": nn.Linear(2, 2), "other": make()}))
    assert list(fisher.layers) == ["one"]
    assert set(fisher.uncovered().values()) == {reason}
    assert "other.weight" in fisher.uncovered()


# ---- those that are -----------------------------------------------------------------------------


class Renamed(nn.Linear):
    """A subclass that changes nothing of the forward pass."""


class Plus1(nn.LayerNorm):
    """As of Nemotron: a forward pass of its own whose gradient is that of the rule."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


def accelerated() -> nn.Module:
    hooks = pytest.importorskip("accelerate.hooks")
    module = nn.Linear(4, 3)
    hooks.add_hook_to_module(module, hooks.AlignDevicesHook(io_same_device=True))
    assert "forward" in vars(module)
    return module


def bound() -> nn.Module:
    """What kernels for norms do: a function of the module in place of its method."""
    module = nn.RMSNorm(4, eps=1e-3)

    def forward(self: Any, x: Tensor) -> Tensor:
        root = (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        return x * root * self.weight

    module.forward = types.MethodType(forward, module)  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize("make", [lambda: Renamed(4, 3), lambda: Plus1(4), accelerated, bound])
def test_a_forward_that_is_that_of_the_rule(make: Callable[[], nn.Module]) -> None:
    model, x = cases.filled(Net(make())), cases.drawn(3, 5, 4)
    fisher = cases.captured(model, x, structure="block", kfac_approx="reduce")
    assert fisher.uncovered() == {}
    truth = cases.block(model, model.layer, model(x))
    assert cases.error(fisher.layers["layer"].matrix(), truth) < EXACT  # type: ignore[attr-defined]


def gemma_embedding() -> nn.Module:
    gemma3 = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    return gemma3.Gemma3TextScaledWordEmbedding(6, 3, 2, 1.7)


def bart_embedding() -> nn.Module:
    bart = pytest.importorskip("transformers.models.bart.modeling_bart")
    return bart.BartScaledWordEmbedding(6, 3, 2, 1.7)


@pytest.mark.parametrize("structure", ["diagonal", "block", "kfac"])
@pytest.mark.parametrize("make", [gemma_embedding, bart_embedding])
def test_scaled_embeddings(make: Callable[[], nn.Module], structure: str) -> None:
    """Gradients of the rows are those of the outputs, times the scale."""
    model = cases.filled(Net(make()))
    x = torch.tensor([[1, 1, 2, 5], [0, 3, 2, 1], [4, 4, 4, 0]])
    fisher = cases.captured(model, x, structure=structure)
    assert fisher.uncovered() == {}
    layer = fisher.layers["layer"]
    with cases.watched(model.layer) as outputs:
        logits = model(x)
    if structure == "kfac":
        kept = x != 2  # the padding index
        rows = lambda g: float(model.layer.embed_scale) * g[kept]  # noqa: E731
        G, A = layer.factors()  # type: ignore[attr-defined]
        assert cases.error(G, cases.type_2(logits, outputs[0], rows)) < EXACT
        assert cases.error(A, torch.bincount(x[kept], minlength=6).double() / kept.sum()) < EXACT
        return
    truth = cases.block(model, model.layer, logits).diagonal().view(3, 6).T
    assert cases.error(layer.diagonal()["weight"], truth) < EXACT


def test_embeddings_that_share_a_weight_but_not_a_scale() -> None:
    class Both(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.one, self.two = bart_embedding(), bart_embedding()
            self.two.weight, self.two.embed_scale = self.one.weight, scale
            self.head = nn.Linear(3, 4)

    assert list(Capture(Both(1.7)).layers) == ["one", "head"]
    fisher = Capture(Both(2.0))
    assert list(fisher.layers) == ["head"]
    assert fisher.uncovered() == {"one.weight": "shares its weight, but not its scale, with two"}


# ---- the trial leaves no trace ------------------------------------------------------------------


class NosyRMSNorm(Gated):
    """It draws, counts its calls, and writes to a buffer."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("calls", torch.zeros(()))
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        return self.weight * x / self.root(x)


@pytest.mark.parametrize("inference", [False, True])
def test_a_trial_changes_nothing(inference: bool) -> None:
    norm, called = NosyRMSNorm(4), []
    norm.register_forward_hook(lambda *call: called.append(call))
    with torch.no_grad():
        norm.weight.copy_(torch.arange(4.0))
    before, state = copy.deepcopy(norm.state_dict()), torch.get_rng_state()
    with torch.inference_mode(inference):
        fisher = Capture(norm)
    assert list(fisher.layers) == [""]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, norm.state_dict().values(), before.values()))
    assert norm.weight.grad is None
    assert norm.seen == 0
    assert called == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("make", [cases.llama_norm, cases.gemma_norm])
def test_norms_of_every_dtype(make: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    assert list(Capture(make().to(dtype)).layers) == [""]
    with torch.device("meta"):
        assert list(Capture(make().to(dtype)).layers) == [""]


# ---- parameters without a shape -----------------------------------------------------------------


def test_lazy_layers() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4))
    with pytest.raises(ValueError) as caught:
        Capture(model)
    assert str(caught.value) == (
        "model has a LazyLinear as 1, whose parameters have no shapes yet: run the model once "
        "first, or leave the layer out with `layers`"
    )
    assert list(Capture(model, layers=["0"]).layers) == ["0"]
    model(torch.ones(2, 3))
    assert list(Capture(model).layers) == ["0", "1"]
