"""Which module is which layer, or why it is none.

A module is the layer of its class only as far as its forward pass is that of the class. Norms and
scaled embeddings of transformers have one of their own: that is tried on a few rows, and has to
have the gradient of the rule.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.curvature.layers import (
    ConvolutionLayer,
    EmbeddingLayer,
    Layer,
    LinearLayer,
    NormLayer,
    ScaledEmbeddingLayer,
)

FROZEN = "frozen"


def layer_of(name: str, module: nn.Module) -> Layer | str | None:
    """The layer that a module is, why it is none, or None where it has no parameters of its own."""
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return None
    if not any(p.requires_grad for p in own.values()):
        return FROZEN
    kind = _kind(module)
    if kind is None:
        return f"no rule for modules of type {type(module).__name__}"
    norm = kind in (nn.LayerNorm, nn.RMSNorm)
    if not norm and not ("weight" in own and own["weight"].requires_grad):
        return "its weight is frozen or computed from other parameters"
    if norm and "weight" not in own:
        return "a norm without weight"
    forward = _forward(module)
    if forward is kind.forward:
        return _refused(module) or _LAYERS[kind.__name__](name, module)
    layer: Layer | None = None
    if norm:
        layer = NormLayer(name, module)
    elif isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"):
        layer = ScaledEmbeddingLayer(name, module)
    if layer is not None and _fits(layer, forward):
        return _refused(module) or layer
    if "forward" in vars(module):
        return f"its forward was replaced: it is that of {kind.__name__} no more"
    return f"a subclass of {kind.__name__} with a forward of its own"


_LAYERS: dict[str, Callable[[str, Any], Layer]] = {
    "Linear": LinearLayer,
    "Conv1D": LinearLayer,
    "Conv1d": ConvolutionLayer,
    "Conv2d": ConvolutionLayer,
    "Embedding": EmbeddingLayer,
    "LayerNorm": NormLayer,
    "RMSNorm": NormLayer,
}


def _kind(module: nn.Module) -> Any:
    """The class whose rule a module may have."""
    # transformers need not be installed, and is not imported, to know its class
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", None)
    known = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding, nn.LayerNorm, nn.RMSNorm, conv1d)
    for kind in known:
        if kind is not None and isinstance(module, kind):
            return kind
    return nn.RMSNorm if _is_rms_norm(module) else None


def _is_rms_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, nn.Parameter)
        and weight.ndim == 1
        and (hasattr(module, "eps") or hasattr(module, "variance_epsilon"))
    )


def _forward(module: nn.Module) -> Any:
    """What is called, as a function of the module; accelerate keeps it when it puts a hook there.

    Its hooks move tensors, and change no values. Whatever else was put on the instance counts.
    """
    bound = vars(module).get("_old_forward", module.forward)
    return getattr(bound, "__func__", bound)


def _refused(module: nn.Module) -> str | None:
    """Why a module is none that has a rule, though it is of a class that has."""
    if isinstance(module, nn.Embedding) and (
        module.max_norm is not None or module.scale_grad_by_freq
    ):
        return "an embedding with max_norm or scale_grad_by_freq"
    if not isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return None
    if module.groups != 1:
        return f"a convolution of {module.groups} groups"
    if module.padding_mode != "zeros":
        return f"a convolution with padding_mode {module.padding_mode!r}"
    spans = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    if module.padding == "same" and any(span % 2 for span in spans):
        return "a convolution with padding 'same' that is not symmetric"
    return None


def _fits(layer: Layer, forward: Callable[..., Any]) -> bool:
    """Whether the gradient of a forward pass is that of the rule, on a few rows.

    Of a copy with parameters of its own, without hooks: the module and the state of random numbers
    are left as they are.
    """
    try:
        if len(inspect.signature(forward).parameters) != 2:  # what else it takes may be used
            return False
        with torch.inference_mode(False), torch.enable_grad():
            return _explains(layer, forward)
    except Exception:  # whatever it needs, rows alone are not enough
        return False


def _explains(layer: Layer, forward: Callable[..., Any]) -> bool:
    device = next(iter(layer.parameters.values())).device
    device = torch.device("cpu") if device.type == "meta" else device
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: Iterable[int]) -> Tensor:
        # float32: norms of transformers compute in it, whatever they are given
        values = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
        return values.to(device)

    twin: Any = copy.copy(layer.module)
    roles = list(layer.parameters)
    shapes = {role: p.shape for role, p in twin.named_parameters(recurse=False)}
    if isinstance(layer, EmbeddingLayer):
        twin.padding_idx = None
        shapes["weight"] = torch.Size((4, layer.d_out))
        x = torch.arange(4, device=device).unsqueeze(0)
    else:  # of some rows eps is a large part
        x = drawn((2, 3, *shapes["weight"]))
        x[0] *= 1e-3
    parameters = {role: nn.Parameter(drawn(shape)) for role, shape in shapes.items()}
    buffers = {name: b.to(device, copy=True) for name, b in twin.named_buffers(recurse=False)}
    vars(twin).update(_parameters={**twin._parameters, **parameters}, _buffers=buffers)
    with torch.autocast(device.type, enabled=False):
        y = forward(twin, x)
    g = drawn(y.shape)
    found = torch.autograd.grad(y, [parameters[role] for role in roles], g)
    for role in shapes.keys() - roles:
        parameters[role].requires_grad_(False)
    rule = type(layer)(layer.name, twin)
    if isinstance(rule, NormLayer):
        expected = rule.scores(x, g).sum((0, 1))
    else:
        expected = rule.gradient_rows(g).flatten()
    error = torch.cat([v.flatten() for v in found]) - expected
    # sums of six products, in float32
    return bool(error.norm() <= 1e-5 * expected.norm())
