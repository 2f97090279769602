"""Counts of tokens, and states, that an average cannot take leave it as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from curvature import cases
from fisherkern.curvature import EMACovariance


def filled() -> EMACovariance:
    average = EMACovariance(3, ema_decay=0.9, dtype=torch.float64)
    average.update(cases.drawn(5, 3))
    average.begin_step()
    return average


def assert_untouched(average: EMACovariance, before: dict[str, Any]) -> None:
    after = average.state_dict()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if name in ("sum", "count") else value == after[name]
        assert same, name


@pytest.mark.parametrize(
    ("count", "kind", "message"),
    [
        ("x", TypeError, "count has type str; expected a number"),
        ([1], TypeError, "count has type list; expected a number"),
        (True, TypeError, "count has type bool; expected a number"),
        (math.nan, ValueError, "count is nan; allowed are"),
        (-3.0, ValueError, "count is -3.0; allowed are"),
        (math.inf, ValueError, "count is inf; allowed are"),
        (torch.zeros(2), ValueError, r"count has shape \[2\]; expected a scalar"),
        (torch.zeros(1), ValueError, r"count has shape \[1\]; expected a scalar"),
        (torch.tensor(-3.0), ValueError, "count is -3.0; allowed are"),
        (torch.tensor(math.nan), ValueError, "count is nan; allowed are"),
        (torch.tensor(1j), TypeError, "count has dtype torch.complex64; expected one of real"),
        (torch.tensor(True), TypeError, "count has dtype torch.bool; expected one of real"),
        (torch.zeros((), device="meta"), ValueError, "count is on meta; expected cpu"),
    ],
)
@pytest.mark.parametrize("new_step", [True, False])
def test_a_count(count: Any, kind: Any, message: str, new_step: bool) -> None:
    average = filled()
    before = average.state_dict()
    with pytest.raises(kind, match=message):
        average.update(cases.drawn(2, 3), count=count, new_step=new_step)
    assert_untouched(average, before)


@pytest.mark.parametrize("count", [7, 7.0, torch.tensor(7), torch.tensor(7.0)])
def test_counts_that_are_taken(count: Any) -> None:
    average = EMACovariance(3, ema_decay=None, dtype=torch.float64)
    x = cases.drawn(2, 3)
    average.update(x, count=count)
    assert average.count == 7
    assert cases.error(average.factor(), x.mT @ x / 7) < cases.EXACT


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"sum": torch.zeros(3, 3) * 1j}, TypeError, "state has a sum of dtype torch.complex64"),
        ({"sum": torch.zeros(3, 3, dtype=torch.int64)}, TypeError, "a sum of dtype torch.int64"),
        ({"count": torch.tensor(1j)}, TypeError, "state has a count of dtype torch.complex64"),
        ({"steps_due": "1"}, TypeError, "steps_due has type str; expected an int"),
        ({"steps_due": -1}, ValueError, "state has steps_due -1; allowed are ints >= 0"),
        ({"steps_due": None}, TypeError, "steps_due has type NoneType; expected an int"),
    ],
)
def test_a_state(change: dict[str, Any], kind: Any, message: str) -> None:
    average = filled()
    before = average.state_dict()
    with pytest.raises(kind, match=message):
        average.load_state_dict({**before, **change})
    assert_untouched(average, before)
    lacking = {key: value for key, value in before.items() if key not in change}
    with pytest.raises(KeyError, match=f"state lacks {next(iter(change))}"):
        average.load_state_dict(lacking)
