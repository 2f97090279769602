"""Stated bars, and whether a run passes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fisherkern.bench.registry import Family
from fisherkern.bench.results import OK, Ratio, Result

EAGER_EACH = 3.0
COMPILE_GEOMEAN = 1.5
COMPILE_LEAST = 1.0
# Extra memory is O(T + V): a few numbers per token and class and thread, and 2 MiB that the
# measurement itself may see (stacks, pages of code).
_BYTES_PER_ENTRY = 16
_MEMORY_SLACK = 2 << 20


@dataclass(frozen=True)
class Verdict:
    """One bar: `value` must be at least `bar` (at most, for memory)."""

    subject: str
    name: str
    value: float | None
    bar: float
    passed: bool
    detail: str = ""


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


def unmeasured(results: Sequence[Result], subject: str) -> list[Result]:
    """Cases for which a subject has no speed although it was to be measured."""
    return [r for r in results if r.provider == subject and r.status != OK]


def speed(results: Sequence[Result], ratios: Sequence[Ratio], subject: str) -> list[Verdict]:
    """Bars against eager (each case) and torch.compile (geometric mean, and each case)."""
    absent = unmeasured(results, subject)
    missing = f"; no speed for {len(absent)} cases" if absent else ""
    verdicts = []
    bars = (
        ("eager", "least over cases, vs eager", min, EAGER_EACH),
        ("compile", "geometric mean, vs compile", geometric_mean, COMPILE_GEOMEAN),
        ("compile", "least over cases, vs compile", min, COMPILE_LEAST),
    )
    for peer, name, summary, bar in bars:
        mine = [r for r in ratios if r.subject == subject and r.peer == peer]
        if all(r.provider != peer for r in results):
            continue  # it was not asked for
        if not mine:
            verdicts.append(Verdict(subject, name, None, bar, False, "nothing was compared"))
            continue
        value = summary([r.median for r in mine])
        detail = f"{len(mine)} cases; least: {describe(least(mine))}{missing}"
        verdicts.append(Verdict(subject, name, value, bar, value >= bar and not absent, detail))
    return verdicts


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


def memory(results: Sequence[Result], subject: str) -> list[Verdict]:
    """Largest extra memory over its O(T + V) allowance, which must be at most 1."""
    worst: tuple[float, Result] | None = None
    for row in results:
        if row.provider == subject and row.status == OK and row.extra_bytes is not None:
            entries = sum(int(part[1:]) for part in row.case.split("_"))
            allowance = _MEMORY_SLACK + _BYTES_PER_ENTRY * max(4, row.threads) * entries
            share = row.extra_bytes / allowance
            worst = max(worst or (share, row), (share, row), key=lambda x: x[0])
    if worst is None:
        return []
    share, row = worst
    extra = (row.extra_bytes or 0) / 2**20
    detail = f"most: {row.op} {row.case} {row.dtype}, {extra:.2f} MiB"
    name = "largest extra memory over its O(T + V) allowance"
    return [Verdict(subject, name, share, 1.0, share <= 1.0, detail)]


def judge(
    results: Sequence[Result],
    ratios: Sequence[Ratio],
    family: Family,
    subjects: Sequence[str],
    device: str,
) -> list[Verdict]:
    """Every bar for each subject that took part: speed and memory on CPU, bandwidth on CUDA."""
    verdicts = []
    for subject in subjects:
        if not any(r.provider == subject for r in results):
            continue
        if device == "cuda":
            verdicts += bandwidth(results, family, subject)
        else:
            verdicts += speed(results, ratios, subject) + memory(results, subject)
    return verdicts
