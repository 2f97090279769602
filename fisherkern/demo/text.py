"""The text: two WikiText-2 test articles or a file, cut into token windows that know their text."""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisherkern.demo import assets
from fisherkern.demo.errors import DemoError

# Articles of the test set that read well; each gives one window of the default two.
ARTICLES = ("Nero", "Shackleton ( crater )")


@dataclass(frozen=True)
class Windows:
    """W windows of T tokens, and the piece of text that each token stands for."""

    tokens: torch.Tensor
    """int64 [W, T]."""
    pieces: list[list[str]]
    """W lists of T strings; a window's pieces join to its text."""


def passages(file: str | None) -> tuple[str, list[str]]:
    """What the text is called, and its passages.

    Raises:
        DemoError: the file cannot be read, or the download failed.
    """
    if file is None:
        raw = gzip.decompress(assets.fetch(assets.TEXT).read_bytes()).decode("utf-8")
        return assets.TEXT.title, [article(raw, title) for title in ARTICLES]
    try:
        return Path(file).name, [Path(file).read_text(encoding="utf-8")]
    except (OSError, UnicodeDecodeError) as error:
        raise DemoError(
            f"--text {file} cannot be read: {error}. Pass a text file in UTF-8."
        ) from error


def article(raw: str, title: str) -> str:
    """One article of WikiText raw, with its tokenised spacing undone."""
    start = raw.index(f" = {title} = ")
    following = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE).search(raw, start + len(title) + 6)
    return natural(raw[start : following.start() if following else len(raw)])


def natural(raw: str) -> str:
    """WikiText raw as ordinary text: ``a @-@ b , " c "`` becomes ``a-b, "c"``."""
    text = re.sub(r" @([-,.])@ ", r"\1", raw)
    text = re.sub(r"^ (?:= )+(.*?)(?: =)+ $", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    text = re.sub(r" ([,.;:!?%)\]}])", r"\1", text)
    text = re.sub(r"([(\[{$£€]) ", r"\1", text)
    text = re.sub(r" (n't|'(?:s|re|ve|ll|d|m)\b|')", r"\1", text)
    text = re.sub(r"[ \t]+$|^[ \t]+", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{2,}", "\n", text).strip()


def windows(texts: list[str], tokenizer: Any, count: int, length: int) -> Windows:
    """Up to `count` windows of up to `length` tokens: first windows of all texts, then second ones.

    Raises:
        DemoError: no text has two tokens, or a window has no room for a prediction.
    """
    encoded = [tokenise(text, tokenizer) for text in texts]
    first = _first_token(tokenizer)
    body = length - len(first)
    longest = max(len(ids) for ids, _ in encoded)
    if length < 2 or body < 1:
        raise DemoError(
            f"windows of {length} tokens leave nothing to predict. Pass --tokens 2 or more, and a "
            "model that reads as many."
        )
    if longest < 2:
        raise DemoError("the text has fewer than two tokens. Pass --text a file with more text.")
    body = min(body, longest)
    starts = range(0, longest - body + 1, body)
    cuts = [(ids, pieces, start) for start in starts for ids, pieces in encoded]
    cuts = [cut for cut in cuts if len(cut[0]) >= cut[2] + body][:count]
    tokens = [first + ids[start : start + body] for ids, _, start in cuts]
    labels = [[""] * len(first) + pieces[start : start + body] for _, pieces, start in cuts]
    return Windows(torch.tensor(tokens), labels)


def tokenise(text: str, tokenizer: Any) -> tuple[list[int], list[str]]:
    """Token ids and, for each, its piece of the text; the pieces join to the text."""
    if not tokenizer.is_fast:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return ids, [tokenizer.decode([i]) for i in ids]
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    # a piece starts where the last one ended: offsets may leave out the space before a word, and
    # tokens that are parts of one character have the same end
    ends = [end for _, end in encoding.offset_mapping]
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return encoding.input_ids, pieces


def _first_token(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token as a list, where this tokenizer starts texts with one."""
    start = tokenizer.bos_token_id
    return [start] if start is not None and start in tokenizer("").input_ids else []
