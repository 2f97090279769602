"""The covariance family: updates in place, formulas of others, slow providers, its bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from fisherkern import bench
from fisherkern.bench import ceilings, memory, providers, registry, report, runner, timing, verdict
from fisherkern.bench.registry import Case, Provider, Shape
from fisherkern.bench.results import OK, Ratio
from fisherkern.bench.runner import Options, Outcome

QUICK = Options(repeats=2, rotation=0)
FAMILY = registry.families()["covariance"]
LIMITS = ceilings.Ceilings(1e9, {"float32": 4e9, "bfloat16": 1e9})


def _case(op: str = "update", dtype: str = "float32", shape: Shape = FAMILY.smoke) -> Case:
    return Case(FAMILY, FAMILY.op(op), shape, registry.DTYPES[dtype])


def _found(case: Case, *names: str) -> list[Provider]:
    found = providers.providers(case.family, case.device, case.dtype)
    return [p for p in found if p.name in names]


def _statuses(outcome: Outcome) -> dict[str, str]:
    return {row.provider: row.status for row in outcome.results}


def _planted(call: object) -> Provider:
    return Provider("planted", "ours", lambda *_: call)


def test_providers_of_an_op() -> None:
    found = providers.providers(FAMILY, "cpu", torch.float32)
    taken = {p.name for p in found if not p.refusal(_case())}
    others = {"kfac-pytorch", "kronfluence", "curvlinops"}
    assert taken - {"cpp"} == {"reference", *others, *(f"{name} compile" for name in others)}
    taken = {p.name for p in found if not p.refusal(_case("squared_gradient"))}
    assert taken - {"cpp"} == {"reference", "eager", "compile"}
    assert "reference" not in {p.name for p in found if p.default}


def test_inputs_of_a_case_stay_as_they_are() -> None:
    case, seen = _case(), []

    def planted(factor: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append(factor.clone())
        return factor.fill_(math.nan)

    found = [_planted(planted), *_found(case, "kronfluence", "reference")]
    outcome = runner.run_case(case, found, QUICK, LIMITS)
    assert torch.equal(seen[0], case.make_inputs()[0])
    status = _statuses(outcome)
    assert status.pop("planted") == "wrong result: output is not finite everywhere"
    assert set(status.values()) == {OK}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", ["average", "mask", "count"])
def test_wrong_update_has_no_speed(wrong: str, dtype: str) -> None:
    def planted(factor: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = x.float() if wrong == "mask" else x[mask].float()
        count = mask.numel() if wrong == "count" else int(mask.sum())
        decay = 0.9 if wrong == "average" else 0.95
        return factor.mul_(decay).add_(rows.T @ rows, alpha=0.05 / count)

    outcome = runner.run_case(_case(dtype=dtype), [_planted(planted)], QUICK)
    assert _statuses(outcome)["planted"].startswith("wrong result")


def test_compiled_update_in_place() -> None:
    case = _case()
    outcome = runner.run_case(case, _found(case, "kronfluence compile", "reference"), QUICK)
    assert set(_statuses(outcome).values()) == {OK}
    assert ("reference", "kronfluence compile") in {(r.subject, r.peer) for r in outcome.ratios}


def test_slow_peer_is_skipped_and_its_compilation_with_it() -> None:
    case = _case()
    found = _found(case, "kfac-pytorch", "curvlinops", "curvlinops compile")
    status = _statuses(runner.run_case(case, found, replace(QUICK, patience=0.0)))
    assert status.pop("kfac-pytorch") == OK
    assert set(status.values()) == {"skipped: a call of curvlinops takes 0 s"}


def test_budget_leaves_three_rounds() -> None:
    case = _case()
    timed = [timing.Timed(p, case.op.plain) for p in _found(case, "kfac-pytorch")]
    sets = [timing.Buffers(case.make_inputs(), None)]
    for budget, rounds in ((0.0, 3), (60.0, 5)):
        seconds = timing.interleaved(timed, sets, 5, "cpu", budget)
        assert [len(x) for x in seconds.values()] == [rounds]


def test_new_factor_is_charged() -> None:
    case = _case(shape=(256, 1024))
    with memory.MemoryServer() as server:
        kfac, mine = (server.measure(case, name) for name in ("kfac-pytorch", "kronfluence"))
    assert kfac is not None
    assert mine is not None
    factor = 4 * 1024**2
    # cov, its symmetric part, both terms of the average and their sum, never all at once
    assert kfac.torch_bytes >= 3 * factor
    assert factor <= mine.torch_bytes <= 2 * factor + (1 << 16)


def test_ceiling_of_half_precision_is_the_faster_product() -> None:
    assert LIMITS.rate("gemm", "bfloat16") == 4e9
    assert LIMITS.rate("gemm", "float32") == 4e9
    assert LIMITS.rate("gemm", "float64") is None
    assert LIMITS.rate("copy", "bfloat16") == 1e9


def test_report_counts_flops() -> None:
    row = replace(runner.blank(_case(), _planted(None), LIMITS), status=OK, median_s=1e-3)
    title, names, line = report.case([row], []).strip().splitlines()
    assert row.flops == (256 - 25) * 33 * 34
    assert "floor 0.0 GFLOP" in title
    assert "GFLOP/s  of GEMM" in names
    assert f"{row.flops / 1e6:.1f}" in line.split()


def test_samples_need_whole_samples() -> None:
    with pytest.raises(ValueError, match="multiple of 128"):
        _case("squared_gradient_per_sample", shape=(200, 8)).make_inputs()


def test_shapes_of_an_op_replace_those_of_its_family() -> None:
    ops = ("update", "squared_gradient_per_sample")
    found = registry.cases(FAMILY, ops=ops, dtypes=("float32",))
    assert [case.label for case in found] == [
        "T4096_d1024", "T2048_d3072", "T4096_d4096", "T2048_d512", "T4096_d1024",
    ]  # fmt: skip


def _ratio(value: float, dtype: str, op: str = "update") -> Ratio:
    return Ratio(op, "T256_d33", dtype, "cpp", "kfac-pytorch", value, value, value)


def test_gpu_bars_are_for_the_automatic_choice() -> None:
    """At least 1.3 times cuBLAS where factors are wide, and nowhere slower than 0.98 of it."""
    found = providers.providers(FAMILY, "cuda", torch.bfloat16)
    assert providers.best(found)[0] == "automatic"
    assert "cublas" in {p.name for p in found}
    assert "cublas" not in {p.name for p in providers.providers(FAMILY, "cpu", torch.bfloat16)}

    def passed(*values: tuple[str, str, float]) -> list[bool]:
        rows = [
            replace(
                runner.blank(_case(dtype=dtype), Provider(name, "ours", lambda *_: None), None),
                status=OK,
                case=case,
            )
            for name in ("automatic", "cublas")
            for case, dtype, _ in values
        ]
        ratios = [
            Ratio("update", case, dtype, "automatic", "cublas", value, value, value)
            for case, dtype, value in values
        ]
        return [v.passed for v in verdict.judge(rows, ratios, FAMILY, ["automatic"], "cuda")]

    narrow, wide = "T8192_d1024", "T8192_d4096"
    assert passed((narrow, "bfloat16", 0.98), (wide, "bfloat16", 1.3)) == [True, True]
    assert passed((narrow, "bfloat16", 0.97), (wide, "bfloat16", 1.3)) == [True, False]
    assert passed((narrow, "bfloat16", 1.0), (wide, "bfloat16", 1.29)) == [False, True]
    assert passed((narrow, "bfloat16", 1.0), (wide, "float32", 1.0)) == [True]


@pytest.mark.parametrize("op", ["update", "update_bias"])
def test_cublas_yardstick_is_right(op: str) -> None:
    case = _case(op)
    inputs = case.make_inputs()
    result = case.op.peers["cublas"]()(*inputs)
    assert case.op.error(case.make_inputs(), (result,)) < 1e-5


def _judged(ratios: Sequence[Ratio], dtypes: Sequence[str], extra: int = 0) -> list[bool]:
    rows = [
        replace(
            runner.blank(_case(dtype=dtype), Provider(name, "ours", lambda *_: None), None),
            status=OK,
            extra_bytes=extra,
        )
        for name in ("cpp", "kfac-pytorch")
        for dtype in dtypes
    ]
    return [v.passed for v in verdict.judge(rows, ratios, FAMILY, ["cpp"], "cpu")]


def test_bars() -> None:
    good = [_ratio(1.5, "float32"), _ratio(2.0, "float32")]
    both = [*good, _ratio(10.0, "bfloat16"), _ratio(0.5, "float32", "update_bias")]
    assert _judged(both, ["float32", "bfloat16"], 64 << 20) == [True] * 4
    assert _judged(good, ["float32"]) == [True] * 3
    assert _judged([_ratio(1.6, "float32")], ["float32"]) == [True, False, True]
    assert _judged([_ratio(1.4, "float32"), good[1], good[1]], ["float32"]) == [False, True, True]
    assert _judged([_ratio(9.9, "bfloat16")], ["bfloat16"], 65 << 20) == [False, False]


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--providers", "kfac-pytorch", "reference", "--no-memory"]
    assert bench.main(["covariance", "--smoke", "--ops", "all", *chosen]) == 0
    printed = capsys.readouterr().out
    assert "update T256_d33 bfloat16 cpu (floor" in printed
    assert "reference        vs kfac-pytorch geometric mean" in printed
