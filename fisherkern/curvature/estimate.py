"""estimate_fisher: the curvature of a model over a data set, with progress and resumption."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherkern import checks
from fisherkern.curvature._models import (
    Arguments,
    check_classes,
    default_logits,
    default_terms,
    inside,
    is_causal,
    mask_reader,
    tell_shape,
)
from fisherkern.curvature.capture import Capture
from fisherkern.curvature.structures import EigenCurvature
from fisherkern.reference import IGNORE_INDEX


def estimate_fisher(
    model: nn.Module,
    data_loader: Iterable[Any],
    *,
    mask_of: Callable[[tuple[Any, ...], Arguments], Tensor | None] | None = None,
    logits_of: Callable[[Any], Tensor] | None = None,
    terms_of: Callable[[Arguments, Tensor], Tensor | None] | None = None,
    progress: bool | Callable[[int], None] = True,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_period: int = 100,
    **options: Any,
) -> Capture:
    """Run a model over batches and average the curvature of its layers.

    The model runs as it is: put it into ``eval`` mode first unless dropout is part of it. Its
    parameters and their gradients are left alone. "ekfac" goes over the data twice, for the factors
    and for the moments in their eigenbases.

    The loss is the cross-entropy of a softmax over the last dimension of the logits. The Fisher of
    "mc" and "type-2" takes no labels, but has its terms where the loss has: where there are labels,
    not at those of −100; of a causal model not at the last position, which has no next token.

    Args:
        model: whose curvature it is; layers have the names that they have inside of what compiles
            it or makes it data-parallel.
        data_loader: batches: mappings of keyword arguments, or pairs (input, labels), or inputs.
            They are moved to the device of the model. For checkpoints and "ekfac" it has to give
            the same batches again.
        mask_of: arguments of the model to the mask of its tokens; None: the ``attention_mask``.
        logits_of: what the model returns to its logits [B, ..., V]; None: ``logits``, or the
            tensor itself, also after a loss in a tuple.
        terms_of: (keyword arguments, logits) to the mask of the terms; None: where labels are not
            −100, or without them where tokens count, shifted by one for a causal model.
        progress: whether a bar is shown, if tqdm is installed; or a function that is called with
            the number of batches that are done.
        checkpoint: file that the state is saved to and, if it exists, resumed from.
        checkpoint_period: batches per save.
        options: of :class:`Capture`; `ema_decay` is None unless it is given.

    Returns:
        A :class:`Capture` that is detached from the model.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value; an iterator for "ekfac";
            labels that are missing for "empirical", or do not fit the logits; padding of an encoder
            and decoder without `mask_of`; logits of one class.

    >>> import torch
    >>> from fisherkern.curvature import estimate_fisher
    >>> model = torch.nn.Linear(3, 2)
    >>> batches = [(torch.randn(4, 3), torch.randint(2, (4,))) for _ in range(2)]
    >>> fisher = estimate_fisher(model, batches, fisher_type="type-2", progress=False)
    >>> fisher.layers[""].G.count
    tensor(8., dtype=torch.float64)
    """
    if checks.integer("checkpoint_period", checkpoint_period) < 1:
        raise ValueError(f"checkpoint_period is {checkpoint_period}; allowed are ints >= 1")
    capture = Capture(inside(model), **{**options, "loss_reduction": "sum"})
    if capture.structure == "ekfac" and isinstance(data_loader, Iterator):
        raise ValueError(
            f"data_loader is a {type(data_loader).__name__}, which ends with its first pass; "
            '"ekfac" goes over the data twice: pass what can be iterated again, such as a list'
        )
    reader = _Reader(model, mask_of, logits_of, terms_of)
    saved = None if checkpoint is None else Path(checkpoint)
    passed, done = _resumed(capture, saved)
    with capture, torch.enable_grad():
        for number in range(passed, 2 if capture.structure == "ekfac" else 1):
            if number and not done:
                _refresh(capture)
            for index, batch in _shown(data_loader, done, progress):
                reader.add(capture, batch)
                if saved is not None and (index + 1) % checkpoint_period == 0:
                    _save(capture, saved, number, index + 1)
            done = 0
    return capture


class _Reader:
    """Runs a model on a batch, whatever kind of batch and model, inside a capture."""

    def __init__(
        self,
        model: nn.Module,
        mask_of: Callable[[tuple[Any, ...], Arguments], Tensor | None] | None,
        logits_of: Callable[[Any], Tensor] | None,
        terms_of: Callable[[Arguments, Tensor], Tensor | None] | None,
    ) -> None:
        self._model, self._causal = model, is_causal(model)
        self._mask_of, self._logits_of = mask_of or mask_reader(model), logits_of or default_logits
        self._terms_of = terms_of
        self._device = next(model.parameters()).device

    def add(self, capture: Capture, batch: Any) -> None:
        """Add the curvature of a batch."""
        args, kwargs, labels = _arguments(_moved(batch, self._device))
        empirical = capture.fisher_type == "empirical"
        with capture.batch(mask=self._mask_of(args, kwargs), terms=0.0 if empirical else None):
            logits = self._logits_of(self._model(*args, **kwargs))
            check_classes(logits)
            if self._terms_of is None:
                terms = default_terms({**kwargs, "labels": labels}, logits, self._causal)
            else:
                terms = self._terms_of(kwargs, logits)
            if not empirical:
                capture.add(logits, mask=terms)
                return
            tell_shape(capture, logits)
            chosen, targets = self._targets(logits, labels, terms)
            capture.set_terms(len(targets))
            capture.add_loss(functional.cross_entropy(chosen, targets, reduction="sum"))

    def _targets(
        self, logits: Tensor, labels: Tensor | None, terms: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [N, V] and labels [N] of the terms."""
        if labels is None:
            raise ValueError(
                'data_loader gives no labels; "empirical" needs pairs (input, labels), or mappings '
                "with labels"
            )
        if labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"labels has shape {list(labels.shape)}; expected {list(logits.shape[:-1])}, one "
                f"for each of the logits {list(logits.shape)}"
            )
        if self._causal:  # the output of a position is for the token that follows
            labels = functional.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
        counts = labels != IGNORE_INDEX
        if terms is not None:
            counts &= terms
        wide = torch.promote_types(logits.dtype, torch.float32)
        return logits[counts].to(wide), labels[counts]


def _arguments(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any], Tensor | None]:
    """Positional and keyword arguments of a model, and labels."""
    if isinstance(batch, Mapping):
        return (), dict(batch), batch.get("labels")
    if isinstance(batch, (tuple, list)):
        if len(batch) not in (1, 2):
            raise ValueError(
                f"data_loader gave {len(batch)} things; expected an input, a pair (input, labels), "
                "or a mapping of keyword arguments"
            )
        return (batch[0],), {}, batch[1] if len(batch) == 2 else None
    return (batch,), {}, None


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        values = [_moved(value, device) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    return batch


def _shown(
    data_loader: Iterable[Any], done: int, progress: bool | Callable[[int], None]
) -> Iterator[tuple[int, Any]]:
    """Batches that are left, with their numbers, while progress is shown."""
    tell = progress if callable(progress) else None
    bar: Any = None
    if progress is True and importlib.util.find_spec("tqdm") is not None:
        from tqdm.auto import tqdm

        total = len(data_loader) if isinstance(data_loader, Sized) else None
        bar = tqdm(total=total, initial=done, desc="Fisher", unit="batch")
    try:
        for index, batch in enumerate(itertools.islice(data_loader, done, None), start=done):
            yield index, batch
            if tell is not None:
                tell(index + 1)
            if bar is not None:
                bar.update()
    finally:
        if bar is not None:
            bar.close()


def _refresh(capture: Capture) -> None:
    for curvature in capture.layers.values():
        if isinstance(curvature, EigenCurvature):
            curvature.refresh()


def _save(capture: Capture, path: Path, number: int, done: int) -> None:
    """Whole or not at all: a crash while writing leaves the file that was there."""
    part = path.with_name(path.name + ".part")
    torch.save({"pass": number, "batches": done, "capture": capture.state_dict()}, part)
    part.replace(path)


def _resumed(capture: Capture, path: Path | None) -> tuple[int, int]:
    """The pass, and the batches of it that a checkpoint has done."""
    if path is None or not path.exists():
        return 0, 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    capture.load_state_dict(state["capture"])
    return state["pass"], state["batches"]
