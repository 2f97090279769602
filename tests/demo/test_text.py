"""WikiText as ordinary text, windows whose pieces join to it, and contexts to print."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fisherkern.demo import findings, plot, text
from fisherkern.demo.errors import DemoError

RAW = """ \n = Du Fu = \n \n Du Fu ( 712 – 770 ) was a well @-@ known poet ; 1 @,@ 500 poems .
 \n = = Life = = \n \n He didn 't say " hello , world " in China 's capital .
 = Nero = \n \n Nero was emperor . \n"""


class Letters:
    """A tokenizer of one token per character, its code."""

    is_fast = True

    def __init__(self, bos: int | None = None, prepends: bool = True):
        self.bos_token_id, self.prepends = bos, prepends

    def __call__(self, string, add_special_tokens=True, **_):
        first = (
            [self.bos_token_id]
            if add_special_tokens and self.prepends and self.bos_token_id
            else []
        )
        offsets = [(i, i + 1) for i in range(len(string))]
        return SimpleNamespace(input_ids=first + [ord(c) for c in string], offset_mapping=offsets)


def test_article_is_cut_out_and_reads_naturally():
    assert text.article(RAW, "Du Fu") == (
        "Du Fu\nDu Fu (712 – 770) was a well-known poet; 1,500 poems.\n"
        "Life\nHe didn't say \"hello, world\" in China's capital."
    )
    assert text.article(RAW, "Nero") == "Nero\nNero was emperor."


def test_windows_alternate_between_texts():
    cut = text.windows(["abcdef", "uvwxyz"], Letters(), count=3, length=3)
    assert ["".join(pieces) for pieces in cut.pieces] == ["abc", "uvw", "def"]
    assert cut.tokens.tolist()[1] == [ord(c) for c in "uvw"]


@pytest.mark.parametrize(
    ("string", "expected"), [("abcd", ["abcd"]), ("abcdefghijk", ["abcde", "fghij"])]
)
def test_windows_fit_the_text(string, expected):
    cut = text.windows([string], Letters(), count=4, length=5)
    assert ["".join(pieces) for pieces in cut.pieces] == expected


def test_windows_begin_with_the_token_that_begins_texts():
    cut = text.windows(["abcdef"], Letters(bos=7), count=2, length=4)
    assert cut.tokens.tolist() == [[7, 97, 98, 99], [7, 100, 101, 102]]
    assert cut.pieces[0] == ["", "a", "b", "c"]
    other = text.windows(["abcdef"], Letters(bos=7, prepends=False), count=1, length=4)
    assert other.tokens.tolist() == [[97, 98, 99, 100]]


@pytest.mark.parametrize("string", ["", "a"])
def test_text_without_predictions_is_refused(string):
    with pytest.raises(DemoError, match="fewer than two tokens"):
        text.windows([string], Letters(), count=1, length=8)


@pytest.mark.parametrize("bos", [None, 7])
def test_windows_without_predictions_are_refused(bos):
    with pytest.raises(DemoError, match="windows of 1 tokens leave nothing to predict"):
        text.windows(["abcdef"], Letters(bos=bos), count=1, length=1)
    assert text.windows(["abcdef"], Letters(bos=bos), count=1, length=2).tokens.shape == (1, 2)


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_unreadable_file_says_what_to_pass(tmp_path, content):
    path = tmp_path / "t.txt"
    if content:
        path.write_bytes(content)
    with pytest.raises(DemoError, match=r"--text .*t\.txt cannot be read.*UTF-8"):
        text.passages(str(path))


def test_context_is_whole_words_and_marks_what_is_cut():
    pieces = ["The", " quick", " brown", " fox", " jumps", " over", " the", " lazy", " dog"]
    assert findings.around(pieces, 4, 100) == ("The quick brown fox", " over the lazy dog")
    assert findings.around(pieces, 4, 30) == ("… quick brown fox", " over …")
    assert findings.around(list("abcdefghi"), 4, 7) == ("abcd", "fg…")


def test_context_shows_line_breaks():
    assert findings.around(["One.", "\n", "Two"], 1, 40) == ("One.", "Two")
    assert findings.visible("a\r\nb\tc\ufffd") == "a↵b c·"


def test_layout_keeps_words_whole_within_the_columns():
    pieces = ["Ne", "ro", " was", " the", " emp", "eror", ".", "\n", "End"]
    cells = plot.layout(pieces, columns=12)
    assert [(cell.text, cell.line, cell.column) for cell in cells] == [
        ("Ne", 0, 0),
        ("ro", 0, 2),
        ("was", 0, 5),
        ("the", 0, 9),
        ("emp", 1, 0),
        ("eror", 1, 3),
        (".", 1, 7),
        ("↵", 1, 8),
        ("End", 2, 0),
    ]
    assert max(cell.line for cell in plot.layout(pieces, columns=12, lines=2)) == 1


def test_layout_breaks_a_word_that_is_longer_than_a_line():
    cells = plot.layout([" a", "bcd", "efg", "hij"], columns=7)
    assert [(cell.text, cell.line, cell.column) for cell in cells] == [
        ("a", 0, 0),
        ("bcd", 0, 1),
        ("efg", 0, 4),
        ("hij", 1, 0),
    ]
