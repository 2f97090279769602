"""What the triangular covariance kernel should reach on GPUs that are not here: a prediction.

``python -m fisherkern.bench.predictions`` prints the table of docs/covariance.md. The time of a
product is that of its waves of tiles at the rate of one multiprocessor, or of its memory traffic if
that is longer. Nothing in it was measured by us: rates are peaks of the data sheets times an
efficiency that others have published, and the first run on such a device replaces it.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Device(NamedTuple):
    """Peaks for bfloat16, and how near to them a main loop comes."""

    name: str
    multiprocessors: int
    teraflops: float
    terabytes: float
    whole: float
    """Share of the peak that cuBLAS reaches in a large product."""
    triangular: float
    """Speed of a Triton main loop beside cuBLAS's, from published triangular products."""
    tile: int
    """Side of our tiles (kernels/triton/_covariance_config.py)."""
    resident: int
    """Blocks per multiprocessor."""


DEVICES = (
    # 1.73 to 1.78 times cuBLAS at d >= 4096 for half the work: 0.88 of its rate
    Device("A100", 108, 312.0, 2.04, 0.80, 0.88, 128, 2),
    # 1.56 to 1.61 times on an H800: 0.79
    Device("H200", 132, 989.0, 4.8, 0.72, 0.79, 128, 2),
)
# cuBLAS on both: its own tiles are larger, which costs it more in the last wave
_CUBLAS_TILE = (256, 128)
SHAPES = ((8192, 1024), (8192, 2048), (8192, 4096), (16384, 4096), (8192, 8192), (32768, 8192))


def _waves(tiles: int, slots: int) -> float:
    """Waves of blocks, the last one whole."""
    return math.ceil(tiles / slots)


def _seconds(
    device: Device, tokens: int, tiles: int, area: int, resident: int, share: float, traffic: float
) -> float:
    """Time of `tiles` of `area` sums each at this share of the peak, or of the bytes of traffic."""
    slots = device.multiprocessors * resident
    # few tiles: the tokens are split until the device is full
    splits = max(1, min(slots // tiles, tokens // 256))
    rate = device.teraflops * 1e12 * share / slots
    arithmetic = _waves(tiles * splits, slots) * 2 * area * tokens / splits / rate
    return max(arithmetic, traffic / (device.terabytes * 1e12))


def predict(device: Device, tokens: int, width: int) -> tuple[float, float]:
    """Seconds of ours, and of cuBLAS's whole product with a moving average after it."""
    blocks = math.ceil(width / device.tile)
    read = 2.0 * tokens * width
    ours = _seconds(
        device,
        tokens,
        blocks * (blocks + 1) // 2,
        device.tile**2,
        device.resident,
        device.whole * device.triangular,
        read + 4.0 * width * width,  # half the factor, read and written
    )
    rows, columns = _CUBLAS_TILE
    product = _seconds(
        device,
        tokens,
        math.ceil(width / rows) * math.ceil(width / columns),
        rows * columns,
        1,
        device.whole,
        read + 4.0 * width * width,
    )
    # A <- beta A + (1 - beta) C as a kernel of its own: two reads and a write
    average = 12.0 * width * width / (device.terabytes * 1e12)
    return ours, product + average


def table() -> str:
    """Markdown."""
    lines = [
        "| (T, d), bfloat16 | " + " | ".join(d.name for d in DEVICES) + " |",
        "|---|" + "---|" * len(DEVICES),
    ]
    for tokens, width in SHAPES:
        cells = []
        for device in DEVICES:
            ours, theirs = predict(device, tokens, width)
            cells.append(f"{ours * 1e3:.2f} ms, {theirs / ours:.2f}× cuBLAS")
        lines.append(f"| ({tokens}, {width}) | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
