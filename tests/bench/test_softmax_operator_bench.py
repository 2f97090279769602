"""The operator family: its truth, what gets no speed, the yardstick of products, its bars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fisherkern import bench
from fisherkern.bench import ceilings, providers, registry, report, runner, verdict, woodbury
from fisherkern.bench.registry import Case, Provider
from fisherkern.bench.results import OK, Ratio
from fisherkern.bench.runner import Options, Outcome
from fisherkern.bench.softmax_operator import DAMPING, language_logits, products

QUICK = Options(repeats=2, rotation=0)
FAMILY = registry.families()["softmax_operator"]
LIMITS = ceilings.Ceilings(1e9, {"float32": 4e9, "bfloat16": 9e9})


def _case(dtype: str = "float32") -> Case:
    return Case(FAMILY, FAMILY.op("solve"), FAMILY.smoke, registry.DTYPES[dtype])


def _found(case: Case, *names: str) -> list[Provider]:
    found = providers.providers(case.family, case.device, case.dtype)
    return [p for p in found if p.name in names]


def _statuses(outcome: Outcome) -> dict[str, str]:
    return {row.provider: row.status for row in outcome.results}


@pytest.mark.parametrize("damping", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("panel_bytes", [1 << 28, 8 * 24 * 10])
def test_truth_is_the_dense_solution(
    damping: float, panel_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(woodbury, "_PANEL_BYTES", panel_bytes)
    generator = torch.Generator().manual_seed(0)
    z = language_logits(24, 97, generator)
    y = torch.randn(97, 3, generator=generator)
    p = torch.softmax(z.double(), -1)
    dense = torch.diag(p.mean(0)) - p.mT @ p / 24 + damping * torch.eye(97, dtype=torch.float64)
    expected = torch.linalg.solve(dense, y.double())
    difference = (woodbury.exact(z, y, damping) - expected).norm() / expected.norm()
    # what the dense solution itself loses
    assert difference <= torch.linalg.cond(dense) * torch.finfo(torch.float64).eps


def test_logits_resemble_those_of_a_language_model() -> None:
    z = language_logits(512, 49152, torch.Generator().manual_seed(0))
    log_p = torch.log_softmax(z, -1)
    p = log_p.exp()
    assert float(-(p * log_p).sum(-1).mean()) == pytest.approx(2.6, abs=0.1)
    assert float((p * (1 - p)).sum(-1).mean()) == pytest.approx(0.70, abs=0.02)
    assert float((p < 6e-8).float().mean()) == pytest.approx(0.75, abs=0.02)
    assert float((p.amax(-1) > 0.99).float().mean()) == pytest.approx(1 / 27, abs=0.01)


@pytest.mark.parametrize("dtype", FAMILY.dtypes)
def test_yardstick_is_timed_and_not_checked(dtype: str) -> None:
    case = _case(dtype)
    outcome = runner.run_case(case, _found(case, "reference", "eager", "gemms"), QUICK, LIMITS)
    assert _statuses(outcome) == {"reference": OK, "eager": OK, "gemms": OK}
    row = next(row for row in outcome.results if row.provider == "gemms")
    assert row.kind == "yardstick"
    assert row.median_s is not None
    assert (row.max_error, row.error_limit, row.extra_bytes) == (None, None, None)
    assert "unchecked" in report.line(row, outcome.ratios)
    assert ("reference", "gemms") in {(r.subject, r.peer) for r in outcome.ratios}


def test_failing_yardstick_is_reported() -> None:
    def fail(case: Case) -> Callable[[], None]:
        raise MemoryError("too large")

    case = _case()
    case = replace(case, op=replace(case.op, yardsticks={"gemms": fail}))
    outcome = runner.run_case(case, _found(case, "eager", "gemms"), QUICK)
    assert _statuses(outcome) == {"eager": OK, "gemms": "failed: MemoryError: too large"}


@pytest.mark.parametrize("dtype", FAMILY.dtypes)
def test_products_are_those_that_nobody_avoids(dtype: str) -> None:
    case = _case(dtype)
    tokens, classes, columns = case.shape
    run = products(case)
    with FlopCounterMode(display=False) as counter:
        run()
    # the lower triangle of S without its diagonal, and two products of U with k columns
    assert counter.get_total_flops() == classes * (tokens * tokens + 4 * tokens * columns)
    assert case.op.flops(case) - counter.get_total_flops() == classes * tokens


WRONG: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "diagonal alone": lambda z, y: y / (torch.softmax(z.float(), -1).mean(0) + DAMPING)[:, None],
    "damping": lambda z, y: woodbury.sketch(z, y, 1.001 * DAMPING),
    "one token less": lambda z, y: woodbury.sketch(z[1:], y, DAMPING),
    "tail": lambda z, y: torch.cat([woodbury.sketch(z, y, DAMPING)[:-1], y[-1:]]),
}


@pytest.mark.parametrize("dtype", FAMILY.dtypes)
@pytest.mark.parametrize("name", WRONG)
def test_wrong_solution_has_no_speed(name: str, dtype: str) -> None:
    planted = Provider("planted", "ours", lambda *_: WRONG[name])
    outcome = runner.run_case(_case(dtype), [planted], QUICK)
    assert _statuses(outcome)["planted"].startswith("wrong result")


def test_products_in_bfloat16_are_a_wrong_result() -> None:
    """Why the bars for bfloat16 logits are against float32 products."""

    def half(z: Tensor, y: Tensor) -> Tensor:
        return woodbury.sketch_half(z, y, DAMPING)

    planted = Provider("planted", "peer", lambda *_: half, formula="eager")
    outcome = runner.run_case(_case("bfloat16"), [planted], QUICK)
    (row,) = outcome.results
    assert row.status == "wrong result"
    assert row.max_error > 100 * row.error_limit


def test_bfloat16_logits_are_held_to_float32() -> None:
    case = _case("bfloat16")
    outcome = runner.run_case(case, _found(case, "reference"), QUICK, LIMITS)
    (row,) = outcome.results
    assert row.error_limit < 1e-4
    assert row.ceiling_rate == 4e9


@pytest.mark.parametrize("op", [op.name for op in FAMILY.ops])
def test_truth_leaves_its_inputs_alone(op: str) -> None:
    case = Case(FAMILY, FAMILY.op(op), FAMILY.smoke, torch.float64)
    inputs, same = case.make_inputs(), case.make_inputs()
    outcome = case.op.plain(*inputs)
    assert case.op.error(inputs, registry.as_tuple(outcome)) < 1e-10
    assert all(torch.equal(x, y) for x, y in zip(inputs, same, strict=True))


def _verdicts(
    eager: float = 1.3,
    half: float = 3.0,
    gemms: float = 0.87,
    extra: tuple[int, int] = (1, 2),
    error: tuple[float, float] = (1.0, 1.0),
) -> list[verdict.Verdict]:
    """Of these speeds against the peers; extra memory and errors are ours and eager's."""
    figures = {"cpp": (extra[0], error[0]), "eager": (extra[1], error[1])}
    figures |= {"gemms": (None, None), "gemms anew": (None, None)}
    rows = [
        replace(
            runner.blank(_case(dtype), Provider(name, "ours", lambda *_: None), None),
            status=OK,
            extra_bytes=extra_bytes,
            max_error=max_error,
        )
        for name, (extra_bytes, max_error) in figures.items()
        for dtype in FAMILY.dtypes
    ]
    speeds = [("float32", "eager", eager), ("bfloat16", "eager", half)]
    # the products bind in float32 alone, and those that suit the call
    speeds += [("float32", "gemms anew", gemms), ("bfloat16", "gemms anew", 0.1)]
    speeds += [("float32", "gemms", 0.1)]
    ratios = [
        Ratio("solve", _case().label, dtype, "cpp", peer, value, value, value)
        for dtype, peer, value in speeds
    ]
    return verdict.judge(rows, ratios, FAMILY, ["cpp"], "cpu")


def _passed(**changed: Any) -> list[bool]:
    return [v.passed for v in _verdicts(**changed)]


def test_bars() -> None:
    assert _passed() == [True] * 6
    assert _passed(eager=1.29) == [False, True, True, True, True, True]
    assert _passed(half=2.99) == [True, False, True, True, True, True]
    assert _passed(gemms=0.86) == [True, True, False, True, True, True]
    assert _passed(extra=((2 << 30) + 1, 5 << 30)) == [True, True, True, False, True, True]
    assert _passed(extra=(51, 100)) == [True, True, True, True, False, True]
    assert _passed(error=(1.01, 1.0)) == [True, True, True, True, True, False]


def test_which_products_a_call_is_held_to() -> None:
    binding = {
        subject: [bar.peer for bar in FAMILY.bars if bar.binds(subject)]
        for subject in ("cpp", "cpp out=")
    }
    assert binding["cpp"] == ["eager", "eager", "gemms anew"]
    assert binding["cpp out="] == ["eager", "eager", "gemms"]


def test_bars_that_are_upper_bounds_say_so() -> None:
    lines = report.bars(_verdicts())
    assert ["(>=" in line for line in lines] == [True, True, True, False, False, False]
    assert "largest extra memory over that of eager: 0.50 (<= 0.5;" in lines[4]


def test_shares_need_a_peer_that_was_right() -> None:
    ours = replace(
        runner.blank(_case(), Provider("cpp", "ours", lambda *_: None), None),
        status=OK,
        max_error=1.0,
    )
    eager = replace(ours, provider="eager", kind="eager", max_error=2.0)
    (only,) = verdict.shares([ours, eager], FAMILY, "cpp")
    assert (only.value, only.passed) == (0.5, True)
    assert verdict.shares([ours, replace(eager, status="wrong result")], FAMILY, "cpp") == []


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--providers", "eager", "gemms", "reference", "--no-memory"]
    assert bench.main(["softmax_operator", "--smoke", *chosen]) == 0
    printed = capsys.readouterr().out
    assert "solve T48_V513_k8 bfloat16 cpu (floor" in printed
    assert "reference        vs gemms" in printed
