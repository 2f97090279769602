"""Registration with torch.library: schema, implementation per device, fake, autograd and vmap.

An op is registered twice over. The raw op carries ``register_fake`` and ``register_autograd`` for
``torch.compile`` and ``torch.export``; in eager mode the same formulas run in an
``autograd.Function``, because torch.func (grad, jvp, vmap) does not see the raw op's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("fisherkern", "FRAGMENT")
DEVICES = ("CPU", "CUDA")

Formula = Callable[..., Any]


def define(
    schema: str, implementation: Formula, fake: Formula, *, vmap: str = "rows"
) -> Callable[..., Any]:
    """Define `fisherkern::<schema>`, one implementation for every device, and its fake.

    `vmap`: "rows" maps by giving the op one more leading dimension, "loop" calls it once per
    example (for ops that reduce over tokens), "none" leaves the op without a rule.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in DEVICES:
        LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"fisherkern::{name}", fake, lib=LIBRARY)
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.fisherkern, packet), overload or "default")
    if vmap != "none":
        rule = partial(_vmap, operator, vmap)
        torch.library.register_vmap(f"fisherkern::{name}", rule, lib=LIBRARY)
    return operator


def _vmap(
    function: Formula, how: str, info: Any, in_dims: Sequence[int | None], *args: Any
) -> tuple[Tensor, int]:
    moved: list[Any] = []
    for arg, dim in zip(args, in_dims, strict=True):
        if isinstance(arg, Tensor):
            arg = arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        moved.append(arg)
    if how == "rows":
        return function(*moved), 0
    examples = (
        [arg[i] if isinstance(arg, Tensor) else arg for arg in moved]
        for i in range(info.batch_size)
    )
    return torch.stack([function(*example) for example in examples]), 0


def _refuse_nested_tangents() -> None:
    """Of an autograd.Function torch drops the tangent of a tangent: zeros, and no error."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in levels) > 1:
        raise NotImplementedError(
            "forward mode inside forward mode (torch.func.jvp of jvp, jacfwd of jacfwd): put "
            "reverse mode inside, as torch.func.hessian does"
        )


def _differentiated(args: Sequence[Any]) -> bool:
    """Whether anything may ask for a derivative or a batch: if not, the Function is 45 µs saved."""
    if torch._C._are_functorch_transforms_active():
        _refuse_nested_tangents()
        return True
    if forward_ad._current_level >= 0:
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def differentiable(
    operator: Callable[..., Tensor], *, vjp: Formula, jvp: Formula, vmap: str = "rows"
) -> Formula:
    """`operator` with derivatives, in eager mode, under torch.func and under torch.compile.

    ``vjp(inputs, output, grad, needs)`` returns a gradient or None per input;
    ``jvp(inputs, output, tangents)`` the tangent of the output. Both are written with
    differentiable functions, which makes higher derivatives work.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        tensors = [x if isinstance(x, Tensor) else None for x in inputs]
        ctx.constants = [None if isinstance(x, Tensor) else x for x in inputs]
        ctx.save_for_backward(*tensors, output)

    def setup_function(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        setup_context(ctx, inputs, output)
        ctx.save_for_forward(*(x if isinstance(x, Tensor) else None for x in inputs), output)

    def saved(ctx: Any) -> tuple[list[Any], Tensor]:
        *tensors, output = ctx.saved_tensors
        pairs = zip(tensors, ctx.constants, strict=True)
        return [constant if x is None else x for x, constant in pairs], output

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        inputs, output = saved(ctx)
        return tuple(vjp(inputs, output, grad, ctx.needs_input_grad))

    def forward_mode(ctx: Any, *tangents: Tensor | None) -> Tensor:
        inputs, output = saved(ctx)
        return jvp(inputs, output, tangents)

    def vmap_rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> tuple[Tensor, int]:
        return _vmap(apply, vmap, info, in_dims, *args)

    members: dict[str, Any] = {
        "forward": operator,
        "setup_context": setup_function,
        "backward": backward,
        "jvp": forward_mode,
        "vmap": vmap_rule,
    }
    apply: Formula = type(
        f"{operator.__name__}_function",
        (torch.autograd.Function,),
        {name: staticmethod(member) for name, member in members.items()},
    ).apply  # type: ignore[attr-defined]
    torch.library.register_autograd(
        str(operator).removesuffix(".default").replace(".", "::", 1),
        backward,
        setup_context=lambda ctx, inputs, output: setup_context(ctx, inputs, output),
        lib=LIBRARY,
    )

    def call(*args: Any) -> Tensor:
        if torch.compiler.is_compiling():
            # the raw op has no tangents, which would come out as zeros
            return (operator if forward_ad._current_level < 0 else apply)(*args)
        if not _differentiated(args):
            return operator(*args)
        return apply(*args)

    return call
