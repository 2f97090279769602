"""Time and peak memory of a call, by the same method for every implementation.

Time is the median over repeats that alternate between the implementations, so that a machine that
slows down meanwhile slows all of them. Memory on Linux is the resident high-water mark of the
process over the call minus what was resident before: it sees the results, every temporary and the
scratch of C++ kernels alike, and nothing that was reserved but never touched. Elsewhere it is the
peak of what torch's CPU allocator handed out, which does not see scratch outside of it.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


def median_seconds(
    calls: Sequence[Call],
    repeats: int = 5,
    budget: float = 2.5,
    *,
    least: int = 3,
    warm_up: bool = True,
) -> list[float]:
    """Median seconds of each call: a warm-up, then alternating repeats.

    Args:
        calls: the implementations to compare.
        repeats: alternating repeats after the warm-up.
        budget: seconds for all of them; once spent, no repeat beyond the `least` begins.
        least: repeats made in any case.
        warm_up: False where the calls ran just before.
    """
    for call in calls if warm_up else ():
        call()
    seconds: list[list[float]] = [[] for _ in calls]
    began = time.perf_counter()
    for repeat in range(repeats):
        if repeat >= least and time.perf_counter() - began > budget:
            break
        for call, measured in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            measured.append(time.perf_counter() - start)
    return [statistics.median(measured) for measured in seconds]


def peak_extra_bytes(call: Call) -> int:
    """Peak memory of a call beyond what was there before it; its result is included."""
    gc.collect()
    if sees_resident_memory():
        return _resident_peak(call)
    return _allocator_peak(call)


def memory_method() -> str:
    """What :func:`peak_extra_bytes` measures here, in words."""
    if sees_resident_memory():
        return "resident high-water mark of the process during one call, result included"
    return "peak of torch's CPU allocator during one call, result included, other scratch not"


def sees_resident_memory() -> bool:
    """Whether the kernel lets this process read and reset its resident high-water mark."""
    try:
        _RESET.write_text("5")
        return _status("VmHWM") > 0
    except (OSError, StopIteration):
        return False


def resident_peak_bytes() -> int:
    """The resident high-water mark of this process, on Linux."""
    return _status("VmHWM")


def _status(field: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) * 1024


def _resident_peak(call: Call) -> int:
    # return free pages of the C heap first, or a call could fill them unseen
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    _RESET.write_text("5")
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _allocator_peak(call: Call) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    del result
    current = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak
