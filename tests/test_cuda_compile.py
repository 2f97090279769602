"""The CUDA sources compile for every shipped architecture within the resources of the chip."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
CACHE = ROOT / "build" / "cuda_compile"
ARCHITECTURES = ("80", "90a")

REGISTER_FILE = 64 * 1024  # registers of a multiprocessor
MAX_STATIC_SHARED = 8 * 1024
# Threads of a multiprocessor that must have registers at one time: three blocks of 256, or fewer
# where a thread keeps more.
RESIDENT_THREADS = 3 * 256
FEWER_THREADS = {"sample_kernel": 2 * 256, "quadratic_kernel": 256}

pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")


def _headers() -> list[Path]:
    return sorted([*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc" / "cuda").glob("*.*h")])


def ptxas_report(source: Path, architecture: str) -> str:
    """What ptxas says of `source`; compiled again only when it, a header or nvcc has changed."""
    nvcc = shutil.which("nvcc")
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, "-std=c++17", code, "-Xptxas", "-v", "-c", str(source)]
    digest = hashlib.sha256(repr([command[1:-1], os.stat(nvcc).st_mtime_ns]).encode())
    for path in (source, *_headers()):
        digest.update(path.read_bytes())
    name = f"{source.stem}-sm_{architecture}"
    report = CACHE / f"{name}-{digest.hexdigest()[:16]}.txt"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not report.exists():
            command += ["-o", str(CACHE / f"{name}.o")]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            partial = report.with_suffix(".partial")
            partial.write_text(done.stdout + done.stderr)
            partial.rename(report)
    return report.read_text()


def kernels(report: str) -> list[tuple[str, dict[str, int]]]:
    """(mangled name, figures) of every kernel that ptxas reports."""
    found = []
    for part in report.split("Compiling entry function '")[1:]:
        figures = {
            key: int(match.group(1)) if (match := re.search(pattern, part)) else 0
            for key, pattern in {
                "registers": r"Used (\d+) registers",
                "shared": r"(\d+) bytes smem",
                "stack": r"(\d+) bytes stack frame",
                "spill stores": r"(\d+) bytes spill stores",
                "spill loads": r"(\d+) bytes spill loads",
            }.items()
        }
        found.append((part.split("'", 1)[0], figures))
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_resources(source: Path, architecture: str) -> None:
    compiled = kernels(ptxas_report(source, architecture))
    assert compiled, "no kernel was compiled"
    for name, figures in compiled:
        fewer = (n for kernel, n in FEWER_THREADS.items() if kernel in name)
        threads = next(fewer, RESIDENT_THREADS)
        for none in ("spill stores", "spill loads", "stack"):
            assert figures[none] == 0, f"{name}: {figures[none]} bytes of {none}"
        assert 0 < figures["registers"] <= min(255, REGISTER_FILE // threads), name
        assert figures["shared"] <= MAX_STATIC_SHARED, name
