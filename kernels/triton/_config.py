"""Launch parameters, as data: per architecture, kernel family and number of classes V.

A family is a set of kernels with the same operands per class, and so the same registers per block:

========== ==================================================================
scan       one row operand (logits) and per-row sums
product    logits and v
pair       logits and two vectors
columns    tiles of [ROWS, BLOCK] logits that are summed over tokens
sample     logits and the cumulative sum of one tile in float64
========== ==================================================================

Nothing is tuned at run time. tests/test_triton_aot.py compiles every entry and fails on a spill.
"""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """Parameters of one compiled kernel."""

    block: int
    """Classes per tile."""
    warps: int


class Rule(NamedTuple):
    """A launch and the largest V it is for."""

    classes: float
    launch: Launch


_ANY = float("inf")

# A thread holds block / (32 · warps) classes; 16 bytes per load need 8 of them in half precision.
_SM_90 = {
    "scan": (Rule(1024, Launch(1024, 4)), Rule(_ANY, Launch(4096, 8))),
    "product": (Rule(1024, Launch(1024, 4)), Rule(_ANY, Launch(4096, 8))),
    "pair": (Rule(1024, Launch(1024, 4)), Rule(_ANY, Launch(2048, 8))),
    "columns": (Rule(_ANY, Launch(512, 8)),),
    "sample": (Rule(1024, Launch(1024, 4)), Rule(_ANY, Launch(4096, 8))),
}
# 2.0 TB/s against 3.4–4.8: less in flight per multiprocessor is enough, and 4 warps leave more
# blocks resident to hide the reductions of each other.
_SM_80 = {
    "scan": (Rule(1024, Launch(1024, 4)), Rule(_ANY, Launch(2048, 4))),
    "product": (Rule(1024, Launch(1024, 4)), Rule(_ANY, Launch(2048, 4))),
    "pair": (Rule(1024, Launch(1024, 4)), Rule(_ANY, Launch(2048, 8))),
    "columns": (Rule(_ANY, Launch(512, 8)),),
    "sample": (Rule(1024, Launch(1024, 4)), Rule(_ANY, Launch(2048, 8))),
}
# Small tiles, so that a test of a few hundred classes runs through several.
_INTERPRETER = {
    family: (Rule(512, Launch(64, 4)), Rule(_ANY, Launch(256, 4)))
    for family in ("scan", "product", "pair", "columns", "sample")
}

LAUNCHES = {"sm_80": _SM_80, "sm_90": _SM_90, "interpreter": _INTERPRETER}

# Tokens that one program of a column sum reads at a time.
COLUMN_ROWS = 4
# Column sums: programs along the tokens, and so rows of the float32 workspace [splits, V].
COLUMN_SPLITS = 64
COLUMN_TOKENS_PER_SPLIT = 32
# Statistics: programs that share a row of logits while there are fewer rows than this.
ROW_SPLITS = 64
ROW_PROGRAMS = 512


@cache
def architecture(device: torch.device) -> str:
    """The key of `LAUNCHES` for a device."""
    if device.type != "cuda":
        return "interpreter"
    return "sm_90" if torch.cuda.get_device_capability(device) >= (9, 0) else "sm_80"


def launch(family: str, logits: Tensor) -> Launch:
    """The launch parameters of a kernel of this family for these logits."""
    rules = LAUNCHES[architecture(logits.device)][family]
    return next(rule.launch for rule in rules if logits.shape[-1] <= rule.classes)


def row_splits(tokens: int, tiles: int) -> int:
    """Programs per row that fill the device when there are few tokens."""
    return max(1, min(ROW_SPLITS, tiles, ROW_PROGRAMS // tokens))


def column_splits(tokens: int) -> int:
    """Programs along the tokens of a column sum."""
    return max(1, min(COLUMN_SPLITS, tokens // COLUMN_TOKENS_PER_SPLIT))


def on_device(logits: Tensor) -> AbstractContextManager[object]:
    """Launch on the device of the logits, whichever is the current one."""
    return torch.cuda.device(logits.device) if logits.is_cuda else contextlib.nullcontext()
