"""Hooks that hand a layer the inputs and output gradients of each of its calls, and leave no trace.

Nothing is put into the graph of a model: a node at every layer would not only take time, its small
blocks of memory keep the freed activations around them from becoming room for the gradients. Nor is
a graph held. An input is kept by the hooks of a node, packed as autograd packs what it saves, so
that activation checkpointing and offloading apply to it, and let go when that is.

A backward pass that is to visit every layer and to compute no gradient of a weight is asked for the
gradients at the outputs of some of the layers: :func:`furthest`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from fisherkern.curvature._hooks import Hook, removed_with

Output = tuple[int, int]
"""The sequence number of a node, which holds on to nothing, and that of its output."""


@dataclass(eq=False)
class Call:
    """One call of a module."""

    batch: int
    """The number of the batch that it was made in."""
    counted: bool = False
    """Whether its inputs were added, which every gradient of it comes with."""


class Receiver(Protocol):
    """What is told of the calls of a module."""

    name: str

    @property
    def batch(self) -> int:
        """The number of the batch that is open."""

    def follow(self) -> bool:
        """Whether to follow the call that comes."""

    def observe(self, output: Tensor) -> None:
        """What the module returned."""

    def receive(self, inputs: Callable[[], Tensor], gradient: Tensor, call: Call) -> None:
        """What gives the input, the output gradient, and which call they are of."""


class Kept:
    """The input of a call, which is not to be written to before it is used."""

    def __init__(self, x: Tensor, name: str) -> None:
        x, self._name = x.detach(), name
        # those of activation checkpointing, or of offloading
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self._unpack: Callable[[Any], Tensor] | None = None
        self._version = None if x.is_inference() else x._version
        self._value: Any = x
        if hooks is not None:
            pack, self._unpack = hooks
            with torch.no_grad():
                self._value = pack(x)

    def get(self) -> Tensor:
        """The input; what checkpointing has to compute again comes only once a pass."""
        if self._unpack is not None:
            return self._unpack(self._value).detach()
        if self._version is not None and self._value._version != self._version:
            raise RuntimeError(
                f"the input of {self._name or 'the model'}, of shape {list(self._value.shape)}, "
                "was modified by an inplace operation before the backward pass that needs it"
            )
        return self._value

    @property
    def gone(self) -> bool:
        """Whether the graph was freed, of which torch will say that it was differentiated twice."""
        return self._value is None

    def pass_by(self, *_: Any) -> None:
        """The node of the call was differentiated: let go of it where that freed the graph."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self._value = self._unpack = None


class Tap:
    """The hooks of one module.

    Args:
        module: takes a tensor and returns one.
        receiver: asked in each call whether to follow it, then given what the module returns, and
            every gradient that comes to that.
    """

    def __init__(self, module: nn.Module, receiver: Receiver) -> None:
        self._receiver = receiver
        self._input: Kept | None = None
        self.outputs: set[Output] = set()
        """Of the calls that were followed."""
        before, after = Hook(module, self._before), Hook(module, self._after)
        self.remove = removed_with(
            self,
            [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ],
        )
        """Take the hooks off."""

    def forget(self) -> None:
        """Let go of all calls, and of one that raised or of which checkpointing repeated a part."""
        self._input = None
        self.outputs = set()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = None
        if not self._receiver.follow():
            return
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor):
            self._input = Kept(x, self._receiver.name)

    def _after(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        kept, self._input = self._input, None
        if kept is None or not isinstance(output, Tensor) or not output.requires_grad:
            return None
        given = None
        if output._base is not None and not _is_whole(output):
            output = given = output.clone()
        self._receiver.observe(output)
        # a hook on a view itself is lost when the view is written to, as by a ReLU in place
        whole = output if output._base is None else output._base
        whole.register_hook(_followed(kept, self._receiver, output.shape))
        edge = get_gradient_edge(whole)
        edge.node.register_hook(kept.pass_by)
        self.outputs.add((edge.node._sequence_nr(), edge.output_nr))
        return given


def _is_whole(view: Tensor) -> bool:
    """Whether a view is its base in another shape, as what Linear makes of [B, S, d]."""
    base = view._base
    assert base is not None
    dense = view.is_contiguous() and base.is_contiguous() and view.numel() == base.numel()
    return dense and base.requires_grad


def _followed(kept: Kept, receiver: Receiver, shape: torch.Size) -> Callable[[Tensor | None], None]:
    call = Call(receiver.batch)

    def hook(gradient: Tensor | None) -> None:
        if gradient is None or kept.gone:
            return
        found: list[Tensor] = []

        def inputs() -> Tensor:
            if not found:
                found.append(kept.get())
            return found[0]

        # of a backward pass inside autocast too the averages are products of their own dtype
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            receiver.receive(inputs, gradient.detach().reshape(shape), call)

    return hook


def furthest(root: Node | None, outputs: Iterable[Output]) -> list[GradientEdge]:
    """The outputs from which a backward pass comes to no other: on its way there it meets all.

    Args:
        root: the node that the pass begins at.
        outputs: of layers; those that the root does not depend on are left out.
    """
    numbers: dict[int, set[int]] = {}
    for sequence, number in outputs:
        numbers.setdefault(sequence, set()).add(number)
    found: list[GradientEdge] = []
    comes: dict[Node, bool] = {}  # to an output, at a node or behind it
    waiting = [] if root is None else [root]
    while waiting:
        node = waiting[-1]
        behind = [following for following, _ in node.next_functions if following is not None]
        unknown = [following for following in behind if following not in comes]
        if unknown and node not in comes:
            waiting += unknown
            continue
        waiting.pop()
        if node in comes:
            continue
        here, beyond = numbers.get(node._sequence_nr(), ()), any(map(comes.get, behind))
        comes[node] = bool(here) or beyond
        if not beyond:
            found += [GradientEdge(node, number) for number in sorted(here)]
    return found


_passing: list[object] = []


def differentiate(
    outputs: Tensor, ends: list[GradientEdge], gradient: Tensor | None, of: object
) -> None:
    """A backward pass to `ends`; the graph stays if it is one of several, of a given gradient.

    It is meant for the receivers of one capture: others know it by :func:`is_foreign`.
    """
    if not ends:
        return
    keep = gradient is not None
    _passing.append(of)
    try:
        torch.autograd.grad(outputs, ends, gradient, retain_graph=keep, allow_unused=True)
    finally:
        _passing.pop()


def is_foreign(of: object) -> bool:
    """Whether the backward pass that is going on is one that another capture makes."""
    return bool(_passing) and _passing[-1] is not of
