"""Where models keep masks, labels and logits: as transformers has them, or plain tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherkern.reference import IGNORE_INDEX

Arguments = Mapping[str, Any]


def inside(model: nn.Module) -> nn.Module:
    """The module inside what compiles it or makes it data-parallel."""
    wrapped = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while True:
        inner = model.module if isinstance(model, wrapped) else getattr(model, "_orig_mod", model)
        if inner is model:
            return model
        model = inner


def named(model: nn.Module, args: tuple[Any, ...], kwargs: Arguments) -> Arguments:
    """All arguments of a call by name, as far as the forward pass of the model names them."""
    if not args:
        return kwargs
    signature = inspect.signature(inside(model).forward)
    try:
        given = signature.bind_partial(*args).arguments
    except TypeError:  # the call will say so
        return kwargs
    return {**given, **kwargs}


def mask_reader(model: nn.Module) -> Callable[[tuple[Any, ...], Arguments], Tensor | None]:
    """What gives the ``attention_mask`` of a call of a model, by position or by name.

    That of an encoder and decoder is over the tokens of the encoder alone: it is refused with a
    ValueError, unless it leaves out nothing.
    """
    config = getattr(inside(model), "config", None)
    two = bool(getattr(config, "is_encoder_decoder", False))

    def read(args: tuple[Any, ...], kwargs: Arguments) -> Tensor | None:
        mask = default_mask(named(model, args, kwargs))
        if mask is None or not two:
            return mask
        if bool(mask.all()):
            return None
        raise ValueError(
            f"attention_mask has padding, and model is a {type(inside(model)).__name__}: the mask "
            "is over the tokens of its encoder alone. Cover the layers of the encoder or those of "
            "the decoder with `layers`, and pass `mask_of` that gives the mask of their tokens"
        )

    return read


def default_mask(kwargs: Arguments) -> Tensor | None:
    """The ``attention_mask`` [B, S] that the model is called with, if any."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    return mask.bool()


def default_logits(output: Any) -> Tensor:
    """The logits of what transformers' models return, or the tensor that other models return.

    Of a tuple: what comes after a loss, or its only part.

    Raises:
        TypeError: there are none.
    """
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, (tuple, list)):
        parts = list(output)
        if len(parts) > 1 and isinstance(parts[0], Tensor) and parts[0].ndim == 0:
            parts = parts[1:2]
        logits = parts[0] if len(parts) == 1 else None
    else:
        logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim == 0:
        raise TypeError(
            f"the model returned {type(output).__name__}, in which no logits were found; pass "
            "logits_of"
        )
    return logits


def check_classes(logits: Tensor) -> None:
    """Refuse the single output of a regression or of a binary classifier.

    Raises:
        ValueError: there is one class.
    """
    if logits.shape[-1] == 1:
        raise ValueError(
            f"logits has shape {list(logits.shape)}: of one class the softmax is constant, and its "
            "Fisher zero. Give z of a binary classifier as the logits [0, z], with logits_of"
        )


def tell_shape(capture: Any, logits: Tensor) -> None:
    """Let a capture of "empirical" know B, which it needs to tell samples apart, by the logits."""
    batch = capture._batch
    batch.shape = max(batch.shape, logits.shape[:-1], key=len)


def is_causal(model: nn.Module) -> bool:
    """Whether it is one of transformers' that predict the next token, and shift the labels."""
    names = [kind.__name__ for kind in type(inside(model)).__mro__]
    return any(part in name for name in names for part in ("ForCausalLM", "LMHeadModel"))


def default_terms(kwargs: Arguments, logits: Tensor, causal: bool) -> Tensor | None:
    """The positions that have a label, as transformers' models compute their loss.

    Without ``labels`` those of the attention mask whose next token counts; None: all.

    Raises:
        ValueError: labels [B, *positions] of logits [B, V, *positions].
    """
    labels, lead = kwargs.get("labels"), logits.shape[:-1]
    if isinstance(labels, Tensor) and labels.shape == lead:
        counts = labels != IGNORE_INDEX
    else:
        if isinstance(labels, Tensor):
            _check_layout(labels, logits)
        mask = default_mask(kwargs)
        if mask is not None and mask.shape == lead:
            counts = mask
        elif causal and len(lead) > 1 and lead[-1] > 1:
            counts = torch.ones(lead, dtype=torch.bool, device=logits.device)
        else:
            return None
    # a causal model's output is for the token that follows
    return functional.pad(counts[..., 1:], (0, 1), value=False) if causal else counts


def _check_layout(labels: Tensor, logits: Tensor) -> None:
    images = logits.ndim > 3 and labels.ndim == logits.ndim - 1
    if images or (labels.ndim > 1 and labels.shape == (len(logits), *logits.shape[2:])):
        raise ValueError(
            f"labels has shape {list(labels.shape)} and logits {list(logits.shape)}; expected "
            "classes last, [B, *positions, V]: move them with logits_of"
        )
