"""Results as text: a line per provider of a case, and the summary with its verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fisherkern.bench import verdict
from fisherkern.bench.ceilings import Ceilings
from fisherkern.bench.results import OK, Ratio, Result
from fisherkern.bench.verdict import Verdict

_NAME = 16
# What bounds an op → unit of its rate and name of its ceiling.
_RATES = {"copy": ("GB/s", "copy"), "gemm": ("GFLOP/s", "GEMM")}


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}"
    raise AssertionError


def header(ceiling: str, width: int = _NAME) -> str:
    """Names of the columns, for providers' names of this width."""
    unit, name = _RATES[ceiling]
    return (
        f"{'provider':{width}} {'median':>10} {'p20':>10} {'p80':>10} {unit:>8} "
        f"{'of ' + name:>8} {'extra MiB':>10} {'error':>9}  "
        "ratios of peers to this, median [p20-p80]"
    )


def _rate(row: Result) -> str:
    """In the unit of the header."""
    if row.median_s is None:
        return ""
    work = row.floor_bytes if row.ceiling == "copy" else row.flops
    return f"{work / row.median_s / 1e9:.1f}"


def line(row: Result, ratios: Sequence[Ratio], width: int = _NAME) -> str:
    """A provider of a case; no speed unless its result was right."""
    error = "" if row.max_error is None else f"{row.max_error:.1e}"
    error = "unchecked" if row.kind == "yardstick" else error
    if row.status != OK:
        bound = "" if row.error_limit is None else f", limit {row.error_limit:.1e}"
        known = f" (error {error}{bound})" if row.max_error is not None else ""
        return f"{row.provider:{width}} {row.status}{known}"
    fraction = "" if row.ceiling_fraction is None else f"{row.ceiling_fraction:.0%}"
    extra = "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.2f}"
    compared = ", ".join(
        f"{r.peer} {r.median:.2f}x [{r.p20:.2f}-{r.p80:.2f}]"
        for r in ratios
        if r.subject == row.provider
    )
    return (
        f"{row.provider:{width}} {_seconds(row.median_s):>10} {_seconds(row.p20_s):>10} "
        f"{_seconds(row.p80_s):>10} {_rate(row):>8} {fraction:>8} {extra:>10} {error:>9}  "
        f"{compared}"
    )


def case(rows: Sequence[Result], ratios: Sequence[Ratio]) -> str:
    """All providers of a case."""
    if not rows:
        return ""
    first = rows[0]
    title = f"{first.op} {first.case} {first.dtype} {first.device}"
    if first.ceiling == "copy":
        work, ceiling = float(first.floor_bytes), "copy bandwidth"
        floor = f"floor {work / 2**20:.1f} MiB"
    else:
        work, ceiling = first.flops, "GEMM rate"
        floor = f"floor {work / 1e9:.1f} GFLOP"
    if first.ceiling_rate is not None:
        floor += f", {_seconds(work / first.ceiling_rate)} at {ceiling}"
    width = max(_NAME, *(len(row.provider) for row in rows))
    lines = [line(row, ratios, width) for row in rows]
    return "\n".join([f"\n{title} ({floor})", header(first.ceiling, width), *lines])


def ceilings(measured: Ceilings) -> str:
    """The measured ceilings."""
    gemm = ", ".join(f"{k} {v / 1e9:.0f} GFLOP/s" for k, v in measured.gemm_rate.items())
    return f"copy {measured.copy_bandwidth / 1e9:.1f} GB/s (read + write); GEMM {gemm}"


def environment(found: dict[str, Any]) -> str:
    """Where a run took place, on one line per fact."""
    return "\n".join(f"{key}: {value}" for key, value in found.items())


def comparisons(ratios: Sequence[Ratio], subjects: Sequence[str]) -> list[str]:
    """Geometric mean and least ratio of each subject against each of its peers."""
    lines = []
    for subject in subjects:
        for peer in dict.fromkeys(r.peer for r in ratios if r.subject == subject):
            mine = [r for r in ratios if r.subject == subject and r.peer == peer]
            mean = verdict.geometric_mean([r.median for r in mine])
            worst = verdict.describe(verdict.least(mine))
            lines.append(
                f"{subject:16} vs {peer:8} geometric mean {mean:5.2f}x over {len(mine)} cases, "
                f"least {worst}"
            )
    return lines


def bars(verdicts: Sequence[Verdict]) -> list[str]:
    """PASS or FAIL of each bar."""
    lines = []
    for v in verdicts:
        value = "-" if v.value is None else f"{v.value:.2f}"
        sign = "<=" if v.at_most else ">="
        word = "PASS" if v.passed else "FAIL"
        lines.append(f"{word}  {v.subject:12} {v.name}: {value} ({sign} {v.bar:g}; {v.detail})")
    return lines


def summary(
    results: Sequence[Result],
    ratios: Sequence[Ratio],
    verdicts: Sequence[Verdict],
    drift: float | None,
) -> str:
    """The end of a run."""
    subjects = list(dict.fromkeys(r.subject for r in ratios))
    lines = ["\nSummary", *comparisons(ratios, subjects), *bars(verdicts)]
    if not verdicts:
        lines.append("No bars were judged.")
    if drift is not None:
        lines.append(f"Copy bandwidth at the end of the run: {drift:.0%} of that at its start.")
    silent = [r for r in results if r.status not in (OK, "not timed")]
    lines += [f"No speed: {r.op} {r.case} {r.dtype} {r.provider}: {r.status}" for r in silent]
    return "\n".join(lines)
