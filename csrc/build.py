"""Compiles the extension with ninja: C++ once per instruction set, CUDA where it can be.

Objects live in build/<torch>-<python>/ so that an editable install recompiles only what changed.
torch is located, not imported, which saves seconds per phase of an install.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "csrc"

# one .so for every torch from 2.11 on: only the stable part of its C++ API is used
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"
INSTRUCTION_SETS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}
# sources whose name ends in _amx.cpp: once, for the matrix units
AMX = [*INSTRUCTION_SETS["avx512"], "-mamx-tile", "-mamx-bf16", "-mavx512bf16"]
# GCC 12 warns inside its own AVX-512 headers
KERNEL_FLAGS = ["-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
# sources of cpu/ without vector code, compiled once
ONCE = ("bindings.cpp", "capability.cpp", "destination.cpp")


class BuildError(SystemExit):
    """A build that was asked for and cannot be done; the message says why."""


def _switch(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "auto") or "auto"
    if value not in allowed:
        raise BuildError(f"{name} is {value!r}; allowed are {', '.join(allowed)}")
    return value


def _torch() -> tuple[Path, str, str | None] | None:
    """Folder, version and CUDA version of the torch of this Python."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    version = runpy.run_path(str(folder / "version.py"))
    return folder, version["__version__"], version["cuda"]


def _compiler() -> list[str] | None:
    """The command of the C++ compiler: CXX, perhaps with a launcher and options, or g++ or c++."""
    given = os.environ.get("CXX", "")
    if not given.strip():
        default = shutil.which("g++") or shutil.which("c++")
        return [default] if default else None
    try:
        first, *rest = shlex.split(given)
    except ValueError:  # a quote that is not closed
        return None
    # what was asked for or nothing: another compiler would go unnoticed
    found = shutil.which(first)
    return [found, *rest] if found else None


def _without_launcher(command: list[str]) -> str:
    """The compiler of ``ccache g++ -m64``: the last word before the options."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), command))
    return words[-1]


def _accepts(compiler: list[str], flags: list[str]) -> bool:
    command = [*compiler, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _ninja() -> list[str] | None:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    found = shutil.which("ninja")
    return [found] if found else None


def nvcc() -> Path | None:
    """The CUDA compiler: CUDA_HOME or CUDA_PATH first, then PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home) / "bin" / "nvcc"
    found = shutil.which("nvcc")
    return Path(found) if found else None


def toolkit(compiler: Path) -> Path:
    """Root of the toolkit; nvcc says itself, since the one on PATH may be a wrapper."""
    done = subprocess.run(
        [compiler, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
    )
    found = re.search(r"^#\$ TOP=(.+)$", done.stderr, re.MULTILINE)
    return Path(found[1]).resolve() if found else compiler.resolve().parent.parent


def reason_against() -> str:
    """Why no extension is built; "" if one is. FISHERKERN_CPP=1 makes a reason an error."""
    mode = _switch("FISHERKERN_CPP", ("auto", "0", "1"))
    if mode == "0":
        return "FISHERKERN_CPP=0"
    reason = ""
    if _torch() is None:
        reason = "torch is not installed in the building Python (use --no-build-isolation)"
    elif _compiler() is None:
        given = os.environ.get("CXX", "")
        reason = "no C++ compiler (CXX, g++ or c++) was found"
        reason = f"CXX is {given!r}, which was not found" if given.strip() else reason
    elif _ninja() is None:
        reason = "ninja was not found"
    elif not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        reason = "the Python headers are not installed"
    if reason and mode == "1":
        raise BuildError(f"FISHERKERN_CPP=1, but {reason}")
    return reason


def architectures() -> list[str]:
    """`-gencode` values from TORCH_CUDA_ARCH_LIST, by default 8.0 and 9.0 with its PTX."""
    flags: list[str] = []
    for entry in (
        (os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;9.0+PTX").replace(" ", ";").split(";")
    ):
        if not entry:
            continue
        found = re.fullmatch(r"(\d+)\.(\d+)(a?)(\+PTX)?", entry)
        if not found:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST has {entry!r}; expected such as 8.0;9.0a;9.0+PTX"
            )
        number = found[1] + found[2] + found[3]
        flags.append(f"arch=compute_{number},code=sm_{number}")
        if found[4]:
            flags.append(f"arch=compute_{number},code=compute_{number}")
    return flags


def _cuda(torch_cuda: str | None) -> Path | None:
    """The nvcc to use, or None where CUDA stays out."""
    mode = _switch("FISHERKERN_CUDA", ("auto", "0", "1", "link"))
    compiler = nvcc()
    if mode == "0":
        return None
    if mode in ("1", "link") and compiler is None:
        raise BuildError(f"FISHERKERN_CUDA={mode}, but nvcc was not found (CUDA_HOME, PATH)")
    if mode == "1" and torch_cuda is None:
        raise BuildError("FISHERKERN_CUDA=1, but this torch was built without CUDA")
    return compiler if mode != "auto" or torch_cuda else None


def _quoted(command: list[str]) -> str:
    # ninja's own escape is $, then the shell's quotes
    return " ".join(
        "'" + part.replace("$", "$$") + "'" if part != "$in" else part for part in command
    )


class _Ninja:
    """The text of a build.ninja."""

    def __init__(self) -> None:
        self.lines = ["ninja_required_version = 1.5"]
        self.objects: list[str] = []

    def compile(self, rule: str, command: list[str], source: Path, target: str) -> None:
        self.lines += [
            f"rule {rule}",
            f"  command = {_quoted(command)} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            f"  description = {target}",
            f"build {target}: {rule} {source}",
        ]
        self.objects.append(target)

    def link(self, command: list[str], trailing: list[str], target: Path) -> None:
        self.lines += [
            "rule link",
            f"  command = {_quoted(command)} $in {_quoted(trailing)} -o $out",
            f"build {target}: link {' '.join(self.objects)}",
            f"default {target}",
        ]


def extension(target: Path) -> None:
    """Build the extension at `target`."""
    found, compiler, ninja = _torch(), _compiler(), _ninja()
    if found is None or compiler is None or ninja is None:
        raise BuildError(reason_against())
    torch, version, torch_cuda = found
    cuda = _cuda(torch_cuda)
    x86 = platform.machine() in ("x86_64", "AMD64")
    sets = INSTRUCTION_SETS if x86 else {"baseline": []}
    folder = ROOT / "build" / f"{version}-{sysconfig.get_config_var('SOABI')}"
    folder.mkdir(parents=True, exist_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)

    common = [
        *compiler,
        "-O3",
        "-std=c++20",
        "-fPIC",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
    ]
    common += ["-Wall", "-Wextra", "-Wno-unused-parameter", f"-isystem{torch}/include"]
    common += [f"-isystem{torch}/include/torch/csrc/api/include"]
    common += [f"-isystem{sysconfig.get_paths()['include']}"]
    common += ["-DFISHERKERN_X86"] if x86 else []
    common += shlex.split(os.environ.get("CXXFLAGS", ""))
    amx = x86 and sys.platform == "linux" and _accepts(compiler, AMX)
    common += ["-DFISHERKERN_AMX"] if amx else []
    gencodes = architectures() if cuda else []
    information = [
        f'-DFISHERKERN_COMPILER="{Path(_without_launcher(compiler)).name}"',
        f'-DFISHERKERN_TORCH="{version}"',
    ]
    if cuda:
        names = [flag.rpartition("code=")[2] for flag in gencodes]
        information.append(f'-DFISHERKERN_CUDA_ARCHITECTURES="{";".join(names)}"')

    build = _Ninja()
    build.compile("module", [*common, *information], SOURCES / "module.cpp", "module.o")
    common.append(STABLE_ABI)
    build.compile("ops", common, SOURCES / "ops.cpp", "ops.o")
    for source in sorted((SOURCES / "cpu").glob("*.cpp")):
        if source.name.endswith(ONCE):
            build.compile(f"cpu_{source.stem}", common, source, f"cpu_{source.stem}.o")
            continue
        if source.stem.endswith("_amx"):
            command = [*common, *AMX, *KERNEL_FLAGS, "-DFISHERKERN_ISA=amx"]
            if amx:
                build.compile(source.stem, command, source, f"{source.stem}.o")
            continue
        for name, flags in sets.items():
            rule = f"{source.stem}_{name}"
            command = [*common, *flags, *KERNEL_FLAGS, f"-DFISHERKERN_ISA={name}"]
            build.compile(rule, command, source, f"{rule}.o")
    libraries = [
        f"-L{torch}/lib",
        "-Wl,--no-as-needed",
        "-lc10",
        "-ltorch_cpu",
        "-Wl,--as-needed",
        "-ldl",
    ]
    if cuda:
        root = toolkit(cuda)
        command = [
            str(cuda),
            "-O3",
            "-std=c++17",
            "-lineinfo",
            "-Xcompiler",
            "-fPIC,-fvisibility=hidden",
        ]
        command += ["-ccbin", _without_launcher(compiler), "-Xptxas", "-v"]
        for flag in gencodes:
            command += ["-gencode", flag]
        for source in sorted((SOURCES / "cuda").glob("*.cu")):
            build.compile(f"cuda_{source.stem}", command, source, f"cuda_{source.stem}.o")
        for source in sorted((SOURCES / "cuda").glob("*.cpp")):
            include = f"-isystem{root}/include"
            build.compile(
                f"cuda_{source.stem}", [*common, include], source, f"cuda_{source.stem}.o"
            )
        library = next((p for p in (root / "lib64", root / "lib") if p.exists()), root / "lib64")
        libraries += [f"-L{library}", "-lcudart_static", "-lrt", "-lpthread"]
    build.link([*compiler, "-shared"], libraries, target.resolve())

    (folder / "build.ninja").write_text("\n".join(build.lines) + "\n")
    jobs = os.environ.get("MAX_JOBS")
    done = subprocess.run(
        [*ninja, "-C", str(folder), *(["-j", jobs] if jobs else [])], capture_output=True, text=True
    )
    if done.returncode:
        raise BuildError(
            f"{done.stdout}\n{done.stderr}\nfisherkern: the C++ extension failed to build"
        )
