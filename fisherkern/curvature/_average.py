"""MovingAverage: S / n with the sum S and the count n averaged apart, which makes both exact."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from fisherkern import checks

# sum, ema_decay, scale: sum ← ema_decay · sum + (1 − ema_decay) · scale · term, or, where the decay
# is None, sum + scale · term. The convention of the covariance ops.
Write = Callable[[Tensor, float | None, float], None]


def checked_decay(ema_decay: object) -> float | None:
    """β in [0, 1), or None for an average over all steps alike."""
    if ema_decay is None:
        return None
    beta = checks.number("ema_decay", ema_decay, 0.0, 1.0)
    if beta == 1:
        raise ValueError("ema_decay is 1: the average would never move; allowed is [0, 1)")
    return beta


def checked_count(count: object, device: torch.device) -> Tensor | float:
    """A number of tokens >= 0, or a scalar tensor of one that an average on the device can take.

    The value of a tensor is checked on a CPU alone: a GPU would have to be waited for.
    """
    if not isinstance(count, Tensor):
        return checks.number("count", count, 0.0, math.inf)
    if count.shape != ():
        raise ValueError(f"count has shape {list(count.shape)}; expected a scalar")
    if count.is_complex() or count.dtype == torch.bool:
        raise TypeError(f"count has dtype {count.dtype}; expected one of real numbers")
    if count.device.type == "cpu":
        return checks.number("count", count.item(), 0.0, math.inf)
    if count.device != device:
        raise ValueError(f"count is on {count.device}; expected {device}, or the cpu")
    return count


class MovingAverage(ABC):
    """What averages have in common: decay per step, merging, reduction over ranks, saving.

    A step may come in parts: :meth:`begin_step` makes the next part decay what is there, and parts
    after it add. Steps without a part decay too, when the next one comes.
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        ema_decay: float | None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.ema_decay = checked_decay(ema_decay)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype is {dtype}; allowed are float32, float64")
        self._sum = torch.zeros(tuple(shape), dtype=dtype, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)
        self._steps_due = 0

    @property
    def count(self) -> Tensor:
        """The moving average of the number of tokens, a float64 scalar."""
        return self._count.clone()

    def begin_step(self) -> None:
        """What is added from now on belongs to a new step."""
        self._steps_due += 1

    def add(self, write: Write, count: Callable[[], Tensor | float], scale: float = 1.0) -> None:
        """Add a part of the step: `write` adds its term to the sum, then tokens are counted."""
        share = 1.0 if self.ema_decay is None else 1.0 - self.ema_decay
        if self.ema_decay is None or not self._steps_due:
            write(self._sum, None, share * scale)
        else:
            decay = self.ema_decay**self._steps_due
            # an op weighs the new term by one minus the decay it is told
            write(self._sum, decay, scale * share / (1.0 - decay))
            self._decayed(decay)
        self._steps_due = 0
        self._count.add_(count(), alpha=share)

    def add_count(self, count: Tensor | float) -> None:
        """Count tokens whose terms were added with a count of zero."""
        self.settle()
        self._count.add_(count, alpha=1.0 if self.ema_decay is None else 1.0 - self.ema_decay)

    def settle(self) -> None:
        """Decay for the steps that nothing was added in."""
        if self.ema_decay is not None and self._steps_due:
            decay = self.ema_decay**self._steps_due
            self._sum.mul_(decay)
            self._decayed(decay)
        self._steps_due = 0

    def _decayed(self, decay: float) -> None:
        """Let what is kept beside the sum follow it."""
        self._count.mul_(decay)

    def mean(self) -> Tensor:
        """S / n, a new tensor; zeros while nothing was counted."""
        n = torch.where(self._count == 0, 1.0, self._count)
        return (self._sum / n).to(self._sum.dtype)

    @abstractmethod
    def _like(self) -> Self:
        """An empty average of the same configuration."""

    @classmethod
    def merge(cls, shards: Sequence[Self]) -> Self:
        """The average of the union of the tokens: shards of the same steps as if they were one.

        Raises:
            ValueError: no shards, or shards of different configurations.
        """
        if not shards:
            raise ValueError(f"shards is empty; expected at least one {cls.__name__}")
        merged = shards[0]._like()
        for shard in shards:
            if repr(shard) != repr(merged):
                raise ValueError(f"shards holds {shard!r} and {merged!r}; they must be alike")
        for shard in shards:
            merged.merge_(shard)
        return merged

    def merge_(self, other: Self) -> None:
        """Add the tokens that an average alike saw in the same steps."""
        self.settle()
        other.settle()
        self._sum.add_(other._sum)
        self._count.add_(other._count)

    def all_reduced(self, group: Any = None) -> Self:
        """The merge of the averages of all ranks of a torch.distributed group, on every rank.

        The local average stays as it was, so that what it saw is not counted again next time.
        """
        merged = type(self).merge([self])
        torch.distributed.all_reduce(merged._sum, group=group)
        torch.distributed.all_reduce(merged._count, group=group)
        return merged

    def _configuration(self) -> dict[str, Any]:
        """What a saved state must agree in."""
        return {"ema_decay": self.ema_decay}

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and plain values, for torch.save; a copy."""
        return {
            "sum": self._sum.clone(),
            "count": self._count.clone(),
            "steps_due": self._steps_due,
            **self._configuration(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same shape; its configuration must be that of this object.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or does not fit; the state is as it
                was.
        """
        self.check_state(state)
        self._sum.copy_(state["sum"])
        self._count.copy_(state["count"])
        self._steps_due = state["steps_due"]

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` would, and change nothing."""
        expected = self._configuration()
        lacking = [key for key in ("count", "sum", "steps_due", *expected) if key not in state]
        if lacking:
            raise KeyError(f"state lacks {', '.join(lacking)}")
        for name, value in expected.items():
            if state[name] != value:
                raise ValueError(f"state has {name} {state[name]}; expected {value}")
        total, count = (checks.tensor(name, state[name]) for name in ("sum", "count"))
        if total.shape != self._sum.shape or count.shape != ():
            raise ValueError(
                f"state has a sum of shape {list(total.shape)}; expected {list(self._sum.shape)}"
            )
        for name, value in (("sum", total), ("count", count)):
            if value.dtype not in (torch.float32, torch.float64):
                raise TypeError(
                    f"state has a {name} of dtype {value.dtype}; allowed are float32, float64"
                )
        if checks.integer("steps_due", state["steps_due"]) < 0:
            raise ValueError(f"state has steps_due {state['steps_due']}; allowed are ints >= 0")
