"""Hooks on a whole model that open and close a batch of a capture around its forward pass.

They read the padding mask and the labels from the arguments of the model and the logits from what
it returns, so that a training loop, or transformers' Trainer, needs no change.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.curvature import Capture
from fisherkern.curvature._models import (
    Arguments,
    default_logits,
    default_mask,
    default_terms,
    is_causal,
)


class Follower:
    """Feeds a capture from every forward pass in training mode, while :attr:`due`.

    Args:
        capture: of the model.
        model: whose forward pass is followed.
        mask_of: gives the mask of the batch, from positional and keyword arguments.
        logits_of: gives the logits [B, ..., V], from what the model returns.
        terms_of: gives the mask of the terms of the loss, from keyword arguments and logits.
        loss_scale: of "empirical" captures: what the loss was multiplied by.
    """

    def __init__(
        self,
        capture: Capture,
        model: nn.Module,
        mask_of: Callable[[tuple[Any, ...], Arguments], Tensor | None] | None,
        logits_of: Callable[[Any], Tensor] | None,
        terms_of: Callable[[Arguments, Tensor], Tensor | None] | None,
        loss_scale: Callable[[], float],
    ) -> None:
        self._capture = capture
        self._model = weakref.ref(model)  # a copy of the model takes the hooks along
        self._mask_of = mask_of or default_mask
        self._logits_of = logits_of or default_logits
        self._terms_of = terms_of or self._default_terms
        self._loss_scale = loss_scale
        self._causal = is_causal(model)
        self.due = True
        self._new_step = True
        self._open: AbstractContextManager[Any] | None = None
        self._follows = False  # the call of the model that is going on

        def before(*call: Any) -> None:
            self._before(*call)

        def after(*call: Any) -> None:
            self._after(*call)

        # functions, for a copy of the model copies bound methods, and with them all factors
        self._handles = [
            # a model that is itself a layer: the batch opens before its tap, and closes after it
            model.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
            model.register_forward_hook(after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        self.close()
        for handle in self._handles:
            handle.remove()

    def end_step(self) -> None:
        """The gradients of a step are complete: what comes next is a new step."""
        self.close()
        self._new_step = True

    def close(self, error: BaseException | None = None) -> None:
        """Close the batch that is open, if any."""
        opened, self._open = self._open, None
        if opened is not None:
            opened.__exit__(type(error) if error else None, error, None)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self._model():
            return
        self._follows = False
        if not torch.is_grad_enabled():
            return  # the backward pass of the batch that is open may be still to come
        self.close()
        if not (self.due and model.training):
            return
        options: dict[str, Any] = {}
        if self._capture.fisher_type == "empirical":  # how many terms, the logits will tell
            scale = self._loss_scale() * _share(kwargs, self._causal)
            options = {"terms": 0.0, "loss_scale": scale}
        mask = self._mask_of(args, kwargs)
        opened = self._capture.batch(mask=mask, new_step=self._new_step, **options)
        opened.__enter__()
        self._open, self._new_step, self._follows = opened, False, True

    def _after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if model is not self._model() or not self._follows:
            return
        self._follows = False
        try:
            self._add(self._logits_of(output), kwargs)
        except BaseException as error:
            self.close(error)
            raise

    def _add(self, logits: Tensor, kwargs: Arguments) -> None:
        """Add what can be; the batch stays open for the backward pass of the loss.

        There "empirical" gets its gradients, and activation checkpointing runs modules again, which
        have to save what they saved before.
        """
        terms = self._terms_of(kwargs, logits)
        if self._capture.fisher_type == "empirical":
            count = logits.shape[:-1].numel() if terms is None else float(terms.sum())
            self._capture.set_terms(count)
            return
        with torch.autocast(logits.device.type, enabled=False):
            self._capture.add(logits, mask=terms)

    def _default_terms(self, kwargs: Arguments, logits: Tensor) -> Tensor | None:
        return default_terms(kwargs, logits, self._causal)


def _share(kwargs: Arguments, causal: bool) -> float:
    """What transformers' models multiply the mean of their terms by.

    Trainer tells them the number of terms in all micro-batches of a step, and they divide by that.
    """
    whole, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if whole is None or not isinstance(labels, Tensor):
        return 1.0
    terms = default_terms(kwargs, labels.unsqueeze(-1), causal)
    assert terms is not None
    mine = float(terms.sum())
    return mine / float(whole) if mine else 1.0
