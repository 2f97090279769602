"""The one schema of results, and where they were measured; CSV and JSON.

``results.csv`` has a row per case and provider, with the columns of :class:`Result`.
``results.json`` holds the same rows beside the environment, ceilings, ratios and verdicts.
Neither names a host or a path.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch

import fisherkern

OK = "ok"


@dataclass(frozen=True)
class Result:
    """One provider at one case; times are None unless its result was right."""

    family: str
    op: str
    case: str
    """Shape, ``T256_V50257``."""
    provider: str
    kind: str
    device: str
    dtype: str
    status: str
    """"ok", "wrong result", "not timed", "skipped: reason" or "failed: reason"."""
    threads: int
    repeats: int
    median_s: float | None
    p20_s: float | None
    p80_s: float | None
    floor_bytes: int
    flops: float
    bandwidth: float | None
    """floor_bytes / median_s."""
    ceiling: str
    ceiling_rate: float | None
    """The measured rate of what bounds the op: bytes per second, or FLOPs per second."""
    ceiling_fraction: float | None
    extra_bytes: int | None
    """Peak memory beyond inputs and outputs."""
    torch_extra_bytes: int | None
    """The part of it that the allocator of torch knows of."""
    memory_method: str
    max_error: float | None
    error_limit: float | None
    versions: str
    """"fisherkern x; torch y; triton z"."""


@dataclass(frozen=True)
class Ratio:
    """How many times faster `subject` is than `peer`; quantiles over the rounds of one case."""

    op: str
    case: str
    dtype: str
    subject: str
    peer: str
    median: float
    p20: float
    p80: float


def without_paths(text: str) -> str:
    """The first line of a message, at most 160 characters, file paths reduced to their names."""
    lines = text.strip().splitlines()
    line = lines[0] if lines else ""
    return re.sub(r"(?:[A-Za-z]:)?(?:[/\\][\w.+-]+)+[/\\]([\w.+-]+)", r"\1", line)[:160]


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return str(triton.__version__)


def versions() -> str:
    """Versions of the packages that decide a speed."""
    return f"fisherkern {fisherkern.__version__}; torch {torch.__version__}; " + (
        f"triton {_triton_version()}"
    )


def _cpu_model() -> str:
    file = Path("/proc/cpuinfo")
    if file.exists():
        for line in file.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    folder = Path(__file__).resolve().parent
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def git_revision() -> str | None:
    """Commit of the checkout that this file lies in, "+" for local changes; None outside of one."""
    revision = _git("rev-parse", "--short=12", "HEAD")
    return revision and revision + ("+" if _git("status", "--porcelain") else "")


def environment(device: str) -> dict[str, Any]:
    """Hardware and software of this run."""
    found: dict[str, Any] = {
        "versions": versions(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cpu_count": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "git_revision": git_revision(),
        "back_ends": fisherkern.available(device),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = properties.name
        found["gpu_memory_bytes"] = properties.total_memory
        found["cuda"] = torch.version.cuda
    return found


COLUMNS = tuple(field.name for field in dataclasses.fields(Result))


def write_csv(file: Path, results: Sequence[Result]) -> None:
    """Write the rows, an empty cell for None."""
    with file.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(dataclasses.asdict(result) for result in results)


def read_csv(file: Path) -> list[Result]:
    """Rows as they were written."""
    types = get_type_hints(Result)
    parse = {str: str, int: int, float: float, int | None: int, float | None: float}

    def value(column: str, text: str) -> Any:
        return None if text == "" and types[column] is not str else parse[types[column]](text)

    with file.open(newline="") as stream:
        return [Result(**{c: value(c, row[c]) for c in COLUMNS}) for row in csv.DictReader(stream)]


def write_json(file: Path, results: Sequence[Result], **sections: Any) -> None:
    """Write sections (environment, ceilings, ratios, verdicts) and the rows."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        raise TypeError(f"{type(value).__name__} is not a result")

    content = {**sections, "results": list(results)}
    file.write_text(json.dumps(content, default=plain, indent=1) + "\n")


def read_json(file: Path) -> list[Result]:
    """The rows of a JSON file."""
    return [Result(**row) for row in json.loads(file.read_text())["results"]]
