"""Medians of interleaved repeats: perf_counter on the CPU, replays of CUDA graphs on a GPU.

Every round times each provider once, so that a slow moment of the machine hits all of them; ratios
are taken within a round. The order is shuffled anew each time, from a fixed seed: dirty lines that
a call leaves in the caches cost whoever comes next, and in a cycle that is always the same one.
Every call gets the next of several sets of buffers
that together exceed the last-level cache, so that no call finds its inputs there.
"""

from __future__ import annotations

import math
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherkern.bench.registry import Provider, Tensors

# A CPU sample lasts at least this long: calls shorter than that are repeated within it.
_MIN_SAMPLE = 2e-3
_MAX_CALLS = 1000
# A call that took so long when it was checked is timed one at a time, without finding that out.
_LONG = 1.0
# However long a round takes, there are so many.
_LEAST_ROUNDS = 3
_MAX_SETS = 64


@dataclass(frozen=True)
class Quantiles:
    """Median and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


def quantiles(values: Sequence[float]) -> Quantiles:
    """Quantiles of at least one value, by linear interpolation."""
    if len(values) == 1:
        return Quantiles(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return Quantiles(statistics.median(values), fifths[0], fifths[-1])


@dataclass
class Buffers:
    """One set of inputs, and of the destination where the op has one."""

    inputs: Tensors
    out: Tensor | None

    @property
    def nbytes(self) -> int:
        """Bytes of all of them."""
        return sum(x.nbytes for x in self.inputs) + (0 if self.out is None else self.out.nbytes)


@dataclass
class Timed:
    """A provider's call, ready to be timed."""

    provider: Provider
    call: Callable[..., Any]
    capturable: bool = True
    seconds: float = 0.0
    """Of the call that was checked."""

    def __call__(self, buffers: Buffers) -> Any:
        """Call it on one set of buffers."""
        if self.provider.uses_out:
            return self.call(*buffers.inputs, out=buffers.out)
        return self.call(*buffers.inputs)


def last_level_cache() -> int:
    """Bytes of the last-level cache of the CPU, 32 MiB where the system does not say."""
    try:
        size = os.sysconf("SC_LEVEL3_CACHE_SIZE")
    except (ValueError, OSError):
        size = 0
    file = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    if size <= 0 and file.exists():
        size = int(file.read_text().strip().removesuffix("K")) * 1024
    return size if size > 0 else 32 << 20


def rotation_bytes(device: str) -> int:
    """Bytes that the sets of buffers should have together: 2 × L3, or 3 × L2 of a GPU."""
    if device == "cuda":
        return 3 * int(torch.cuda.get_device_properties(0).L2_cache_size)
    return min(2 * last_level_cache(), free_memory("cpu") // 4)


def free_memory(device: str) -> int:
    """Bytes that may still be allocated."""
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(free + cached)
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        return 4 << 30


def rotated(buffers: Buffers, total: int) -> list[Buffers]:
    """A set of buffers and as many copies as it takes to reach `total` bytes together."""
    count = min(max(1, -(-total // max(buffers.nbytes, 1))), _MAX_SETS)
    copies = [
        Buffers(
            tuple(x.clone() for x in buffers.inputs),
            None if buffers.out is None else buffers.out.clone(),
        )
        for _ in range(count - 1)
    ]
    return [buffers, *copies]


def synchronize(device: str) -> None:
    """Wait for the device."""
    if device == "cuda":
        torch.cuda.synchronize()


class _CpuSampler:
    def __init__(self, timed: Timed, sets: list[Buffers]) -> None:
        self.timed, self.sets, self.next, self.calls = timed, sets, 0, 1
        if timed.seconds > _LONG:
            return
        with timed.provider.context():
            timed(sets[0])
            start = time.perf_counter()
            timed(sets[-1])
            seconds = time.perf_counter() - start
        self.calls = min(max(1, int(_MIN_SAMPLE / max(seconds, 1e-9))), _MAX_CALLS)

    def sample(self) -> float:
        sets, first, timed = self.sets, self.next, self.timed
        order = [sets[(first + i) % len(sets)] for i in range(self.calls)]
        self.next = (first + self.calls) % len(sets)
        with timed.provider.context():
            start = time.perf_counter()
            for buffers in order:
                timed(buffers)
            return (time.perf_counter() - start) / self.calls


class _CudaSampler:
    """Replays of a graph of one call per set; of an op that cannot be captured, plain calls."""

    def __init__(self, timed: Timed, sets: list[Buffers]) -> None:
        self.timed, self.sets = timed, sets
        # short graphs are dominated by their launch: pass over the sets more than once
        self.passes = -(-8 // len(sets)) if len(sets) < 8 else 1
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), timed.provider.context():
            for buffers in sets[:3]:
                timed(buffers)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        self.graph: torch.cuda.CUDAGraph | None = None
        if timed.capturable:
            self.graph = torch.cuda.CUDAGraph()
            try:
                with timed.provider.context(), torch.cuda.graph(self.graph):
                    self._calls()
            except RuntimeError:
                self.graph = None
                torch.cuda.synchronize()
        for _ in range(2):
            self.sample()

    def _calls(self) -> None:
        for _ in range(self.passes):
            for buffers in self.sets:
                self.timed(buffers)

    def sample(self) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        if self.graph is not None:
            self.graph.replay()
        else:
            with self.timed.provider.context():
                self._calls()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / (self.passes * len(self.sets))


def interleaved(
    timed: Sequence[Timed],
    sets: list[Buffers],
    repeats: int,
    device: str,
    budget: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds per call of every provider, one per round; the i-th of all are of the same round.

    No round begins once `budget` seconds have passed, but at least three there are.
    """
    sampler = _CudaSampler if device == "cuda" else _CpuSampler
    samplers = [sampler(x, sets) for x in timed]
    seconds: dict[str, list[float]] = {x.provider.name: [] for x in timed}
    order = random.Random(0)
    start = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= _LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
        for i in order.sample(range(len(timed)), len(timed)):
            seconds[timed[i].provider.name].append(samplers[i].sample())
    return seconds
