"""The conversion of the default model: once, whole or not at all, and verified on every use."""

from __future__ import annotations

import pytest

from fisherkern.demo import model
from fisherkern.demo.errors import DemoError


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHERKERN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tiny.gguf"
    path.write_bytes(b"GGUF")
    return path


@pytest.fixture
def conversions(monkeypatch):
    """The conversions that ran, in place of the real one."""
    done = []

    def convert(source, target):
        done.append(source)
        target.mkdir()
        (target / "config.json").write_text("{}")
        (target / "model.safetensors").write_bytes(b"weights")

    monkeypatch.setattr(model, "_convert", convert)
    return done


def test_conversion_happens_once(gguf, conversions):
    folder = model._converted(gguf)
    assert model._converted(gguf) == folder
    assert conversions == [gguf]
    assert (folder / "model.safetensors").read_bytes() == b"weights"


@pytest.mark.parametrize("damage", ["changed", "missing", "no manifest"])
def test_damaged_conversion_is_repeated(gguf, conversions, damage):
    folder = model._converted(gguf)
    if damage == "changed":
        (folder / "model.safetensors").write_bytes(b"weighty")
    else:
        (folder / ("config.json" if damage == "missing" else "SHA256SUMS")).unlink()
    assert model._converted(gguf) == folder
    assert len(conversions) == 2
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_conversion_of_another_process_is_kept(gguf, conversions, monkeypatch):
    alone, others = model._convert, []

    def convert(source, target):
        monkeypatch.setattr(model, "_convert", alone)
        others.append((model._converted(source) / "config.json").stat().st_ino)
        alone(source, target)

    monkeypatch.setattr(model, "_convert", convert)
    folder = model._converted(gguf)
    assert (folder / "config.json").stat().st_ino == others[0]  # it may be in use
    assert len(conversions) == 2


def test_interrupted_conversion_leaves_nothing(gguf, monkeypatch):
    def convert(source, target):
        target.mkdir()
        (target / "model.safetensors").write_bytes(b"wei")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model, "_convert", convert)
    with pytest.raises(DemoError, match=r"No space left on device.*FISHERKERN_CACHE"):
        model._converted(gguf)
    assert list((gguf.parent / "cache" / "models").iterdir()) == []
