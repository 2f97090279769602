"""How the products with the factor U are launched: data, per architecture and arithmetic."""

from __future__ import annotations

from typing import NamedTuple


class Launch(NamedTuple):
    """Parameters of one compiled kernel, but for its columns."""

    tokens: int
    """Tokens of a tile of U."""
    classes: int
    """Classes of a tile of U."""
    warps: int
    stages: int


class Rule(NamedTuple):
    """A launch and the largest tile of columns that it is for."""

    columns: int
    launch: Launch


# What serves a precision: products of bfloat16 terms as accurate as it promises. Six are as good
# as float32, and on an H200 faster than three in TF32; three are better than one in TF32.
ARITHMETIC = {"tf32x3": "bf16x6", "bf16x6": "bf16x6", "tf32": "bf16x3", "ieee": "ieee"}

# Columns of a program: a power of two. The least is what the matrix units take. On an H200 one
# program of `expand` with 128 took 1.4 to 1.6 times as long as two with 64.
LEAST_COLUMNS = 16
MOST_COLUMNS = {"project": 128, "expand": 64}

# Measured are those of "bf16x6" for aligned rows on an H200; elsewhere registers and shared memory
# as compiled decide. "unaligned" is for rows of
# logits that do not begin at multiples of 16 bytes, such as those of 50257 classes: every thread
# then has parts of many rows, and what it keeps per row takes registers.
#
# Stages of `project` are tiles on their way. Those of `expand` are spent twice, as a row is read
# once its unit is known: five keep two tiles on their way.
_SM_90 = {
    "project": {
        "bf16x3": (
            Rule(32, Launch(64, 64, 4, 3)),
            Rule(64, Launch(64, 32, 4, 4)),
            Rule(128, Launch(128, 32, 8, 3)),
        ),
        "bf16x3 unaligned": (Rule(128, Launch(64, 32, 8, 3)),),
        "bf16x6": (Rule(128, Launch(64, 32, 4, 3)),),
        "bf16x6 unaligned": (
            Rule(64, Launch(64, 32, 8, 3)),
            Rule(128, Launch(64, 16, 8, 3)),
        ),
        "ieee": (
            Rule(32, Launch(64, 32, 8, 3)),
            Rule(64, Launch(64, 16, 4, 3)),
            Rule(128, Launch(64, 16, 8, 3)),
        ),
    },
    "expand": {
        "bf16x3": (Rule(64, Launch(32, 64, 4, 5)),),
        "bf16x3 unaligned": (Rule(64, Launch(32, 64, 4, 3)),),
        "bf16x6": (Rule(32, Launch(64, 64, 4, 4)), Rule(64, Launch(32, 64, 4, 5))),
        "bf16x6 unaligned": (Rule(64, Launch(32, 64, 4, 3)),),
        "ieee": (Rule(64, Launch(16, 64, 8, 3)),),
    },
}
# Both operands of mma.sync pass through registers: narrower tiles.
_SM_80 = {
    "project": {
        "bf16x3": (Rule(128, Launch(64, 32, 8, 3)),),
        "bf16x3 unaligned": (Rule(128, Launch(64, 32, 8, 3)),),
        "bf16x6": (
            Rule(32, Launch(64, 32, 4, 3)),
            Rule(64, Launch(64, 16, 4, 4)),
            Rule(128, Launch(64, 16, 8, 4)),
        ),
        "bf16x6 unaligned": (Rule(64, Launch(64, 16, 4, 4)), Rule(128, Launch(64, 16, 8, 4))),
        "ieee": (Rule(32, Launch(64, 32, 8, 3)), Rule(128, Launch(64, 16, 8, 3))),
    },
    "expand": {
        "bf16x3": (Rule(64, Launch(32, 64, 4, 5)),),
        "bf16x3 unaligned": (Rule(64, Launch(32, 64, 4, 3)),),
        "bf16x6": (Rule(32, Launch(32, 64, 4, 5)), Rule(64, Launch(32, 64, 8, 5))),
        "bf16x6 unaligned": (Rule(64, Launch(16, 64, 4, 3)),),
        "ieee": (Rule(64, Launch(16, 64, 8, 3)),),
    },
}
# Small tiles, so that a test of a hundred classes runs through several.
_INTERPRETER = {
    family: {
        arithmetic: (Rule(most, Launch(32, 32, 4, 1)),)
        for arithmetic in ("bf16x3", "bf16x6", "ieee")
    }
    for family, most in MOST_COLUMNS.items()
}

LAUNCHES = {"sm_80": _SM_80, "sm_90": _SM_90, "interpreter": _INTERPRETER}

# Programs of `project` that share the classes of few tokens: four per multiprocessor of an A100 or
# H100. It depends on the architecture alone: so does the order of a sum, and its last bit.
PROGRAMS = {"sm_80": 432, "sm_90": 528, "interpreter": 12}
# The fewest classes of one: with less, writing and adding its sums would cost as much.
CLASSES_PER_SPLIT = {"sm_80": 512, "sm_90": 512, "interpreter": 32}
