"""Receiver: what comes of the calls of one layer, checked and added to its curvature."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fisherkern.curvature._finite import all_finite
from fisherkern.curvature._ledger import Ledger
from fisherkern.curvature._tap import Call, is_foreign
from fisherkern.curvature.head import WideCurvature
from fisherkern.curvature.layers import shared_by_samples
from fisherkern.curvature.structures import LayerCurvature


@dataclass
class Batch:
    """The batch that is followed, as far as it is known."""

    active: bool = False
    number: int = 0
    mask: Tensor | None = None
    shape: torch.Size = field(default_factory=torch.Size)
    """[B, *positions] of its tokens."""
    scale: float | None = None
    """Of the squares of the gradients that come now; None: they are not wanted."""

    def open(self, mask: Tensor | None) -> None:
        """Follow the calls of a new one."""
        self.active, self.mask, self.number = True, mask, self.number + 1
        self.shape = torch.Size() if mask is None else mask.shape


NEVER_CALLED = "its module was never called"
WITHOUT_GRADIENTS = (
    "its module was called without gradients, as in activation checkpointing that is reentrant: "
    "use the other kind (use_reentrant=False)"
)


class Receiver:
    """What the tap of a module asks and tells, for one layer.

    Args:
        name: of the layer.
        curvature: which is added to.
        batch: of the capture, shared by its layers.
        ledger: as well.
        summed: whether gradients may come as sums over samples: those of sampled labels, which are
            independent, so that the products of different samples cancel on average.
    """

    def __init__(
        self,
        name: str,
        curvature: LayerCurvature,
        batch: Batch,
        ledger: Ledger,
        summed: bool,
    ) -> None:
        self.name, self._curvature, self._layer = name, curvature, curvature.layer
        self._batch, self._ledger = batch, ledger
        self._summed = summed
        self._warned = False
        self.missing: str | None = NEVER_CALLED
        """Why the layer has no curvature; None once a gradient came."""

    @property
    def batch(self) -> int:
        """The number of the batch that is open."""
        return self._batch.number

    def follow(self) -> bool:
        """Whether a call is to be followed; asked before it."""
        if not self._batch.active:
            return False
        self._ledger.call(self.name)
        if torch.is_grad_enabled():
            return True
        if self.missing == NEVER_CALLED:
            self.missing = WITHOUT_GRADIENTS
        return False

    def observe(self, output: Tensor) -> None:
        """See what a call returned; refuse what does not fit before anything is added."""
        layer, batch, kept = self._layer, self._batch, self._curvature
        narrow = output.dtype == torch.float64 and kept.dtype != torch.float64
        if narrow or output.device != kept.device:
            raise TypeError(
                f"{self.name} gave {output.dtype} on {output.device}, but its curvature is of "
                f"{kept.dtype} on {kept.device}: convert or move a model before it is captured"
            )
        layer.token_mask(batch.mask, layer.lead(layer.by_sample(output, batch.shape)))
        if isinstance(kept, WideCurvature):
            kept.observe(output)

    def receive(self, inputs: Callable[[], Tensor], gradient: Tensor, call: Call) -> None:
        """Add the gradient of a call, and its inputs where they were not."""
        batch, layer = self._batch, self._layer
        if batch.scale is None or not self._ledger.takes(self.name):
            return
        # mask, scale and number of terms are those of the open batch; its loss is not another's
        if call.batch != batch.number or is_foreign(batch):
            return
        g = layer.by_sample(gradient, batch.shape)
        lead = layer.lead(g)
        if not self._summed and shared_by_samples(lead, batch.shape):
            self._refuse_shared(lead)
            return
        self.missing = None

        def x() -> Tensor:
            return layer.by_sample(inputs(), batch.shape)

        # a model may be spread over devices
        mask = None if batch.mask is None else batch.mask.to(g.device)
        over = layer.used(x, layer.token_mask(mask, lead))
        good = _finite(g, layer.gradient_rows, over)
        if not (good and (call.counted or _finite(x(), layer.rows, over))):
            what = "inputs or gradients hold NaN or infinity"
            self._leave_out(f"{what}; this batch is left out of its curvature")
            return
        self._ledger.receive(self.name, call)
        if not call.counted:
            call.counted = True
            self._curvature.add_inputs(x(), over)
        self._curvature.add_gradients(x, g, over, batch.scale)

    def _refuse_shared(self, lead: torch.Size) -> None:
        reason = (
            f"called on tokens of shape {list(lead)} for all samples of a batch at once: their "
            f"gradients cannot be told apart"
        )
        if self.missing is not None:
            self.missing = reason
        self._leave_out(f"{reason}, and it is left out")

    def _leave_out(self, why: str) -> None:
        self._ledger.fail(self.name)
        if not self._warned:
            self._warned = True
            warnings.warn(f"{self.name}: {why} (said once)", RuntimeWarning, stacklevel=2)


def _finite(values: Tensor, rows: Callable[[Tensor], Tensor], mask: Tensor | None) -> bool:
    """Whether the tokens that count hold neither NaN nor infinity."""
    if all_finite([values]):
        return True
    return mask is not None and bool((rows(values).isfinite().all(-1) | ~mask).all())
