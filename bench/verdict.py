"""Whether a run passes the bars that its family states."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from fisherkern.bench.registry import Bar, Family
from fisherkern.bench.results import OK, Ratio, Result


@dataclass(frozen=True)
class Verdict:
    """One bar: `value` must be at least `bar`, or at most."""

    subject: str
    name: str
    value: float | None
    bar: float
    passed: bool
    detail: str = ""
    at_most: bool = False


def geometric_mean(values: Sequence[float]) -> float:
    """Exp of the mean logarithm; ValueError for none, or for one that is not positive."""
    if not values or min(values) <= 0:
        raise ValueError(f"the geometric mean needs positive values, got {list(values)}")
    return math.exp(sum(map(math.log, values)) / len(values))


def least(ratios: Sequence[Ratio]) -> Ratio:
    """The ratio with the smallest median."""
    return min(ratios, key=lambda ratio: ratio.median)


def describe(ratio: Ratio) -> str:
    """Which case a ratio is of, and its spread."""
    return (
        f"{ratio.op} {ratio.case} {ratio.dtype} {ratio.median:.2f}x "
        f"[{ratio.p20:.2f}-{ratio.p80:.2f}]"
    )


def _speed(
    results: Sequence[Result], ratios: Sequence[Ratio], bar: Bar, subject: str
) -> Verdict | None:
    covered = [r for r in results if bar.covers(r.op, r.dtype, r.case)]
    if all(r.provider != bar.peer for r in covered):
        return None  # it was not asked for
    mine = [r for r in ratios if (r.subject, r.peer) == (subject, bar.peer)]
    mine = [r for r in mine if bar.covers(r.op, r.dtype, r.case)]
    if not mine:
        return Verdict(subject, bar.name, None, bar.value, False, "nothing was compared")
    # cases for which the subject has no speed although it was to be measured
    absent = sum(r.provider == subject and r.status != OK for r in covered)
    medians = [r.median for r in mine]
    value = min(medians) if bar.summary == "least" else geometric_mean(medians)
    detail = f"{len(mine)} cases; least: {describe(least(mine))}"
    detail += f"; no speed for {absent} cases" if absent else ""
    return Verdict(subject, bar.name, value, bar.value, value >= bar.value and not absent, detail)


def speed(
    results: Sequence[Result],
    ratios: Sequence[Ratio],
    family: Family,
    subject: str,
    device: str = "cpu",
) -> list[Verdict]:
    """The bars of a device against peers that took part."""
    bars = [bar for bar in family.bars if bar.device == device and bar.binds(subject)]
    verdicts = (_speed(results, ratios, bar, subject) for bar in bars)
    return [verdict for verdict in verdicts if verdict is not None]


def bandwidth(results: Sequence[Result], family: Family, subject: str) -> list[Verdict]:
    """On CUDA: each op's least fraction of its measured ceiling against its target."""
    verdicts = []
    for op in family.ops:
        rows = [r for r in results if r.provider == subject and r.op == op.name]
        if op.target is None or not rows:
            continue
        name = f"{op.name}: least fraction of measured {op.ceiling} rate"
        fractions = {r.ceiling_fraction: r for r in rows if r.ceiling_fraction is not None}
        if not fractions:
            verdicts.append(Verdict(subject, name, None, op.target, False, "nothing was measured"))
            continue
        value = min(fractions)
        detail = f"{len(rows)} cases; least: {fractions[value].case} {fractions[value].dtype}"
        whole = all(r.status == OK for r in rows)
        verdicts.append(
            Verdict(subject, name, value, op.target, value >= op.target and whole, detail)
        )
    return verdicts


def memory(
    results: Sequence[Result], family: Family, subject: str, asked: bool = False
) -> list[Verdict]:
    """Largest extra memory over its allowance, which must be at most 1.

    A figure that is missing fails it where memory was `asked` for, or measured of anybody.
    """
    asked = asked or any(row.extra_bytes is not None for row in results)
    mine = [row for row in results if row.provider == subject and row.status == OK]
    absent = sum(row.extra_bytes is None for row in mine) if asked else 0
    name = f"largest extra memory over its {family.memory.name}"
    worst: tuple[float, Result] | None = None
    for row in mine:
        if row.extra_bytes is not None:
            shape = tuple(int(number) for number in re.findall(r"\d+", row.case))
            share = row.extra_bytes / family.memory.nbytes(shape, row.threads)
            worst = max(worst or (share, row), (share, row), key=lambda x: x[0])
    missing = f"no memory for {absent} cases"
    if worst is None:
        return [Verdict(subject, name, None, 1.0, False, missing, True)] if absent else []
    share, row = worst
    extra = (row.extra_bytes or 0) / 2**20
    detail = f"most: {row.op} {row.case} {row.dtype}, {extra:.2f} MiB"
    detail += f"; {missing}" if absent else ""
    return [Verdict(subject, name, share, 1.0, share <= 1.0 and not absent, detail, at_most=True)]


def shares(results: Sequence[Result], family: Family, subject: str) -> list[Verdict]:
    """Extra memory and errors over those of a peer in the same case."""
    verdicts = []
    right = {(r.provider, r.op, r.case, r.dtype): r for r in results if r.status == OK}
    for share in family.shares:
        found = []
        for key, row in right.items():
            peer = right.get((share.peer, *key[1:]))
            mine, theirs = (getattr(r, share.figure, None) for r in (row, peer))
            if key[0] == subject and mine is not None and theirs is not None:
                found.append((mine / theirs if theirs else math.inf, row))
        if found:
            worst, row = max(found, key=lambda x: x[0])
            detail = f"{len(found)} cases; most: {row.op} {row.case} {row.dtype}"
            verdicts.append(
                Verdict(subject, share.name, worst, share.value, worst <= share.value, detail, True)
            )
    return verdicts


def judge(
    results: Sequence[Result],
    ratios: Sequence[Ratio],
    family: Family,
    subjects: Sequence[str],
    device: str,
    memory_asked: bool = False,
) -> list[Verdict]:
    """Every bar for each subject that took part: speed; on CPU memory, on CUDA bandwidth."""
    verdicts = []
    for subject in subjects:
        if not any(r.provider == subject for r in results):
            continue
        verdicts += speed(results, ratios, family, subject, device)
        if device == "cuda":
            verdicts += bandwidth(results, family, subject)
        else:
            verdicts += memory(results, family, subject, memory_asked)
            verdicts += shares(results, family, subject)
    return verdicts
