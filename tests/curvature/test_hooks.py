"""Hooks: they leave no trace, and meet every call of a module, however it is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import cases
from curvature.cases import EXACT, TokenNet
from fisherkern.curvature import Capture, capture

TYPES = ("type-2", "mc", "empirical")
STRUCTURES = ("kfac", "ekfac", "diagonal", "block")


class Zoo(nn.Module):
    """Every kind of layer, in-place operations, attention, and a dropout that draws."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.convolution = nn.Conv1d(4, 4, 3, padding=1)
        self.norm, self.rms = nn.LayerNorm(4), nn.RMSNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.up, self.down = nn.Linear(4, 5), nn.Linear(5, 4, bias=False)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, cases.V)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x)
        h += 1.0
        h = self.convolution(h.mT).relu_().mT
        h = h + self.attention(*(self.norm(h),) * 3)[0]
        h = h + self.down(functional.relu_(self.up(self.rms(h))))
        return self.head(self.dropout(h))


INDICES = torch.tensor([[1, 1, 0, 5, 2], [2, 0, 3, 2, 4]])


def loss_of(logits: Tensor) -> Tensor:
    return functional.cross_entropy(
        logits.flatten(0, -2), cases.labels(*logits.shape[:-1]).view(-1)
    )


def run(fisher: Capture, model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """A batch of the capture, with the backward pass of the loss in it."""
    with fisher.batch(terms=1 if fisher.fisher_type == "empirical" else None):
        logits = model(*args, **kwargs)
        if fisher.fisher_type != "empirical":
            fisher.add(logits)
        loss_of(logits).backward()


# ---- no trace -----------------------------------------------------------------------------------


def hooks_of(model: nn.Module) -> list[dict[str, Any]]:
    """Everything modules keep that is no parameter, buffer or module."""
    return [
        {k: dict(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
        for module in model.modules()
    ]


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("fisher_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_training_step_is_the_same_bits(
    dtype: torch.dtype, fisher_type: str, structure: str
) -> None:
    model = cases.filled(Zoo()).to(dtype)
    before = hooks_of(model)
    results = []
    fisher = Capture(model, fisher_type=fisher_type, structure=structure)
    for captured in (False, True, False):
        model.zero_grad()
        torch.manual_seed(0)
        if captured:
            with fisher.attach().batch(terms=10 if fisher_type == "empirical" else None):
                logits = model(INDICES)
                loss = loss_of(logits)
                if fisher_type != "empirical":
                    fisher.add(logits)
                loss.backward()
            fisher.detach()
        else:
            logits = model(INDICES)
            loss = loss_of(logits)
            loss.backward()
        results.append([logits.detach(), loss.detach(), *(p.grad for p in model.parameters())])
    for one, other, after in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, after)
    assert hooks_of(model) == before
    assert fisher.layers["head"].diagonal()["weight"].norm() > 0


def test_a_copy_of_the_model_is_not_followed() -> None:
    """It takes the hooks along, as deep copies of modules do."""
    model = cases.filled(Zoo())
    with capture(model, fisher_type="empirical") as fisher, fisher.batch(terms=10):
        copied = copy.deepcopy(model)
        loss_of(copied(INDICES)).backward()
        assert not any(layer.diagonal()["weight"].any() for layer in fisher.layers.values())
        loss_of(model(INDICES)).backward()
    assert fisher.layers["head"].diagonal()["weight"].any()


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
def test_add_leaves_gradients_alone(fisher_type: str) -> None:
    model = cases.filled(Zoo())
    with capture(model, fisher_type=fisher_type) as fisher:
        with fisher.batch():
            fisher.add(model(INDICES))
        assert all(p.grad is None for p in model.parameters())
        for p in model.parameters():
            p.grad = torch.full_like(p, 3.0)
        with fisher.batch():
            fisher.add(model(INDICES))
    assert all((p.grad == 3).all() for p in model.parameters())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_loss_can_be_added_without_gradients_of_parameters(structure: str) -> None:
    model = cases.filled(Zoo()).eval()
    one, other = (Capture(model, fisher_type="empirical", structure=structure) for _ in range(2))
    with one, one.batch(terms=10):
        one.add_loss(loss_of(model(INDICES)))
    assert all(p.grad is None for p in model.parameters())
    with other, other.batch(terms=10):
        loss_of(model(INDICES)).backward()
    cases.assert_same(one, other, bits=True)


def test_inputs_that_require_grad_get_it() -> None:
    model = cases.filled(cases.Net(nn.Linear(3, 4)))
    gradients = []
    for attached in (False, True):
        x = cases.drawn(2, 3).requires_grad_()
        fisher = Capture(model, fisher_type="empirical")
        if attached:
            with fisher, fisher.batch(terms=2):
                loss_of(model(x)).backward()
        else:
            loss_of(model(x)).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_outside_of_batches_nothing_is_followed() -> None:
    model = cases.filled(Zoo())
    with capture(model, fisher_type="empirical") as fisher:
        loss_of(model(INDICES)).backward()
        run(fisher, model, INDICES)
        before = cases.averages(fisher)
        loss_of(model(INDICES)).backward()
    with capture(model, fisher_type="empirical") as other:
        run(other, model, INDICES)
    model(INDICES)
    after = cases.averages(fisher)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert fisher.layers["head"].G.count == other.layers["head"].G.count == 1


def test_two_captures_of_one_model() -> None:
    model, x = cases.filled(Zoo()).eval(), INDICES
    one, two = (Capture(model, fisher_type="type-2") for _ in range(2))
    with one, two, one.batch(), two.batch():
        logits = model(x)
        one.add(logits)
        two.add(logits)
    cases.assert_same(one, two)
    cases.assert_same(one, cases.captured(model, x))


# ---- calls --------------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """One layer, called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.layer(x).tanh()
        return x @ cases.drawn(3, cases.V, seed=7)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical-mean"])
def test_a_module_that_is_called_several_times(fisher_type: str) -> None:
    """A is over the rows of all calls, G is summed over calls and averaged over terms."""
    model, x = cases.filled(Recurrent()), cases.drawn(4, 3)
    layer = cases.captured(model, x, fisher_type).layers["layer"]
    with cases.watched(model.layer) as outputs:
        logits = model(x)
    inputs = torch.cat([x, *(y.tanh() for y in outputs[:2])]).detach().unsqueeze(1)
    rows = lambda g: g  # noqa: E731
    if fisher_type == "type-2":
        truth = sum(cases.type_2(logits, y, rows) for y in outputs)
    else:
        truth = sum(cases.empirical(logits, y, cases.labels(4), rows) for y in outputs)
    assert cases.error(layer.G.factor(), truth) < EXACT
    assert cases.error(layer.A.factor(), cases.averaged(inputs, None, "expand", True)) < EXACT
    assert layer.G.count == 4
    assert layer.A.count == 12


class Shared(nn.Module):
    """One weight in two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh()).tanh() @ cases.drawn(3, cases.V, seed=7)


def test_modules_that_share_a_weight_are_one_layer() -> None:
    model, x = cases.filled(Shared()), cases.drawn(4, 3)
    fisher = cases.captured(model, x)
    assert list(fisher.layers) == ["one"]
    assert fisher.uncovered() == {}
    with cases.watched(model.one) as one, cases.watched(model.two) as two:
        logits = model(x)
    truth = sum(cases.type_2(logits, y, lambda g: g) for y in (one[0], two[0]))
    assert cases.error(fisher.layers["one"].G.factor(), truth) < EXACT
    assert fisher.layers["one"].A.count == 8


def test_modules_that_share_a_weight_but_not_a_bias() -> None:
    model = Shared()
    model.one.bias, model.two.bias = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    fisher = cases.captured(cases.filled(model), cases.drawn(4, 3))
    assert list(fisher.layers) == ["one"]
    assert fisher.uncovered() == {"two.bias": "shares its weight, but not its bias, with one"}
    assert fisher.layers["one"].A.count == 4


class Tied(nn.Module):
    """An encoder, a decoder and a head of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Embedding(6, 3), nn.Embedding(6, 3)
        self.head = nn.Linear(3, 6, bias=False)
        self.decoder.weight = self.head.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.encoder(x) + self.decoder(x.flip(0))).tanh())


def test_of_tied_embeddings_and_a_head_the_head_is_taken() -> None:
    model, x = cases.filled(Tied()), torch.tensor([1, 5, 2, 2])
    fisher = cases.captured(model, x)
    assert list(fisher.layers) == ["head"]
    assert fisher.uncovered() == {}
    with cases.watched(model.head) as outputs:
        logits = model(x)
    truth = sum(cases.softmax_fisher(z) for z in logits) / 4
    assert cases.error(fisher.layers["head"].G.factor(), truth) < EXACT
    assert outputs[0] is logits


def test_of_tied_embeddings_and_a_head_that_comes_first_the_head_is_taken() -> None:
    class HeadFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.embedding = nn.Linear(3, 6, bias=False), nn.Embedding(6, 3)
            self.embedding.weight = self.head.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.embedding(x).tanh())

    model, x = cases.filled(HeadFirst()), torch.tensor([1, 5, 2, 2])
    fisher = cases.captured(model, x)
    assert list(fisher.layers) == ["head"]
    assert fisher.uncovered() == {}
    truth = sum(cases.softmax_fisher(z) for z in model(x)) / 4
    assert cases.error(fisher.layers["head"].G.factor(), truth) < EXACT


def test_attention_of_torch_is_uncovered() -> None:
    """It multiplies with the weight of out_proj by itself: that module is never called."""
    fisher = Capture(cases.filled(Zoo()), fisher_type="type-2")
    inside = {f"attention.{name}" for name in ("in_proj_weight", "in_proj_bias")}
    assert set(fisher.uncovered()) == inside
    with fisher:
        run(fisher, fisher._model, INDICES)
    left = fisher.uncovered()
    outside = {f"attention.out_proj.{name}" for name in ("weight", "bias")}
    assert set(left) == inside | outside
    assert {left[name] for name in outside} == {"its module was never called"}
    assert {left[name] for name in inside} == {"no rule for modules of type MultiheadAttention"}


class Adapted(nn.Module):
    """A frozen layer and its low-rank correction."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(3, 4).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(3, 2, bias=False), nn.Linear(2, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.5 * self.lora_B(self.lora_A(x))


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical-mean"])
def test_adapters_of_a_frozen_layer(fisher_type: str) -> None:
    model, x = cases.filled(TokenNet(Adapted())), cases.drawn(4, 3)
    fisher = cases.captured(model, x, fisher_type)
    assert list(fisher.layers) == ["layer.lora_A", "layer.lora_B"]
    assert fisher.uncovered() == {"layer.base.weight": "frozen", "layer.base.bias": "frozen"}
    for name, inputs in (("lora_A", x), ("lora_B", model.layer.lora_A(x).detach())):
        with cases.watched(getattr(model.layer, name)) as outputs:
            logits = model(x)
        if fisher_type == "type-2":
            truth = cases.type_2(logits, outputs[0], lambda g: g)
        else:
            truth = cases.empirical(logits, outputs[0], cases.labels(4), lambda g: g)
        layer = fisher.layers[f"layer.{name}"]
        assert cases.error(layer.G.factor(), truth) < EXACT
        assert cases.error(layer.A.factor(), inputs.T @ inputs / 4) < EXACT
    assert model.layer.base.weight.grad is None


# ---- passes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", STRUCTURES)
def test_two_backward_passes_through_one_graph(structure: str) -> None:
    """Of the terms of one loss each; inputs are counted once."""
    model, x = cases.filled(TokenNet(nn.Linear(3, 4))), cases.drawn(4, 3)
    y = cases.labels(4)
    with (
        capture(
            model, fisher_type="empirical", loss_reduction="sum", structure=structure
        ) as fisher,
        fisher.batch(terms=4),
    ):
        logits = model(x)
        for half in (slice(0, 2), slice(2, 4)):
            loss = functional.cross_entropy(logits[half], y[half], reduction="sum")
            loss.backward(retain_graph=half.start == 0)
    cases.assert_same(fisher, cases.captured(model, x, "empirical-sum", structure=structure))


def test_losses_do_not_reach_type_2() -> None:
    model, x = cases.filled(TokenNet(nn.Linear(3, 4))), cases.drawn(4, 3)
    with capture(model, fisher_type="type-2") as fisher, fisher.batch():
        logits = model(x)
        loss_of(logits).backward(retain_graph=True)
        fisher.add(logits)
        loss_of(logits).backward()
    cases.assert_same(fisher, cases.captured(model, x), bits=True)


def test_a_forward_pass_without_grad_is_not_followed() -> None:
    model = cases.filled(Zoo()).eval()
    with capture(model, fisher_type="type-2") as fisher, fisher.batch():
        with torch.no_grad():
            assert not model(INDICES.flip(0)).requires_grad
        logits = model(INDICES)
        with torch.inference_mode():
            model(INDICES.flip(1))
        fisher.add(logits)
    cases.assert_same(fisher, cases.captured(model, INDICES), bits=True)


class Breaking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, cases.V)
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x).tanh()
        return self.two(h[:, :2] if self.broken else h)


@pytest.mark.parametrize("fisher_type", TYPES)
def test_a_forward_pass_that_raises(fisher_type: str) -> None:
    model, x = cases.filled(Breaking()), cases.drawn(4, 3)
    one, other = (
        Capture(model, fisher_type=fisher_type, generator=cases.generator(0)) for _ in range(2)
    )
    model.broken = True
    with one:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            run(one, model, x)
        assert len(one._taps) == 2
        # nor does anything hold the graph
        assert not any(tap._input or tap.outputs for tap in one._taps)
    model.broken = False
    for fisher in (one, other):
        with fisher:
            run(fisher, model, x)
    cases.assert_same(one, other, bits=True)


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_a_batch_that_breaks_off_after_its_gradients(fisher_type: str) -> None:
    """What was added is counted."""
    model, x = cases.filled(Breaking()), cases.drawn(4, 3)
    one, other = (
        Capture(model, fisher_type=fisher_type, generator=cases.generator(0)) for _ in range(2)
    )

    def batch(fisher: Capture, broken: bool) -> None:
        with fisher, fisher.batch(terms=4):
            logits = model(x)
            if fisher_type == "mc":
                fisher.add(logits)
            loss_of(logits).backward()
            if broken:
                raise KeyError

    with pytest.raises(KeyError):
        batch(one, True)
    batch(other, False)
    cases.assert_same(one, other, bits=True)


# ---- narrow numbers -----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's own norm
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("fisher_type", TYPES)
def test_autocast(fisher_type: str, structure: str) -> None:
    """Rows are bfloat16 as the model computed them, sums are float32."""
    model = cases.filled(Zoo()).float().eval()
    rows: list[Tensor] = []
    fisher = Capture(model, fisher_type=fisher_type, structure=structure)
    with fisher:
        for layer in fisher.layers.values():
            if structure == "ekfac" and hasattr(layer, "refresh"):
                layer.refresh()
        with torch.autocast("cpu", torch.bfloat16):
            plain = model(INDICES)
            handle = model.down.register_forward_hook(
                lambda m, args, y: y.register_hook(rows.append) and None
            )
            with fisher.batch(terms=10):
                logits = model(INDICES)
                assert torch.equal(logits, plain)
                if fisher_type == "empirical":
                    loss_of(logits).backward()
                else:
                    fisher.add(logits)
            handle.remove()
    for name, value in cases.averages(fisher).items():
        assert value.isfinite().all(), name
        assert value.dtype == (torch.float64 if name.endswith("count") else torch.float32)
        assert value.any() or name.startswith("attention")
    if structure == "kfac":
        g = torch.cat([g.flatten(0, 1) for g in rows]).double()
        assert rows[0].dtype == torch.bfloat16
        truth = g.T @ g / 10 * (100 if fisher_type == "empirical" else 1)
        # float32 sums of at most 40 rows
        assert cases.error(fisher.layers["down"].G.factor().double(), truth) < 4 * 2**-23
