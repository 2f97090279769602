"""Hooks on a whole model that open and close a batch of a capture around its forward pass.

They read the padding mask and the labels from the arguments of the model and the logits from what
it returns, so that a training loop, or transformers' Trainer, needs no change.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.curvature import Capture
from fisherkern.curvature._hooks import Hook, removed_with
from fisherkern.curvature._models import (
    Arguments,
    check_classes,
    default_logits,
    default_terms,
    is_causal,
    mask_reader,
    named,
    tell_shape,
)
from fisherkern.optim._ranks import Ranks


class Follower:
    """Feeds a capture from every forward pass in training mode, while :attr:`due`.

    Args:
        capture: of the model.
        model: whose forward pass is followed.
        ranks: that share it.
        mask_of: gives the mask of the batch, from positional and keyword arguments.
        logits_of: gives the logits [B, ..., V], from what the model returns.
        terms_of: gives the mask of the terms of the loss, from keyword arguments and logits.
        loss_scale: of "empirical" captures: what the loss was multiplied by, where the model does
            not return it.
    """

    def __init__(
        self,
        capture: Capture,
        model: nn.Module,
        ranks: Ranks,
        mask_of: Callable[[tuple[Any, ...], Arguments], Tensor | None] | None,
        logits_of: Callable[[Any], Tensor] | None,
        terms_of: Callable[[Arguments, Tensor], Tensor | None] | None,
        loss_scale: Callable[[], float],
    ) -> None:
        self._capture = capture
        self._mask_of = mask_of or mask_reader(model)
        self._logits_of = logits_of or default_logits
        self._causal = causal = is_causal(model)
        self._terms_of = terms_of or (lambda kwargs, z: default_terms(kwargs, z, causal))
        self._loss_scale = loss_scale
        self._ranks, self._shard = ranks, (0, 1)
        self.due = True
        self.new_step = True
        """Whether what comes next is the first batch of a step."""
        self._open: AbstractContextManager[Any] | None = None
        self._share = 1.0  # of the batch that is open
        self._follows = False  # the call of the model that is going on

        before, after = Hook(model, self._before), Hook(model, self._after)
        self._take_off = removed_with(
            self,
            [
                # a model that is itself a layer: the batch opens before its tap, closes after it
                model.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
                model.register_forward_hook(after, with_kwargs=True),
            ],
        )

    @property
    def trains(self) -> bool:
        """Whether any of the layers requires grad now."""
        return any(kept.layer.trained for kept in self._capture.layers.values())

    def remove(self) -> None:
        """Take the hooks off."""
        self.close()
        self._take_off()

    def end_step(self) -> None:
        """The gradients of a step are complete: what comes next is a new step."""
        self.close()
        self.new_step = True

    def close(self, error: BaseException | None = None) -> None:
        """Close the batch that is open, if any."""
        opened, self._open = self._open, None
        if opened is not None:
            opened.__exit__(type(error) if error else None, error, None)

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._follows = False
        if not torch.is_grad_enabled():
            return  # the backward pass of the batch that is open may be still to come
        self.close()
        if not (self.due and model.training and self.trains):
            return
        options: dict[str, Any] = {}
        if self._capture.fisher_type == "empirical":  # how many terms, the logits will tell
            self._share = _share(named(model, args, kwargs), self._causal)
            options = {"terms": 0.0, "loss_scale": self._loss_scale() * self._share}
        shard = (self._ranks.rank, self._ranks.size)
        if shard != self._shard:
            self._capture.number_samples(rank=shard[0], ranks=shard[1])
            self._shard = shard
        mask = self._mask_of(args, kwargs)
        opened = self._capture.batch(mask=mask, new_step=self.new_step, **options)
        opened.__enter__()
        self._open, self.new_step, self._follows = opened, False, True

    def _after(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        if not self._follows:
            return
        self._follows = False
        try:
            self._add(self._logits_of(output), named(model, args, kwargs))
            if self._capture.fisher_type == "empirical":
                self._weigh(output)
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
            tell_shape(self._capture, logits)
            return
        check_classes(logits)
        with torch.autocast(logits.device.type, enabled=False):
            self._capture.add(logits, mask=terms)

    def _weigh(self, output: Any) -> None:
        """Learn what the loss that the model returns is multiplied by, from its own gradient.

        It comes before any other of the backward pass, and knows what is not to be seen from here:
        Trainer multiplies by the number of ranks where they share `num_items_in_batch`.
        """
        loss = _loss_of(output)
        if loss is None or self._open is None:
            return
        held, opened = weakref.ref(self), weakref.ref(self._open)

        def hook(gradient: Tensor) -> None:
            follower, factor = held(), abs(float(gradient))
            if follower is None or follower._open is not opened():
                return
            if 0 < factor < math.inf:  # the layers see for themselves what is not finite
                follower._capture.set_loss_scale(factor * follower._share)

        loss.register_hook(hook)


def _loss_of(output: Any) -> Tensor | None:
    """The loss of what transformers' models return, if it is there and can be differentiated."""
    if isinstance(output, (tuple, list)):
        loss = output[0] if output else None
    else:
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    found = isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad
    return loss if found else None


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
