"""Data parallelism: curvature summed over ranks, solvers made by one rank each and broadcast.

Every rank keeps the averages of what it saw. For a refresh the sums of a layer go to the rank that
owns it. Then every rank makes the solvers of its layers, all ranks at a time, and sends them to the
others: each factorisation is done once, and a rank holds twice the sums of its own layers alone.
Symmetric sums travel as their lower triangle.

Source: Pauloski et al. 2021, "KAISA: an adaptive second-order optimizer framework for deep neural
networks".
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fisherkern.curvature import EMACovariance, LayerCurvature, WideCurvature
from fisherkern.curvature._average import MovingAverage
from fisherkern.curvature.low_rank import SketchedAverage
from fisherkern.optim._layers import Solver
from fisherkern.optim._layers import made as rebuilt
from fisherkern.optim._packed import packed, unpack_

Make = Callable[[str, LayerCurvature], Solver | None]
"""Gives the solver of the layer of a name, for this curvature."""


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


class Ranks:
    """The ranks that share a model: one, unless torch.distributed was set up.

    Args:
        group: a process group; None: the default one, if there is one.

    Raises:
        TypeError: the group is something else.
    """

    def __init__(self, group: Any = None) -> None:
        if not (group is None or (dist.is_available() and isinstance(group, dist.ProcessGroup))):
            raise TypeError(
                "group must be a torch.distributed.ProcessGroup or None, not "
                f"{type(group).__name__}"
            )
        self.group = group

    @property
    def size(self) -> int:
        """How many there are now: optimizers are made before Trainer sets up torch.distributed."""
        return dist.get_world_size(self.group) if _distributed() else 1

    @property
    def rank(self) -> int:
        """Which of them this is."""
        return dist.get_rank(self.group) if _distributed() else 0

    def owners(self, layers: Mapping[str, LayerCurvature]) -> dict[str, int]:
        """The rank that makes the solver of each layer: costly ones first, to who has least."""
        loads = [0] * self.size
        owners = {}
        costs = {name: _cost(curvature) for name, curvature in layers.items()}
        for name in sorted(costs, key=lambda name: (-costs[name], name)):
            rank = loads.index(min(loads))
            owners[name] = rank
            loads[rank] += costs[name]
        return owners

    def solvers(
        self, layers: Mapping[str, LayerCurvature], owners: Mapping[str, int], make: Make
    ) -> Iterator[tuple[str, Solver | Exception | None]]:
        """What `make` gives for the curvature that all ranks saw together, on every rank.

        A LinAlgError is given in place of a solver; every other error is raised, on every rank.
        """
        if self.size == 1:
            for name, curvature in layers.items():
                yield name, _checked(_tried(make, name, curvature))
            return
        mine: dict[str, LayerCurvature] = {}
        for name, curvature in layers.items():
            # of a wide layer the tokens are few, and an operator is quicker made than sent
            owner = None if isinstance(curvature, WideCurvature) else owners[name]
            joint = self._joined(curvature, owner)
            if owner is None or owner == self.rank:
                mine[name] = joint
        made = {name: _tried(make, name, joint) for name, joint in mine.items()}
        del mine
        for name, curvature in layers.items():
            result = made.pop(name, None)
            if not isinstance(curvature, WideCurvature):
                result = self._broadcast(result, owners[name])
            yield name, _checked(result)

    def _broadcast(
        self, result: Solver | Exception | None, owner: int
    ) -> Solver | Exception | None:
        """What the owner has."""
        message: list[Any] = [result]
        if isinstance(result, Solver):
            message = [(type(result).__name__, _described(result))]
        dist.broadcast_object_list(message, self._global(owner), group=self.group)
        if not isinstance(message[0], tuple):
            return message[0]
        kind, parts = message[0]
        own = result.tensors() if isinstance(result, Solver) else {}
        values = {name: self._sent(own.get(name), part, owner) for name, part in parts.items()}
        return rebuilt(kind, values)

    def joint(self, curvature: LayerCurvature) -> LayerCurvature:
        """The curvature that all ranks saw together."""
        return curvature if self.size == 1 else self._joined(curvature, None)

    def average(self, value: float, device: torch.device) -> float:
        """The mean of a number over the ranks."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total, group=self.group)
        return float(total) / self.size

    def mean(self, average: MovingAverage) -> Tensor:
        """The mean over what all ranks saw."""
        return (average if self.size == 1 else average.all_reduced(self.group)).mean()

    def _joined(self, curvature: LayerCurvature, owner: int | None) -> LayerCurvature:
        """The curvature of all ranks, at the owner or, where that is None, everywhere."""
        joint = copy.copy(curvature)
        for name, average in curvature.averages.items():
            whole = type(average).merge([average])
            self._sum(whole._sum, owner, isinstance(whole, EMACovariance))
            self._sum(whole._count, owner, False)
            if isinstance(whole, SketchedAverage):
                whole.join(self._gathered(whole.columns))
            setattr(joint, name, whole)
        if isinstance(joint, WideCurvature):
            joint.join(self._gathered(joint.extra_state()))
        return joint

    def _gathered(self, value: Any) -> list[Any]:
        parts: list[Any] = [None] * self.size
        dist.all_gather_object(parts, value, group=self.group)
        return parts

    def _sum(self, total: Tensor, owner: int | None, symmetric: bool) -> None:
        sent = packed(total) if symmetric else total
        if owner is None:
            dist.all_reduce(sent, group=self.group)
        else:
            dist.reduce(sent, self._global(owner), group=self.group)
        if symmetric:
            unpack_(total, sent)

    def _sent(self, value: Tensor | None, part: Any, owner: int) -> Tensor | None:
        """A part of a solver as the owner has it, by its description."""
        if part is None:
            return None
        shape, dtype, device = part
        if value is None:
            whole = torch.empty(shape, dtype=dtype, device=_local(device))
        else:
            whole = value.contiguous()
        dist.broadcast(whole, self._global(owner), group=self.group)
        return whole

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


def _tried(make: Make, name: str, curvature: LayerCurvature) -> Solver | Exception | None:
    try:
        return make(name, curvature)
    except Exception as failure:
        return failure  # of whatever kind: other ranks wait to hear of it


def _checked(result: Solver | Exception | None) -> Solver | Exception | None:
    if isinstance(result, Exception) and not isinstance(result, torch.linalg.LinAlgError):
        raise result
    return result


def _described(solver: Solver) -> dict[str, Any]:
    return {
        name: None if value is None else (value.shape, value.dtype, value.device.type)
        for name, value in solver.tensors().items()
    }


def _local(kind: str) -> torch.device:
    """The device of this rank of a kind that another rank named."""
    if kind == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(kind)


def _cost(curvature: LayerCurvature) -> int:
    """The order of its factorisations; what every rank does for itself costs no one more."""
    if isinstance(curvature, WideCurvature):
        return 0
    averages = curvature.averages.values()
    return sum(
        len(average._sum) ** 3 if isinstance(average, EMACovariance) else average._sum.numel()
        for average in averages
    )
