"""Every argument check and its message, in one place.

A message names the argument, what it was and what is allowed. Checks here read metadata only, so
they run under ``torch.compile`` and never synchronise a GPU; the checks that must read values live
inside the ops that need them (:mod:`fisherkern.ops._values`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_INT64 = 2**63 - 1
FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def tensor(name: str, value: object) -> Tensor:
    """`value` itself, which must be a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    return value


def logits(value: object, name: str = "logits") -> Tensor:
    """Floating-point tensor [..., V] with at least the class dimension."""
    z = tensor(name, value)
    if z.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {z.dtype}; allowed are {_names(FLOATING)}")
    if z.ndim == 0:
        raise ValueError(f"{name} is a scalar; expected [..., V] with a class dimension")
    if z.layout != torch.strided:
        raise TypeError(f"{name} has layout {z.layout}; only dense (torch.strided) is supported")
    return z


def classes(z: Tensor, purpose: str) -> None:
    """There must be at least one class."""
    if z.shape[-1] == 0:
        raise ValueError(f"logits has shape {_shape(z)}, no classes; {purpose} needs V >= 1")


def same_device_and_dtype(name: str, value: Tensor, z: Tensor, of: str = "logits") -> None:
    """Same device and dtype as the operand named `of`."""
    device(name, value, z, of)
    if value.dtype != z.dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; expected that of {of}, {z.dtype}")


def device(name: str, value: Tensor, z: Tensor, of: str = "logits") -> None:
    """Same device as the operand named `of`."""
    if value.device != z.device:
        raise ValueError(f"{name} is on {value.device}; expected the device of {of}, {z.device}")


def rows(name: str, value: object, z: Tensor, of: str = "logits") -> Tensor:
    """A tensor of the shape of the logits, or [V] for all tokens alike (expanded, not copied)."""
    v = tensor(name, value)
    same_device_and_dtype(name, v, z, of)
    if v.shape != z.shape and v.shape != z.shape[-1:]:
        raise ValueError(
            f"{name} has shape {_shape(v)}; expected {_shape(z)} (the shape of {of}) "
            f"or [{z.shape[-1]}]"
        )
    return v.expand(z.shape)


def directions(name: str, value: object, z: Tensor) -> Tensor:
    """Like `rows`, or K directions [..., K, V] for logits [..., V]."""
    v = tensor(name, value)
    if v.ndim != z.ndim + 1:
        return rows(name, v, z)
    same_device_and_dtype(name, v, z)
    if v.shape[:-2] != z.shape[:-1] or v.shape[-1] != z.shape[-1]:
        lead = [str(n) for n in z.shape[:-1]]
        raise ValueError(
            f"{name} has shape {_shape(v)}; expected {_shape(z)} (the shape of logits), "
            f"[{z.shape[-1]}], or [{', '.join([*lead, 'K', str(z.shape[-1])])}] for K directions"
        )
    return v


def temperature(value: object) -> float:
    """A finite number above zero."""
    if isinstance(value, Tensor):
        raise TypeError("temperature is a tensor; expected a Python number > 0")
    return positive("temperature", value)


def choice(name: str, value: object, allowed: Sequence[str]) -> str:
    """One of the names that are allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")
    return value


def reduction(value: object, allowed: Sequence[str]) -> str:
    """One of the reductions the op knows."""
    return choice("reduction", value, allowed)


def _per_token(
    name: str, value: Tensor, z: Tensor, of: str = "logits", lead: int | None = None
) -> None:
    device(name, value, z, of)
    shape = z.shape[:-1] if lead is None else z.shape[:lead]
    if value.shape != shape:
        raise ValueError(
            f"{name} has shape {_shape(value)}; expected {list(shape)}, the leading shape of "
            f"{of} {_shape(z)}"
        )


def mask_or_weights(
    mask: object, weights: object, z: Tensor, of: str = "logits", lead: int | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """A bool mask or float weights over the tokens, not both; the weights not differentiable.

    The tokens are the first `lead` dimensions of z, the operand named `of`; all but the last where
    `lead` is None.
    """
    if mask is not None and weights is not None:
        raise ValueError(
            "mask and weights were both given; pass one (a mask is weights of 0 and 1)"
        )
    m = w = None
    if mask is not None:
        m = tensor("mask", mask)
        if m.dtype != torch.bool:
            raise TypeError(f"mask has dtype {m.dtype}; allowed is bool (True = token counts)")
        _per_token("mask", m, z, of, lead)
    if weights is not None:
        w = tensor("weights", weights)
        if w.dtype not in FLOATING:
            raise TypeError(f"weights has dtype {w.dtype}; allowed are {_names(FLOATING)}")
        if w.requires_grad:
            raise ValueError(
                "weights requires grad; ops do not differentiate it: pass a detached one"
            )
        _per_token("weights", w, z, of, lead)
    return m, w


def logsumexp(value: object, z: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The logsumexp of logits / temperature, per token, in the accumulation dtype."""
    if value is None:
        return None
    lse = tensor("logsumexp", value)
    if lse.dtype != dtype:
        raise TypeError(
            f"logsumexp has dtype {lse.dtype}; expected {dtype} for {z.dtype} logits "
            f"(narrower types lose the probabilities)"
        )
    _per_token("logsumexp", lse, z)
    return lse.detach()


def token_values(name: str, value: object, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [...] over the tokens, in the accumulation dtype, not differentiable."""
    v = tensor(name, value)
    if v.dtype != dtype:
        raise TypeError(f"{name} has dtype {v.dtype}; expected {dtype} for {z.dtype} logits")
    _per_token(name, v, z)
    return v.detach()


def class_values(name: str, value: object, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers [V] over the classes, in the accumulation dtype, not differentiable."""
    v = tensor(name, value)
    if v.dtype != dtype:
        raise TypeError(f"{name} has dtype {v.dtype}; expected {dtype} for {z.dtype} logits")
    device(name, v, z)
    if v.shape != z.shape[-1:]:
        raise ValueError(f"{name} has shape {_shape(v)}; expected [{z.shape[-1]}]")
    return v.detach()


def class_block(name: str, value: object, z: Tensor, dtype: torch.dtype) -> Tensor:
    """Columns [V, k] over the classes, in the accumulation dtype, not differentiable."""
    v = tensor(name, value)
    if v.dtype != dtype:
        raise TypeError(f"{name} has dtype {v.dtype}; expected {dtype} for {z.dtype} logits")
    device(name, v, z)
    if v.ndim != 2 or v.shape[0] != z.shape[-1]:
        raise ValueError(f"{name} has shape {_shape(v)}; expected [{z.shape[-1]}, k]")
    return v.detach()


def byte_count(name: str, value: object, default: Mapping[str, int], z: Tensor) -> int:
    """A number of bytes; None: what is usual on the device of z."""
    if value is None:
        return default.get(z.device.type, default["cpu"])
    count = integer(name, value)
    if count < 1:
        raise ValueError(f"{name} is {count}; allowed are numbers of bytes >= 1")
    return count


def labels(value: object, z: Tensor) -> Tensor:
    """int64 class indices, one per token."""
    y = tensor("labels", value)
    if y.dtype != torch.int64:
        raise TypeError(f"labels has dtype {y.dtype}; allowed is int64")
    _per_token("labels", y, z)
    return y


def integer(name: str, value: object) -> int:
    """A Python int that a kernel can be given."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} has type {type(value).__name__}; expected an int")
    if not -_INT64 - 1 <= value <= _INT64:
        raise ValueError(f"{name} is {value}; allowed are ints of 64 bits")
    return value


def out(
    value: object, shape: Sequence[int], dtype: torch.dtype, inputs: dict[str, Tensor]
) -> Tensor:
    """A destination of exactly this shape and dtype that neither input nor itself overlaps."""
    o = tensor("out", value)
    of, first = next(iter(inputs.items()))
    if list(o.shape) != list(shape):
        raise ValueError(f"out has shape {_shape(o)}; expected {list(shape)}")
    if o.dtype != dtype:
        raise TypeError(f"out has dtype {o.dtype}; expected {dtype}")
    device("out", o, first, of)
    if o.requires_grad or (
        any(t.requires_grad for t in inputs.values()) and torch.is_grad_enabled()
    ):
        raise ValueError("out= does not support autograd: an argument requires grad")
    return o


def generator(value: object, z: Tensor) -> torch.Generator | None:
    """A torch.Generator of the device of the logits, or None for the default one."""
    if value is None:
        return None
    if not isinstance(value, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, not {type(value).__name__}")
    if value.device.type != z.device.type:
        raise ValueError(
            f"generator is on {value.device}; expected the device of logits, {z.device}"
        )
    return value


def overlaps_itself(x: Tensor) -> bool:
    """Whether a stride is no longer than what the dimensions of shorter ones reach."""
    reach = 0
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def overwritable(value: object) -> Tensor:
    """Logits that an in-place op may write over."""
    z = logits(value)
    if z.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "logits requires grad; an in-place op cannot write over it: detach it first"
        )
    if overlaps_itself(z):
        raise ValueError(
            f"logits has strides {z.stride()}: its elements share memory; clone it first"
        )
    return z


def activations(name: str, value: object, dims: int = 2) -> Tensor:
    """Floating-point tensor of at least `dims` dimensions, the last not empty."""
    x = tensor(name, value)
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} has dtype {x.dtype}; allowed are {_names(FLOATING)}")
    if x.layout != torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; only dense (torch.strided) is supported")
    if x.ndim < dims:
        expected = "[..., d]" if dims == 1 else f"at least {dims} dimensions, [..., d]"
        raise ValueError(f"{name} has shape {_shape(x)}; expected {expected}")
    if x.shape[-1] == 0:
        raise ValueError(f"{name} has shape {_shape(x)}; its last dimension must not be empty")
    return x


def paired(name: str, value: object, x: Tensor, of: str = "x") -> Tensor:
    """Activations of the leading shape, dtype and device of x."""
    g = activations(name, value, x.ndim)
    same_device_and_dtype(name, g, x, of)
    if g.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"{name} has shape {_shape(g)}; expected the leading shape of {of} {_shape(x)}"
        )
    return g


def factor(value: object, shape: Sequence[int], x: Tensor, name: str = "factor") -> Tensor:
    """A float32 or float64 matrix that an op updates in place, no narrower than x."""
    a = tensor(name, value)
    allowed = (torch.float64,) if x.dtype == torch.float64 else (torch.float32, torch.float64)
    if a.dtype not in allowed:
        raise TypeError(
            f"{name} has dtype {a.dtype}; allowed for {x.dtype} inputs are {_names(allowed)}"
        )
    if list(a.shape) != list(shape):
        raise ValueError(
            f"{name} has shape {_shape(a)}; expected {list(shape)} for inputs {_shape(x)}"
        )
    device(name, a, x, "x")
    if a.requires_grad:
        raise ValueError(f"{name} requires grad; an in-place update cannot write over it")
    if any(size > 1 and step == 0 for size, step in zip(a.shape, a.stride(), strict=True)):
        raise ValueError(f"{name} has strides {a.stride()}: its elements share memory")
    return a


def _real(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} has type {type(value).__name__}; expected a number")
    return float(value)


def number(name: str, value: object, least: float, most: float) -> float:
    """A finite Python number in [least, most]."""
    x = _real(name, value)
    # math.isfinite would break the graph of a compiler
    if not (-math.inf < x < math.inf and least <= x <= most):
        above = "that are finite" if least == -math.inf else f">= {least}"
        bounds = above if most == math.inf else f"in [{least}, {most}]"
        raise ValueError(f"{name} is {value}; allowed are numbers {bounds}")
    return x


def positive(name: str, value: object) -> float:
    """A finite number above zero."""
    x = _real(name, value)
    if not 0 < x < math.inf:
        raise ValueError(f"{name} is {value}; allowed are finite numbers > 0")
    return x


def damping(value: object) -> float:
    """A finite number above zero."""
    return positive("damping", value)


def softcap(value: object) -> float:
    """A number whose square and its reciprocal are float32."""
    return number("softcap", value, 1e-18, 1e18)


def head_weight(value: object, h: Tensor) -> Tensor:
    """The weight [V, d] of a linear layer from the d of hidden states to at least one class."""
    W = tensor("weight", value)
    same_device_and_dtype("weight", W, h, "hidden")
    if W.ndim != 2 or W.shape[1] != h.shape[-1] or W.shape[0] == 0:
        raise ValueError(
            f"weight has shape {_shape(W)}; expected [V, {h.shape[-1]}], V >= 1, for hidden "
            f"{_shape(h)}"
        )
    return W


def head_bias(value: object, W: Tensor) -> Tensor:
    """The bias [V] of a head."""
    b = tensor("bias", value)
    same_device_and_dtype("bias", b, W, "weight")
    if b.shape != W.shape[:1]:
        raise ValueError(f"bias has shape {_shape(b)}; expected [{W.shape[0]}]")
    return b


def array(name: str, value: object, shape: Sequence[str], dtypes: Sequence[torch.dtype]) -> Tensor:
    """A tensor of these dtypes; `shape` names its dimensions, those of one name being equal."""
    x = tensor(name, value)
    if x.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {x.dtype}; allowed are {_names(dtypes)}")
    equal = dict(zip(shape, x.shape, strict=False))
    if x.ndim != len(shape) or any(
        equal[n] != size for n, size in zip(shape, x.shape, strict=True)
    ):
        raise ValueError(f"{name} has shape {_shape(x)}; expected [{', '.join(shape)}]")
    return x
