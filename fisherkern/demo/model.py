"""The causal language model: the default one, converted once, or any that transformers can load."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisherkern.demo import assets
from fisherkern.demo.errors import DemoError


@dataclass(frozen=True)
class LanguageModel:
    """A model in evaluation mode, its tokenizer and what to call it."""

    name: str
    model: Any
    tokenizer: Any

    @property
    def context(self) -> int:
        """The longest sequence the model accepts."""
        return int(getattr(self.model.config, "max_position_embeddings", None) or 2**31)

    @property
    def parameters(self) -> int:
        """How many distinct parameters the model has."""
        return sum(p.numel() for p in self.model.parameters())

    @torch.no_grad()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 logits [W, T, V] of token windows [W, T], one window at a time."""
        rows = [self.model(window[None], use_cache=False).logits[0] for window in tokens]
        return torch.stack(rows).float()


def load(identifier: str | None, default: assets.Asset = assets.MODEL) -> LanguageModel:
    """The model with this transformers id or path, or the default one, a GGUF file.

    Raises:
        DemoError: it cannot be downloaded, verified or loaded.
    """
    if identifier is not None:
        return _load(identifier, identifier)
    path = assets.fetch(default)
    return _load(f"{default.title}, dequantised to float32", str(_converted(path)))


def _load(name: str, source: str) -> LanguageModel:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    local = Path(source).exists()
    try:
        with _quiet(local):
            tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
            model = AutoModelForCausalLM.from_pretrained(
                source, dtype=torch.float32, local_files_only=local
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise DemoError(
            f"transformers cannot load {source!r} as a causal language model: "
            f"{_first_line(error)}. Pass --model the id of a model on a hub you can reach, or a "
            "folder written by save_pretrained with its tokenizer."
        ) from error
    return LanguageModel(name, model.eval(), tokenizer)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")


@contextlib.contextmanager
def _quiet(active: bool) -> Iterator[None]:
    """Hide the progress bars of transformers, where nothing is downloaded."""
    from transformers.utils import logging

    if active:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


# ---- GGUF to safetensors, once ----------------------------------------------------------------


def _converted(gguf: Path) -> Path:
    """The folder of the dequantised model; made on the first run, verified on every later one."""

    def convert(target: Path) -> None:
        print(f"converting {gguf.name} to safetensors (once, about half a minute) ...", flush=True)
        _convert(gguf, target)

    folder = assets.cache_folder() / "models" / gguf.stem
    try:
        assets.keep(folder, convert)
    except OSError as error:
        raise DemoError(
            f"the converted model, some {4 * gguf.stat().st_size >> 20} MiB, cannot be stored in "
            f"{folder.parent}: {error}. Free space there, or set FISHERKERN_CACHE to another "
            "folder, or pass --model ID_OR_PATH."
        ) from error
    return folder


def _convert(gguf: Path, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    # save_pretrained refuses a model that came from GGUF: save a fresh one with its weights
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh = type(loaded)(config)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.tie_weights()
    fresh.save_pretrained(target)
    tokenizer.save_pretrained(target)
