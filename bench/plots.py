"""PNG plots of results (with matplotlib): bars against the floor, roofline, memory by shape."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from fisherkern.bench.ceilings import Ceilings
from fisherkern.bench.results import OK, Result

_MARKERS = "os^vDPX*<>"


def require() -> None:
    """ValueError without matplotlib, which is not imported yet: it would make the heap large."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plots needs matplotlib, which is not installed")


def _pyplot() -> Any:
    require()
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _providers(rows: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(row.provider for row in rows))


def _save(figure: Any, file: Path) -> None:
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    _pyplot().close(figure)


def bars(file: Path, results: Sequence[Result]) -> bool:
    """Fraction of the measured ceiling, a panel per op and a bar per provider and case."""
    rows = [r for r in results if r.status == OK and r.ceiling_fraction is not None]
    if not rows:
        return False
    ops = list(dict.fromkeys(r.op for r in rows))
    names = _providers(rows)
    figure, axes = _pyplot().subplots(
        len(ops), 1, figsize=(9, 1 + 2.4 * len(ops)), squeeze=False, layout="constrained"
    )
    for axis, op in zip(axes[:, 0], ops, strict=True):
        labels = list(dict.fromkeys((r.case, r.dtype) for r in rows if r.op == op))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            mine = {(r.case, r.dtype): r for r in rows if r.op == op and r.provider == name}
            x = [k + (i + 0.5) * width - 0.4 for k, label in enumerate(labels) if label in mine]
            y = [mine[label].ceiling_fraction for label in labels if label in mine]
            axis.bar(x, y, width, label=name)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(labels)), ["\n".join(label) for label in labels], fontsize=8)
        axis.set_ylabel(f"{op}\nfloor / time")
    axes[0, 0].legend(fontsize=8, ncols=len(names) if len(names) <= 5 else 3)
    axes[0, 0].set_title("Fraction of the measured ceiling (1 = the floor)")
    figure.savefig(file, dpi=120)
    _pyplot().close(figure)
    return True


def roofline(file: Path, results: Sequence[Result], ceilings: Ceilings) -> bool:
    """FLOP rate against FLOPs per byte of the floor, under the measured ceilings."""
    rows = [r for r in results if r.status == OK and r.median_s]
    if not rows:
        return False
    figure, axis = _pyplot().subplots(figsize=(8, 5))
    intensities = [r.flops / r.floor_bytes for r in rows]
    edges = (min(intensities) / 4, max(intensities) * 64)
    span = [edges[0] * (edges[1] / edges[0]) ** (i / 99) for i in range(100)]
    for dtype, peak in ceilings.gemm_rate.items():
        roof = [min(x * ceilings.copy_bandwidth, peak) for x in span]
        axis.plot(span, roof, linewidth=1, label=f"copy bandwidth, {dtype} GEMM rate")
    for name, marker in zip(_providers(rows), cycle(_MARKERS), strict=False):
        mine = [r for r in rows if r.provider == name]
        x = [r.flops / r.floor_bytes for r in mine]
        y = [r.flops / (r.median_s or 1) for r in mine]
        axis.scatter(x, y, marker=marker, s=25, label=name)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs per byte of the floor", ylabel="FLOP/s")
    axis.legend(fontsize=8)
    axis.set_title("Roofline")
    _save(figure, file)
    return True


def _dimensions(row: Result) -> dict[str, int]:
    return {name: int(number) for name, number in re.findall(r"([A-Za-z]+)(\d+)", row.case)}


def memory(file: Path, results: Sequence[Result]) -> bool:
    """Extra memory against each dimension in turn, where at least two shapes share the others."""
    rows = [r for r in results if r.extra_bytes is not None]
    rows = [r for r in rows if (r.op, r.dtype) == (rows[0].op, rows[0].dtype)]
    panels = []
    for dimension in _dimensions(rows[0]) if rows else ():
        groups: dict[tuple[tuple[str, int], ...], list[Result]] = {}
        for row in rows:
            rest = tuple((k, n) for k, n in _dimensions(row).items() if k != dimension)
            groups.setdefault(rest, []).append(row)
        rest, group = max(groups.items(), key=lambda item: len(item[1]))
        if len({row.case for row in group}) > 1:
            panels.append((dimension, rest, group))
    if not panels:
        return False
    figure, axes = _pyplot().subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, (dimension, rest, group) in zip(axes[0], panels, strict=True):
        for name, marker in zip(_providers(group), cycle(_MARKERS), strict=False):
            points = {
                _dimensions(r)[dimension]: max((r.extra_bytes or 0) / 2**20, 1e-2)
                for r in group
                if r.provider == name
            }
            x = sorted(points)
            axis.plot(x, [points[n] for n in x], marker, ls="-", label=name)
        fixed = ", ".join(f"{name} = {number}" for name, number in rest)
        axis.set(xscale="log", yscale="log", xlabel=f"{dimension} ({fixed})")
        axis.set_ylabel("MiB beyond inputs and outputs")
        axis.legend(fontsize=8)
    figure.suptitle(f"Extra memory of {rows[0].op}, {rows[0].dtype}")
    _save(figure, file)
    return True


def draw_all(folder: Path, results: Sequence[Result], ceilings: Ceilings) -> list[str]:
    """Draw what the results allow; the names of the files written."""
    _pyplot()
    jobs: tuple[tuple[str, Callable[[Path], bool]], ...] = (
        ("bars.png", lambda file: bars(file, results)),
        ("roofline.png", lambda file: roofline(file, results, ceilings)),
        ("memory.png", lambda file: memory(file, results)),
    )
    return [name for name, draw in jobs if draw(folder / name)]
