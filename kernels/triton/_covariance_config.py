"""Launch parameters of the covariance kernels, as data: per architecture, family and arithmetic.

Families:

======== ==========================================================================
sums     one accumulator: `covariance_kernel`, `cross_kernel`
squares  operands squared in registers: `cross_kernel` with SQUARES
samples  two accumulators: `sample_squares_kernel`
======== ==========================================================================

Arithmetics, which are also what the kernels compile for:

======== ==========================================================================
half     bfloat16 or float16 operands as they are: their products are exact
split    half precision times a float32 weight: two tf32 products, see `outer_products`
tf32     float32 rounded to 10 bits
bf16x6   float32 as six products of bfloat16 terms, as accurate as float32; also what
         serves "tf32x3", which took 1.8 times as long on an H200
ieee     float32 on the ordinary units
======== ==========================================================================

"half unaligned" is for rows that do not begin at multiples of 16 bytes: two bytes at a time go
through registers and not by cp.async, and the stages under way take registers too.

Nothing is tuned at run time. The figures follow from registers and shared memory as compiled;
tests/test_triton_aot.py compiles every entry and fails on a spill. On an H200 "bf16x6" of `sums` is
at the measured rate of float32 products of cuBLAS, and "half" at two fifths of bfloat16 ones.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fisherkern.kernels._config import architecture


class TileLaunch(NamedTuple):
    """Parameters of one compiled kernel."""

    block: int
    """Rows and columns of a tile of the factor."""
    tokens: int
    """Tokens per step."""
    warps: int
    stages: int


class TileRule(NamedTuple):
    """A launch and the largest side of the factor that it is for."""

    width: float
    launch: TileLaunch


_ANY = float("inf")


def _always(*launch: int) -> tuple[TileRule, ...]:
    return (TileRule(_ANY, TileLaunch(*launch)),)


# Half precision: the chain and the sum (`CHAIN_TOKENS`) take 180 registers, which leave one block
# per multiprocessor. Attention heads of 64 would leave three quarters of a tile of 128 idle.
_SM_90 = {
    "sums": {
        "half": (TileRule(64, TileLaunch(64, 64, 4, 4)), TileRule(_ANY, TileLaunch(128, 64, 8, 3))),
        "half unaligned": _always(64, 32, 4, 2),
        "split": _always(128, 32, 8, 3),
        "tf32": _always(128, 32, 8, 3),
        "bf16x6": _always(128, 32, 8, 3),
        "bf16x6 unaligned": _always(128, 16, 8, 2),
        "ieee": _always(64, 16, 8, 3),
    },
    "squares": {
        "tf32": _always(128, 32, 8, 3),
        "bf16x6": _always(128, 32, 8, 3),
        "bf16x6 unaligned": _always(128, 16, 8, 2),
        "ieee": _always(64, 16, 8, 3),
    },
    "samples": {
        "half": _always(128, 64, 8, 3),
        "half unaligned": _always(64, 32, 4, 2),
        "split": _always(64, 32, 4, 3),
        "tf32": _always(64, 32, 4, 3),
        "bf16x6": _always(64, 32, 4, 3),
        "bf16x6 unaligned": _always(64, 16, 4, 2),
        "ieee": _always(64, 16, 8, 3),
    },
}
# Without wgmma the operands pass through registers, beside two accumulators.
_SM_80 = {
    "sums": {
        "half": (TileRule(64, TileLaunch(64, 32, 4, 4)), TileRule(_ANY, TileLaunch(128, 32, 8, 4))),
        "half unaligned": _always(128, 32, 8, 2),
        "split": _always(64, 32, 4, 3),
        "tf32": _always(128, 32, 8, 3),
        "bf16x6": _always(128, 16, 8, 4),
        "bf16x6 unaligned": _always(64, 16, 4, 2),
        "ieee": _always(64, 16, 8, 3),
    },
    "squares": {
        "tf32": _always(128, 32, 8, 3),
        "bf16x6": _always(64, 32, 4, 3),
        "bf16x6 unaligned": _always(64, 16, 4, 2),
        "ieee": _always(64, 16, 8, 3),
    },
    "samples": {
        "half": _always(128, 32, 8, 4),
        "half unaligned": _always(64, 32, 4, 2),
        "split": _always(64, 32, 4, 3),
        "tf32": _always(64, 32, 4, 3),
        "bf16x6": _always(64, 32, 4, 3),
        "bf16x6 unaligned": _always(64, 16, 4, 2),
        "ieee": _always(64, 16, 8, 3),
    },
}
# Small tiles, so that a test of a hundred columns runs through several.
_INTERPRETER = {
    family: {
        arithmetic: _always(32, 32, 4, 1)
        for arithmetic in ("half", "split", "tf32", "bf16x6", "ieee")
    }
    for family in ("sums", "squares", "samples")
}

LAUNCHES = {"sm_80": _SM_80, "sm_90": _SM_90, "interpreter": _INTERPRETER}

# Rows of tiles that are walked column by column, which fixes what is in L2 at one time.
GROUP = 8
# Columns that are averaged into the factor at one time: as many as leave the registers of the main
# loop the most that a kernel needs.
PIECE = 16


class Split(NamedTuple):
    """How a sum over tokens is shared out where a factor has few tiles.

    Both depend on the architecture alone: so does the order of a sum, and its last bit.
    """

    programs: int
    """Two per multiprocessor of an A100 or H100: what can run at one time."""
    tokens: int
    """The fewest per program: less would be spent on its tile of the workspace."""


SPLITS = {"sm_80": Split(216, 256), "sm_90": Split(264, 256), "interpreter": Split(40, 32)}
# Programs along the tokens, and so float32 copies of the factor in the workspace.
MAX_SPLITS = 64

# The bias: tokens × columns of a tile, warps. Bound by memory, hence more programs of fewer tokens.
SUM_TOKENS = 16
SUM_BLOCK = 128
SUM_WARPS = 4
SUM_PROGRAMS_FACTOR = 4
SUM_TOKENS_PER_SPLIT = 64
# Adding the splits: rows × columns of the factor per program, warps.
ADD_ROWS = 8
ADD_BLOCK = 128
ADD_WARPS = 4


def arithmetic_of(dtype: torch.dtype, weighted: bool, squares: bool, precision: str) -> str:
    """The arithmetic of these operands."""
    if dtype == torch.float32:
        return "bf16x6" if precision == "tf32x3" else precision
    if squares:
        return "bf16x6"
    return "split" if weighted else "half"


def tile_launch(family: str, arithmetic: str, side: int, *rows: Tensor) -> TileLaunch:
    """The launch for a factor whose longer side is `side`, and rows [..., d] to read."""
    launches = LAUNCHES[architecture(rows[0].device)][family]
    rules = launches[arithmetic]
    if not all(map(_aligned, rows)):
        rules = launches.get(f"{arithmetic} unaligned", rules)
    return next(rule.launch for rule in rules if side <= rule.width)


def _aligned(x: Tensor) -> bool:
    """Whether a kernel is compiled for rows that begin and end at multiples of 16 elements."""
    sizes = (x.shape[-1], *x.stride()[:-1])
    return x.data_ptr() % 16 == 0 and all(size % 16 == 0 for size in sizes)


def _shared_out(total: int, wanted: int, granule: int) -> tuple[int, int]:
    """The number of splits, and how many of `total` are in each: a multiple of `granule`."""
    each = -(-total // max(1, min(MAX_SPLITS, wanted)))
    each = -(-each // granule) * granule
    return -(-total // each), each


def token_splits(tokens: int, tiles: int, step: int, device: torch.device) -> tuple[int, int]:
    """Splits of the tokens and tokens per split, in whole steps, for this many tiles."""
    split = SPLITS[architecture(device)]
    return _shared_out(tokens, min(split.programs // tiles, tokens // split.tokens), step)


def sample_splits(samples: int, tokens: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """Splits of the samples and samples per split, for this many tokens and tiles."""
    split = SPLITS[architecture(device)]
    return _shared_out(samples, min(split.programs // tiles, tokens // split.tokens), 1)


def sum_splits(total: int, tokens: int, blocks: int, device: torch.device) -> tuple[int, int]:
    """Splits of `total` tokens or samples and how many are in each, for a sum of columns."""
    programs = SPLITS[architecture(device)].programs * SUM_PROGRAMS_FACTOR
    return _shared_out(total, min(programs // blocks, tokens // SUM_TOKENS_PER_SPLIT), 1)
