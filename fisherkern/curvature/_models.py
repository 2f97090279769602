"""Where models keep masks, labels and logits: as transformers has them, or plain tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fisherkern.reference import IGNORE_INDEX

Arguments = Mapping[str, Any]


def default_mask(args: tuple[Any, ...], kwargs: Arguments) -> Tensor | None:
    """The ``attention_mask`` [B, S] that the model is called with, if any."""
    mask = kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    return mask.bool()


def default_logits(output: Any) -> Tensor:
    """The logits of what transformers' models return, or the tensor that other models return.

    Raises:
        TypeError: there are none.
    """
    if isinstance(output, Mapping):
        logits = output.get("logits")
    elif isinstance(output, (tuple, list)):  # the loss comes first, where there is one
        logits = next((x for x in output if isinstance(x, Tensor) and x.ndim > 1), None)
    else:
        logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returned {type(output).__name__}, in which no logits were found; pass "
            "logits_of"
        )
    return logits


def is_causal(model: nn.Module) -> bool:
    """Whether it is one of transformers' that predict the next token, and shift the labels."""
    return any(name in type(model).__name__ for name in ("ForCausalLM", "LMHeadModel"))


def default_terms(kwargs: Arguments, logits: Tensor, causal: bool) -> Tensor | None:
    """The positions that have a label, as transformers' models compute their loss.

    Without ``labels`` those of the attention mask whose next token counts; None: all.
    """
    labels, lead = kwargs.get("labels"), logits.shape[:-1]
    if isinstance(labels, Tensor) and labels.shape == lead:
        counts = labels != IGNORE_INDEX
    else:
        mask = default_mask((), kwargs)
        if mask is None or mask.shape != lead:
            return None
        counts = mask
    # a causal model's output is for the token that follows
    return functional.pad(counts[..., 1:], (0, 1), value=False) if causal else counts
