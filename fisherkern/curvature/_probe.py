"""Hooks that hand a layer the inputs and output gradients of each of its calls, and leave no trace.

A probe is a node of the autograd graph at the input of a module. It saves the input as any node
does, so that activation checkpointing and offloading apply to it, and it is freed with the rest of
the graph. A hook on the output then meets the gradient, and the input through the node. All probes
lead to one scalar, the anchor: the backward pass that is asked for the gradient of the anchor alone
visits every module, and computes no gradient of a weight.

Where a module uses its input more than once, a probe at the input would change the order in which
gradients are summed. Such modules, and those of indices, have it at a copy of the output.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fisherkern.curvature._hooks import Hook, removed_with


@dataclass(eq=False)
class Call:
    """One call of a module."""

    counted: bool = False
    """Whether its inputs were added, which every gradient of it comes with."""


class Receiver(Protocol):
    """What is told of the calls of a module."""

    def follow(self) -> bool:
        """Whether to follow the call that comes."""

    def observe(self, output: Tensor) -> None:
        """What the module returned."""

    def receive(self, inputs: Callable[[], Tensor], gradient: Tensor, call: Call) -> None:
        """What gives the input, the output gradient, and which call they are of."""


class _Probe(torch.autograd.Function):
    """The identity, whose node keeps `kept` and needs the gradient of `anchor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(kept)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None, None


class Tap:
    """The hooks of one module.

    Args:
        module: takes a tensor and returns one.
        at_input: whether that is where the probe may be.
        anchor: a scalar that requires grad, the same for all taps of a model.
        receiver: asked in each call whether to follow it, then given what the module returns, and
            every gradient that comes to that.
    """

    def __init__(
        self,
        module: nn.Module,
        at_input: bool,
        anchor: Tensor,
        receiver: Receiver,
    ) -> None:
        self._anchor, self._at_input, self._receiver = anchor, at_input, receiver
        self._node: Any = None
        self._input: Tensor | None = None
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
        """Let go of a call that raised, or of which checkpointing repeated only a part."""
        self._node = self._input = None

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        self.forget()
        if not (self._receiver.follow() and torch.is_grad_enabled()):
            return None
        name = next(iter(kwargs), "")
        x = args[0] if args else kwargs.get(name)
        if not isinstance(x, Tensor):
            return None
        if not (self._at_input and x.is_floating_point()):
            self._input = x.detach()
            return None
        probed = _Probe.apply(x, x.detach(), self._anchor)
        self._node = probed.grad_fn
        return ((probed, *args[1:]), kwargs) if args else (args, {**kwargs, name: probed})

    def _after(self, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        node, x = self._node, self._input
        self.forget()
        if not isinstance(output, Tensor) or (node is None and x is None):
            return None
        given = None
        if x is not None:
            # a copy, for a view of a custom node cannot be written in place by what follows
            output = given = _Probe.apply(output, x, self._anchor).clone()
            node = output.grad_fn.next_functions[0][0]
        if not output.requires_grad:
            return None
        if output._base is not None and not _is_whole(output):
            output = given = output.clone()
        self._receiver.observe(output)
        _hook(output, _follow(node, self._receiver))
        return given


def _is_whole(view: Tensor) -> bool:
    """Whether a view is its base in another shape, as what Linear makes of [B, S, d]."""
    base = view._base
    assert base is not None
    dense = view.is_contiguous() and base.is_contiguous() and view.numel() == base.numel()
    return dense and base.requires_grad


def _hook(output: Tensor, hook: Callable[[Tensor], None]) -> None:
    base, shape = output._base, output.shape
    if base is None:
        output.register_hook(hook)
    else:  # one on the view itself is lost when the view is written to, as by a ReLU in place
        base.register_hook(lambda gradient: hook(gradient.reshape(shape)))


def _follow(node: Any, receiver: Receiver) -> Callable[[Tensor], None]:
    call = Call()

    def hook(gradient: Tensor) -> None:
        # what checkpointing has to compute again comes only once a pass
        inputs = functools.cache(lambda: node.saved_tensors[0].detach())
        # of a backward pass inside autocast too the averages are products of their own dtype
        with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
            receiver.receive(inputs, gradient.detach(), call)

    return hook
