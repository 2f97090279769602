"""What a followed call keeps: its input as autograd would, as long, and nothing in the graph."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from curvature import cases
from fisherkern.curvature import Capture, KroneckerCurvature, _tap

TYPES = ("type-2", "mc", "empirical")


class Branches(nn.Module):
    """Two layers side by side, one above them, and one that nothing comes of."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.left, self.right = nn.Linear(4, 2), nn.Linear(4, 3)
        self.last, self.aside = nn.Linear(5, cases.V), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        self.aside(h)
        return self.last(torch.cat([self.left(h), self.right(h)], -1).tanh())


X = cases.drawn(6, 3)


def run(fisher: Capture, model: nn.Module, retain: bool = False) -> Tensor:
    with fisher.batch(terms=6 if fisher.fisher_type == "empirical" else None):
        logits = model(X)
        if fisher.fisher_type != "empirical":
            fisher.add(logits)
        logits.logsumexp(-1).mean().backward(retain_graph=retain)
    return logits


def captured(fisher_type: str, layers: list[str] | None = None) -> Capture:
    model = cases.filled(Branches())
    generator = cases.generator(0)
    with Capture(model, fisher_type=fisher_type, generator=generator, layers=layers) as fisher:
        run(fisher, model)
    return fisher


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[_tap.Kept]:
    """All inputs that were kept."""
    made: list[_tap.Kept] = []

    class Noted(_tap.Kept):
        def __init__(self, x: Tensor, name: str) -> None:
            super().__init__(x, name)
            made.append(self)

    monkeypatch.setattr(_tap, "Kept", Noted)
    return made


# ---- which layers a backward pass meets ---------------------------------------------------------


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
@pytest.mark.parametrize(
    "layers", [["last"], ["left"], ["left", "right"], ["right", "last"], ["first", "left"]]
)
def test_some_layers_are_as_among_all(fisher_type: str, layers: list[str]) -> None:
    some, every = captured(fisher_type, layers), captured(fisher_type)
    assert set(some.layers) == set(layers)
    for name in layers:
        one, other = some.layers[name], every.layers[name]
        assert isinstance(one, KroneckerCurvature)
        assert isinstance(other, KroneckerCurvature)
        assert one.G.count == 6
        assert all(map(torch.equal, one.factors(), other.factors()))


def furthest(root: Tensor, *outputs: Tensor) -> list[Any]:
    """The nodes that are found."""
    edges = map(get_gradient_edge, outputs)
    found = _tap.furthest(root.grad_fn, [(e.node._sequence_nr(), e.output_nr) for e in edges])
    return [edge.node for edge in found]


def test_furthest() -> None:
    a, b = (torch.ones(1, requires_grad=True) * 1 for _ in range(2))
    c = a * b
    d, e = c + a, c * 2
    root, aside = d + e, b * 3
    assert furthest(root, d, c, a, e) == [a.grad_fn]
    assert furthest(root, d, c) == [c.grad_fn]
    assert set(furthest(root, d, e, aside)) == {d.grad_fn, e.grad_fn}
    assert furthest(root, root) == [root.grad_fn]
    assert furthest(root) == furthest(root, aside) == []
    assert furthest(torch.ones(1, requires_grad=True), aside) == []
    left, right = torch.unbind(torch.stack([a, b]).squeeze(1))  # two outputs of one node
    assert furthest(left + right, left, right) == [left.grad_fn] * 2


def test_a_long_graph_is_no_deep_one() -> None:
    x = torch.ones(1, requires_grad=True)
    first = y = x * 1
    for _ in range(5000):
        y = y + 1
    assert furthest(y, y, first) == [first.grad_fn]


# ---- the graph, and what it holds ---------------------------------------------------------------


def nodes(output: Tensor) -> Counter[str]:
    seen, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return Counter(node.name() for node in seen)


@pytest.mark.parametrize("fisher_type", TYPES)
def test_the_graph_is_that_of_the_model(fisher_type: str) -> None:
    model = cases.filled(Branches())
    with Capture(model, fisher_type=fisher_type) as fisher:
        assert nodes(run(fisher, model)) == nodes(model(X))


@pytest.mark.parametrize("fisher_type", TYPES)
def test_inputs_go_with_the_graph(fisher_type: str, kept: list[_tap.Kept]) -> None:
    model = cases.filled(Branches())
    with Capture(model, fisher_type=fisher_type) as fisher:
        logits = run(fisher, model, retain=True)
        assert len(kept) == 5
        assert all(one._value is not None for one in kept)
        with fisher.batch(terms=6 if fisher_type == "empirical" else None):
            logits.logsumexp(-1).mean().backward()
    reached = [one._value is None for one in kept]
    assert sum(reached) == 4  # all but of the layer that nothing comes of


@pytest.mark.filterwarnings("ignore:no gradient came to any layer")
@pytest.mark.parametrize("fisher_type", TYPES)
def test_an_open_batch_holds_no_graph(fisher_type: str) -> None:
    class Mark:
        pass

    model, mark = cases.filled(Branches()), Mark()
    held = weakref.ref(mark)
    terms = 6 if fisher_type == "empirical" else None
    with Capture(model, fisher_type=fisher_type) as fisher, fisher.batch(terms=terms):
        logits = model(X)
        if fisher_type != "empirical":
            fisher.add(logits)
        assert logits.grad_fn is not None
        logits.grad_fn.metadata["mark"] = mark
        del logits, mark
        gc.collect()
        assert held() is None


def test_gradients_at_an_output_leave_its_input_there() -> None:
    """As of a saliency: nothing that the layer saved is freed, for its node is not run."""
    model, expected = cases.filled(Branches()), captured("type-2")
    with Capture(model, fisher_type="type-2") as fisher, fisher.batch():
        h = model.first(X)
        torch.autograd.grad(h.exp().sum(), h)
        h = h.tanh()
        model.aside(h)
        fisher.add(model.last(torch.cat([model.left(h), model.right(h)], -1).tanh()))
    cases.assert_same(fisher, expected, bits=True)


def test_a_graph_that_was_freed_is_an_error_of_torch() -> None:
    model = cases.filled(Branches())
    with Capture(model, fisher_type="empirical") as fisher, fisher.batch(terms=6):
        loss = model.first(X).sum()
        loss.backward()
        with pytest.raises(RuntimeError, match="through the graph a second time"):
            loss.backward()


class Segments(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4))
        self.head = nn.Linear(3, cases.V)
        self.inputs: list[weakref.ref[Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + 1
            self.inputs.append(weakref.ref(x))
            x = checkpoint(layer, x, use_reentrant=False)
        return self.head(x)


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_inputs_of_checkpoints_go_with_the_graph(fisher_type: str) -> None:
    model = cases.filled(Segments())
    terms = 6 if fisher_type == "empirical" else None
    with Capture(model, fisher_type=fisher_type) as fisher, fisher.batch(terms=terms):
        logits = model(X)
        if terms is None:
            fisher.add(logits)
        logits.logsumexp(-1).mean().backward()
        del logits
        gc.collect()
        assert not any(x() is not None for x in model.inputs)


class Stop(torch.autograd.Function):
    """The identity, whose gradient is nothing at all, not even zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> None:
        return None


class Stopped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.unseen = nn.Linear(3, cases.V), nn.Linear(3, cases.V)

    def forward(self, x: Tensor) -> Tensor:
        return self.seen(x) + Stop.apply(self.unseen(x))


@pytest.mark.parametrize("fisher_type", TYPES)
def test_a_gradient_that_is_none_adds_nothing(fisher_type: str) -> None:
    model = cases.filled(Stopped())
    with Capture(model, fisher_type=fisher_type) as fisher:
        run(fisher, model)
    assert fisher.layers["seen"].averages["G"].mean().abs().max() > 0
    assert fisher.layers["unseen"].averages["G"].mean().abs().max() == 0


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, cases.V)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        h = self.linear(x)
        x.add_(1)
        return h


def test_an_input_that_was_written_to_is_an_error() -> None:
    model = cases.filled(Overwriting())
    with Capture(model, fisher_type="mc") as fisher:
        with pytest.raises(
            RuntimeError, match=r"the input of linear, of shape \[6, 3\], was modified"
        ):
            run(fisher, model)
        assert fisher.layers["linear"].G.count == 0


# ---- activations that are kept elsewhere --------------------------------------------------------


@pytest.mark.parametrize("fisher_type", TYPES)
def test_offloaded_activations(fisher_type: str) -> None:
    expected = captured(fisher_type)
    with save_on_cpu():
        cases.assert_same(captured(fisher_type), expected, bits=True)


@pytest.mark.parametrize("fisher_type", TYPES)
def test_inputs_are_packed_as_activations_are(fisher_type: str) -> None:
    expected = captured(fisher_type)
    packed: list[torch.Size] = []

    def pack(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        packed.append(x.shape)
        return x.clone()

    def inside(inputs: bool) -> Capture | None:
        packed.clear()
        with saved_tensors_hooks(pack, lambda x: x):
            if inputs:
                return captured(fisher_type)
            cases.filled(Branches())(X)
            return None

    inside(False)
    bare = Counter(packed)
    cases.assert_same(inside(True), expected, bits=True)
    more = Counter({X.shape: 1, torch.Size((6, 4)): 3, torch.Size((6, 5)): 1})
    assert all(Counter(packed)[shape] >= bare[shape] + count for shape, count in more.items())
