"""What others install: an sdist of every source, and wheels from it, with a compiler or not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # from a copy: two processes that build in one folder get in each other's way
    folder = tmp_path_factory.mktemp("sdist")
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).split()
    for name in listed:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    code = "from setuptools import build_meta; print(build_meta.build_sdist('dist'))"
    return folder / "dist" / run(sys.executable, "-c", code, cwd=folder).split()[-1]


def installed(sdist: Path, folder: Path, **environment: str) -> Path:
    """The package from a wheel from the sdist, in a folder of its own."""
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    flags = ("--no-build-isolation", "--no-deps", "--no-index", "--quiet")
    run(*pip, "wheel", *flags, "-w", str(folder), str(sdist), cwd=folder, **environment)
    (wheel,) = folder.glob("*.whl")
    target = folder / "site"
    run(*pip, "install", *flags, "--target", str(target), str(wheel), cwd=folder)
    return target


def report(target: Path) -> list[str]:
    code = (
        "import torch, fisherkern as fk, fisherkern.bench, fisherkern.kernels\n"
        "assert fk.softmax_fisher_trace(torch.zeros(1, 4)).item() == 0.75\n"
        "print(fk.__file__, *fk.available())"
    )
    # -S: no .pth files, and so no editable install of this checkout that would lend its extension
    path = os.pathsep.join([str(target), sysconfig.get_paths()["purelib"]])
    environment = {"PYTHONPATH": path, "FISHERKERN_BACKEND": ""}
    return run(sys.executable, "-S", "-c", code, cwd=target.parent, **environment).split()


def test_sdist_holds_every_tracked_source(sdist: Path) -> None:
    tracked = run("git", "ls-files", "csrc", "fisherkern", "kernels", "bench/*.py", cwd=ROOT)
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set(tracked.split()) - held == set()
    # half of the tests, and what runs wrote, would be of no use there
    assert not [name for name in held if name.startswith(("tests/", "bench/results/"))]


def test_wheel_from_the_sdist_has_the_extension(sdist: Path, tmp_path: Path) -> None:
    # whether it is complete shows without optimisation, which takes most of the time
    options = {"FISHERKERN_CPP": "1", "FISHERKERN_CUDA": "0", "CXXFLAGS": "-O0"}
    target = installed(sdist, tmp_path, **options)
    origin, *available = report(target)
    assert origin.startswith(str(target))
    assert available == ["cpp", "reference"]


def test_wheel_without_a_compiler_is_pure_python_and_works(sdist: Path, tmp_path: Path) -> None:
    target = installed(sdist, tmp_path, FISHERKERN_CPP="auto", CXX="no-such-compiler", PATH="")
    origin, *available = report(target)
    assert origin.startswith(str(target))
    assert available == ["reference"]
    package = target / "fisherkern"
    assert (package / "py.typed").is_file()
    files = [p for p in package.rglob("*") if p.is_file()]
    assert {p.suffix for p in files} <= {".py", ".pyc", ".typed"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FISHERKERN_CUDA": "yes"}, "FISHERKERN_CUDA is 'yes'; allowed are auto, 0, 1, link"),
        ({"FISHERKERN_CPP": "1", "PATH": "", "CXX": ""}, "FISHERKERN_CPP=1, but no C++ compiler"),
        (
            {"FISHERKERN_CPP": "1", "CXX": "no-such-g++ -m64"},
            "FISHERKERN_CPP=1, but CXX is 'no-such-g++ -m64', which was not found",
        ),
        ({"FISHERKERN_CUDA": "link", "PATH": "/bin:/usr/bin"}, "nvcc was not found"),
        ({"FISHERKERN_CUDA": "link", "TORCH_CUDA_ARCH_LIST": "9"}, "TORCH_CUDA_ARCH_LIST has '9'"),
    ],
)
def test_build_that_cannot_be_done_says_why(
    environment: dict[str, str], message: str, tmp_path: Path
) -> None:
    if environment.get("FISHERKERN_CUDA") == "link" and "PATH" in environment:
        environment = {**environment, "CUDA_HOME": "", "CUDA_PATH": ""}
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from csrc import build; from pathlib import Path\n"
        "build.reason_against(); build.architectures()\n"
        f"build.extension(Path({str(tmp_path)!r}) / 'x.so')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    assert done.returncode != 0
    assert message in done.stderr


def test_compiler_command_keeps_its_launcher_and_options() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from csrc import build\n"
        "command = build._compiler()\n"
        "print(command[1:], build._without_launcher(command), build._accepts(command, []))"
    )
    given = {"CXX": "env LC_ALL=C g++ '-DNAME=a b'"}
    said = run(sys.executable, "-c", code, cwd=ROOT, **given)
    assert said == "['LC_ALL=C', 'g++', '-DNAME=a b'] g++ True\n"


def test_gpu_target_says_in_one_line_that_there_is_no_device() -> None:
    hidden = {"CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    said = run("bash", "bench/gpu.sh", cwd=ROOT, **hidden)
    assert said == "make gpu: no CUDA device (or no CUDA torch) here; nothing was run\n"
