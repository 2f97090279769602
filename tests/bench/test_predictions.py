"""The table of predictions in the documentation is the one that the module prints."""

from __future__ import annotations

from pathlib import Path

from fisherkern.bench import predictions


def test_the_documented_table_is_current() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "covariance.md"
    text = page.read_text("utf-8")
    begin, end = "<!-- predictions:begin -->", "<!-- predictions:end -->"
    assert text.partition(begin)[2].partition(end)[0].strip() == predictions.table()


def test_no_kernel_beats_the_arithmetic_it_must_do() -> None:
    for device in predictions.DEVICES:
        for tokens, width in predictions.SHAPES:
            ours, whole = predictions.predict(device, tokens, width)
            flops = tokens * width * (width + 1)
            assert ours > flops / (device.teraflops * 1e12)
            assert whole > 2 * flops * width / (width + 1) / (device.teraflops * 1e12)
