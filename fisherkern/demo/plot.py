"""The passage as text, with the Fisher trace of the prediction of every token as a bar above it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fisherkern.demo.findings import Findings, visible

_COLUMNS = 104  # characters per line
_LINES = 10
_HIT, _MISS, _INK, _MUTED = "#2b6cb0", "#dd6b20", "#1a202c", "#8a94a3"
_CHARACTER = 0.602  # width of a character of DejaVu Sans Mono, in units of its size
_WIDTH, _MARGIN = 13.0, 0.55  # inches
_LINE_HEIGHT, _BAR_HEIGHT = 0.92, 0.55  # inches
_HEADER, _FOOTER = 1.15, 0.2  # inches


@dataclass(frozen=True)
class Cell:
    """One token on the page: its visible text, and its line and column in characters."""

    text: str
    line: int
    column: int
    index: int
    """Of the token in its window."""


def layout(pieces: list[str], columns: int = _COLUMNS, lines: int = _LINES) -> list[Cell]:
    """Place the pieces of a text in lines, broken between words unless one word fills a line."""
    cells: list[Cell] = []
    line = column = 0
    for start, end in _words(pieces):
        word = "".join(visible(piece) for piece in pieces[start:end])
        if column and column + len(word.rstrip()) > columns:
            line, column = line + 1, 0
        for index in range(start, end):
            text = visible(pieces[index])
            if column and column + len(text.rstrip()) > columns:
                line, column = line + 1, 0
            shown = text.lstrip(" ") if column == 0 else text
            blank = len(shown) - len(shown.lstrip(" "))
            cells.append(Cell(shown.strip(" "), line, column + blank, index))
            column += len(shown) + text.endswith("↵")
    return [cell for cell in cells if cell.text and cell.line < lines]


def _words(pieces: list[str]) -> list[tuple[int, int]]:
    """Runs of pieces that stay on one line: a run starts at a space or after a line break."""
    starts = [
        i for i, piece in enumerate(pieces) if i == 0 or piece[:1] == " " or "\n" in pieces[i - 1]
    ]
    return list(zip(starts, [*starts[1:], len(pieces)], strict=True))


def save(facts: Findings, path: Path, model: str, text: str, window: int = 0) -> None:
    """Write the figure of the beginning of one window as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = layout(facts.windows.pieces[window])
    lines = max((cell.line for cell in cells), default=0) + 1
    height = _HEADER + lines * _LINE_HEIGHT + _FOOTER
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes(
        (
            _MARGIN / _WIDTH,
            _FOOTER / height,
            1 - 2 * _MARGIN / _WIDTH,
            1 - (_HEADER + _FOOTER) / height,
        )
    )
    axes.set(xlim=(0, _COLUMNS), ylim=(lines * _LINE_HEIGHT, 0))
    axes.axis("off")
    _header(figure, height, model, text)
    for line in range(lines):
        _scale(axes, line)
    for cell in cells:
        _draw(axes, cell, facts, window)
    figure.savefig(path, dpi=130)


def _header(figure: Any, height: float, model: str, text: str) -> None:
    left = _MARGIN / _WIDTH

    def write(inches: float, string: str, **style: Any) -> None:
        figure.text(left, 1 - inches / height, string, va="center", **style)

    write(0.34, "How open was each next token?", size=17, weight="bold", color=_INK)
    subtitle = (
        "bar height: Fisher trace tr(diag p − p pᵀ) = Σ p (1 − p) of the prediction made before "
        "the token was seen"
    )
    write(0.64, subtitle, size=10.5, color=_INK)
    write(0.88, f"{model}   ·   {text}", size=9.5, color=_MUTED)
    right = 1 - left
    for row, (color, label) in enumerate(
        ((_HIT, "the most likely token came"), (_MISS, "another token came"))
    ):
        figure.text(
            right,
            1 - (0.34 + 0.24 * row) / height,
            f"■ {label}",
            color=color,
            size=11,
            ha="right",
            va="center",
            family="DejaVu Sans",
        )


def _scale(axes: Any, line: int) -> None:
    """Hairlines at 0, ½ and 1 with their labels."""
    base = line * _LINE_HEIGHT + _BAR_HEIGHT + 0.06
    for value, style in ((0.0, "-"), (0.5, ":"), (1.0, ":")):
        y = base - value * _BAR_HEIGHT
        axes.plot((0, _COLUMNS), (y, y), style, color="#cbd5e0", linewidth=0.7, zorder=0)
    for value in (0, 1):
        axes.text(
            -0.6,
            base - value * _BAR_HEIGHT,
            str(value),
            size=8,
            color=_MUTED,
            ha="right",
            va="center",
        )


def _draw(axes: Any, cell: Cell, facts: Findings, window: int) -> None:
    """The bar and the text of one token; the first token was not predicted and has no bar."""
    base = cell.line * _LINE_HEIGHT + _BAR_HEIGHT + 0.06
    color = _MUTED
    if cell.index > 0:
        trace = facts.trace[window, cell.index - 1].item()
        color = _HIT if facts.hit[window, cell.index - 1] else _MISS
        axes.bar(
            cell.column + 0.06,
            -max(trace, 0.012) * _BAR_HEIGHT,
            len(cell.text) - 0.12,
            bottom=base,
            align="edge",
            color=color,
            alpha=0.85,
            linewidth=0,
        )
    size = 72 * (_WIDTH - 2 * _MARGIN) / _COLUMNS / _CHARACTER
    axes.text(
        cell.column,
        base + 0.05,
        cell.text.replace("$", r"\$"),
        size=size,
        family="DejaVu Sans Mono",
        color=_INK if color != _MUTED else _MUTED,
        va="top",
        ha="left",
    )
