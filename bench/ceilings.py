"""What the machine can do, measured in the run that reports fractions of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fisherkern.bench.timing import rotation_bytes, synchronize


@dataclass(frozen=True)
class Ceilings:
    """Rates of one device, with all the threads of the run."""

    copy_bandwidth: float
    """Bytes per second of a large copy, counting bytes read and bytes written."""
    gemm_rate: dict[str, float] = field(default_factory=dict)
    """FLOPs per second of a large square matrix product, per dtype."""

    def rate(self, ceiling: str, dtype: str) -> float | None:
        """Rate of what bounds an op, "copy" or "gemm", if it was measured."""
        if ceiling == "copy":
            return self.copy_bandwidth
        # a CPU without units for half precision multiplies faster in float32
        names = [dtype] if dtype == "float64" else [dtype, "float32"]
        return max((self.gemm_rate[n] for n in names if n in self.gemm_rate), default=None)


def _median_seconds(call: Callable[[], object], repeats: int, device: str) -> float:
    # waiting for a GPU takes as long as some calls: wait once for several
    calls = 10 if device == "cuda" else 1
    seconds = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize(device)
        seconds.append((time.perf_counter() - start) / calls)
    return statistics.median(seconds[1:])


def copy_bandwidth(device: str, *, smoke: bool = False, repeats: int = 9) -> float:
    """Bytes per second of copies between buffers that no cache holds, read plus written.

    The destinations have been touched before. A CPU may also read the lines it writes: that traffic
    counts for nobody, neither here nor in the floors of the cases.
    """
    size = (1 << 21) if smoke else (1 << 30 if device == "cuda" else 1 << 26)
    pairs = 1 if smoke else max(1, -(-rotation_bytes(device) // (2 * size)))
    # random bits: some devices are faster on zeros
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device).view(torch.float32)
    sources = [source, *(source.clone() for _ in range(pairs - 1))]
    targets = [torch.zeros_like(source) for _ in sources]

    def copies() -> None:
        for target, origin in zip(targets, sources, strict=True):
            target.copy_(origin)

    return 2 * size * pairs / _median_seconds(copies, 3 if smoke else repeats, device)


def gemm_rate(dtype: torch.dtype, device: str, *, smoke: bool = False, repeats: int = 5) -> float:
    """FLOPs per second of a square matrix product in this dtype."""
    # in half precision a CPU without units for it would take seconds at twice the size
    n = 128 if smoke else (8192 if device == "cuda" else 2048 if dtype.itemsize > 2 else 1024)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    seconds = _median_seconds(lambda: torch.mm(a, b, out=out), 2 if smoke else repeats, device)
    return 2 * n**3 / seconds


def measure(device: str, dtypes: tuple[torch.dtype, ...], *, smoke: bool = False) -> Ceilings:
    """Both ceilings of a device."""
    rates = {
        str(dtype).removeprefix("torch."): gemm_rate(dtype, device, smoke=smoke) for dtype in dtypes
    }
    return Ceilings(copy_bandwidth(device, smoke=smoke), rates)
