"""Whether the triangular kernel or cuBLAS multiplies, as data: per compute capability.

A prediction, not a measurement: published triangular products in Triton, which compute half the
tiles, begin to win against a whole product of cuBLAS at these widths (docs/covariance.md). Nothing
of this has run on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Gate(NamedTuple):
    """Widths D of a factor [D, D] at which a product is organised in another way."""

    triangular: int
    """From here on the triangular kernel of Triton is expected to be the faster one."""
    block: int
    """Rows, about, of one cuBLAS product of several that make up the lower triangle.

    A square of it is 128 tiles of 256 × 128: one wave on 132 multiprocessors, two on 108. Smaller
    blocks leave most of them idle.
    """


GATES = {(8, 0): Gate(triangular=2048, block=2048), (9, 0): Gate(triangular=4096, block=2048)}


def gate_of(capability: tuple[int, int]) -> Gate:
    """The entry of the nearest capability that is not higher; of the lowest, below that."""
    known = [key for key in GATES if key <= capability]
    return GATES[max(known, default=min(GATES))]


def gate(device: torch.device) -> Gate:
    """The entry of a device; in the emulation, which runs on the CPU, the lowest."""
    cuda = device.type == "cuda"
    return gate_of(torch.cuda.get_device_capability(device) if cuda else min(GATES))


def preferred(device: torch.device, width: int) -> str:
    """The back end to ask first for a symmetric update of this width; "" for the usual order."""
    return "cuda" if device.type == "cuda" and width < gate(device).triangular else ""
