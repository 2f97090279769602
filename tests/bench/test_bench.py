"""The benchmark harness: every case runs, and no wrong result gets a speed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from fisherkern import bench
from fisherkern.bench import (
    accuracy,
    ceilings,
    cli,
    memory,
    plots,
    providers,
    registry,
    report,
    results,
    runner,
    timing,
    verdict,
)
from fisherkern.bench.registry import Case, Provider
from fisherkern.bench.results import OK, Ratio
from fisherkern.bench.runner import Options, Outcome

QUICK = Options(repeats=2, rotation=0)
FAMILIES = registry.families()
EVERY_OP = [(f.name, op.name) for f in FAMILIES.values() for op in f.ops]
LIMITS = ceilings.Ceilings(1e9, {"float32": 1e9, "bfloat16": 1e9})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # tiny shapes: threads that wait for each other on a busy machine are all the time there is
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _case(op: str = "matvec", dtype: torch.dtype = torch.float32, device: str = "cpu") -> Case:
    family = FAMILIES["softmax_fisher"]
    return Case(family, family.op(op), family.smoke, dtype, device)


def _found(case: Case, *kinds: str) -> list[Provider]:
    found = providers.providers(case.family, case.device, case.dtype)
    return [p for p in found if not kinds or p.kind in kinds]


def _row(outcome: Outcome, provider: str) -> results.Result:
    return next(row for row in outcome.results if row.provider == provider)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("family", "op"), EVERY_OP)
def test_every_case_runs(family: str, op: str, dtype: torch.dtype) -> None:
    found = FAMILIES[family]
    case = Case(found, found.op(op), found.smoke, dtype)
    kinds = ("ours", "reference", "eager", "peer")
    outcome = runner.run_case(case, _found(case, *kinds), QUICK, LIMITS)
    assert {row.provider for row in outcome.results} >= {case.op.plain_name, *case.op.formulas}
    for row in outcome.results:
        assert row.status == OK, (row.provider, row.status, row.max_error, row.error_limit)
        assert row.median_s is not None
        assert row.p20_s <= row.median_s <= row.p80_s
        work = row.floor_bytes if case.op.ceiling == "copy" else row.flops
        assert row.ceiling_fraction == pytest.approx(work / row.median_s / 1e9)


def test_compile_runs() -> None:
    case = _case("trace")
    outcome = runner.run_case(case, _found(case, "compile", "reference"), QUICK)
    assert _row(outcome, "compile").status == OK
    assert ("reference", "compile") in {(r.subject, r.peer) for r in outcome.ratios}


def _planted(name: str, call: object, uses_out: bool = False) -> Provider:
    return Provider(name, "ours", lambda *_: call, uses_out=uses_out)


def _matvec_without_tail(z: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    p = torch.softmax(z, -1)
    p = torch.where(p < 0.05 * p.amax(-1, keepdim=True), 0.0, p)
    return p * (v - (p * v).sum(-1, keepdim=True))


WRONG = {
    "zeros": lambda z, v: torch.zeros_like(z),
    "no tail": _matvec_without_tail,
    "shape": lambda z, v: z[0],
    "nan": lambda z, v: torch.full_like(z, math.nan),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_result_has_no_speed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = _case()
    found = [_planted("planted", WRONG[name]), *_found(case, "eager")]
    outcome = runner.run_case(case, found, QUICK, LIMITS)
    row = _row(outcome, "planted")
    assert row.status.startswith("wrong result")
    assert (row.median_s, row.bandwidth, row.ceiling_fraction) == (None, None, None)
    assert not outcome.ratios
    assert _row(outcome, "eager").status == OK
    line = report.line(row, outcome.ratios)
    assert "wrong result" in line
    assert " ms" not in line
    assert " us" not in line
    verdicts = verdict.judge(outcome.results, outcome.ratios, case.family, ["planted"], "cpu")
    assert verdicts
    assert not any(v.passed for v in verdicts)


def test_unwritten_out_is_wrong() -> None:
    case = _case()
    planted = _planted("planted out=", lambda z, v, out: out, uses_out=True)
    row = _row(runner.run_case(case, [planted], QUICK), "planted out=")
    assert row.status == "wrong result: output 0 is not finite everywhere"


@pytest.mark.parametrize(
    ("label", "reason"), [(-100, "no class"), (0, "probability zero"), (1, "surprise")]
)
def test_implausible_labels_are_wrong(label: int, reason: str) -> None:
    z = torch.zeros(64, 6, dtype=torch.float64)
    z[:, 0], z[:, 1] = -torch.inf, -8.0
    labels = torch.full((64,), label)
    with pytest.raises(ValueError, match=reason):
        FAMILIES["softmax_fisher"].op("sample").error((z,), (labels, torch.softmax(z, -1)))


def test_failing_provider_is_reported() -> None:
    def fail(z: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        raise OSError("cannot read /some/where/private/kernel.so")

    outcome = runner.run_case(_case(), [_planted("planted", fail)], QUICK)
    assert _row(outcome, "planted").status == "failed: OSError: cannot read kernel.so"


def test_wrong_eager_times_nobody() -> None:
    case = _case()
    case = replace(case, op=replace(case.op, plain=WRONG["nan"]))
    outcome = runner.run_case(case, _found(case, "eager", "reference"), QUICK)
    assert all(row.status != OK and row.median_s is None for row in outcome.results)


def test_case_that_does_not_fit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "free_memory", lambda device: 1 << 20)
    outcome = runner.run_case(_case(), _found(_case(), "eager"), QUICK)
    assert (
        _row(outcome, "eager").status
        == "skipped: MemoryError: not even eager, the yardstick of errors, fits into memory"
    )


def test_results_survive_files(tmp_path) -> None:
    case = _case()
    found = [_planted("planted", WRONG["zeros"]), *_found(case, "eager", "reference")]
    outcome = runner.run_case(case, found, QUICK, LIMITS)
    results.write_csv(tmp_path / "results.csv", outcome.results)
    results.write_json(tmp_path / "results.json", outcome.results, ceilings=LIMITS)
    assert results.read_csv(tmp_path / "results.csv") == outcome.results
    assert results.read_json(tmp_path / "results.json") == outcome.results


def test_geometric_mean() -> None:
    assert verdict.geometric_mean([1.0, 4.0]) == pytest.approx(2.0)
    for values in ([], [1.0, 0.0]):
        with pytest.raises(ValueError, match="positive"):
            verdict.geometric_mean(values)


def _ratio(peer: str, value: float, op: str = "matvec") -> Ratio:
    return Ratio(op, "T4_V257", "float32", "cpp", peer, value, value, value)


def _blank(provider: str, device: str = "cpu") -> results.Result:
    row = runner.blank(_case(device=device), Provider(provider, "ours", lambda *_: None), None)
    return replace(row, status=OK)


def _passed(ratios: Sequence[Ratio]) -> list[bool]:
    rows = [_blank(name) for name in ("cpp", "eager", "compile")]
    return [v.passed for v in verdict.speed(rows, ratios, FAMILIES["softmax_fisher"], "cpp")]


def test_speed_verdicts() -> None:
    good = [_ratio("eager", 3.0), _ratio("compile", 1.0), _ratio("compile", 2.3, "trace")]
    assert _passed(good) == [True, True, True]
    assert _passed([_ratio("eager", 2.9), *good]) == [False, True, True]
    assert _passed([_ratio("compile", 0.99), *good]) == [True, False, False]
    assert _passed([_ratio("compile", 0.99), _ratio("compile", 9.0), *good]) == [True, True, False]
    assert _passed(good[:1]) == [True, False, False]


def test_speed_verdict_fails_where_a_case_has_no_speed() -> None:
    rows = [_blank(name) for name in ("cpp", "eager", "compile")]
    rows.append(replace(rows[0], op="trace", status="wrong result"))
    ratios = [_ratio("eager", 9.0), _ratio("compile", 9.0)]
    verdicts = verdict.speed(rows, ratios, FAMILIES["softmax_fisher"], "cpp")
    assert [v.passed for v in verdicts] == [False] * 3


def test_peer_that_was_not_asked_for_has_no_bar() -> None:
    rows = [_blank("cpp"), _blank("eager")]
    ratios = [_ratio("eager", 9.0)]
    assert len(verdict.speed(rows, ratios, FAMILIES["softmax_fisher"], "cpp")) == 1


@pytest.mark.parametrize(("fraction", "passed"), [(0.66, True), (0.64, False)])
def test_bandwidth_verdict(fraction: float, passed: bool) -> None:
    row = replace(_blank("triton", "cuda"), ceiling_fraction=fraction)
    (only,) = verdict.judge([row], [], FAMILIES["softmax_fisher"], ["triton"], "cuda")
    assert (only.passed, only.bar) == (passed, 0.65)


@pytest.mark.parametrize(("extra", "passed"), [(2**20, True), (2**25, False)])
def test_memory_verdict(extra: int, passed: bool) -> None:
    rows = [replace(_blank("cpp"), extra_bytes=extra)]
    (only,) = verdict.memory(rows, FAMILIES["softmax_fisher"], "cpp")
    assert only.passed == passed


def test_missing_memory_fails_where_it_was_asked_for() -> None:
    family, row = FAMILIES["softmax_fisher"], _blank("cpp")
    assert verdict.memory([row], family, "cpp") == []
    (nothing,) = verdict.memory([row], family, "cpp", asked=True)
    assert (nothing.passed, nothing.detail) == (False, "no memory for 1 cases")
    measured = replace(row, op="trace", extra_bytes=1)
    (partly,) = verdict.memory([row, measured], family, "cpp")
    assert not partly.passed
    assert partly.detail.endswith("; no memory for 1 cases")
    (peer,) = verdict.memory([row, replace(measured, provider="eager")], family, "cpp")
    assert not peer.passed
    judged = verdict.judge([row], [], family, ["cpp"], "cpu", memory_asked=True)
    assert [v.detail for v in judged] == ["no memory for 1 cases"]


def _named(*names: str) -> list[Provider]:
    return [Provider(n, "ours", lambda *_: None, uses_out=n.endswith("out=")) for n in names]


def test_out_is_judged_alone_where_nothing_else_was_asked_for() -> None:
    assert providers.best(_named("cpp out="))[-1] == "cpp out="
    assert providers.best(_named("cuda out=", "triton"))[0] == "triton"
    assert providers.best([]) == []


def test_subjects_come_from_every_case(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    def found(family: registry.Family, device: str, dtype: torch.dtype) -> list[Provider]:
        fused = Provider("planted out=", "ours", lambda case, *_: case.op.fused, uses_out=True)
        return [fused] if dtype == torch.bfloat16 else []

    monkeypatch.setattr(cli.providers, "providers", found)
    monkeypatch.setattr(runner, "run_case", lambda *_: Outcome([_blank("planted out=")]))
    seen: list[list[str]] = []
    monkeypatch.setattr(
        cli.verdict, "judge", lambda rows, ratios, family, subjects, *_, **__: seen.append(subjects)
    )
    monkeypatch.setattr(cli.report, "case", lambda *_: "")
    monkeypatch.setattr(cli.report, "summary", lambda *_: "")
    chosen = ["--dtypes", "float32", "bfloat16", "--providers", "planted out=", "--no-memory"]
    bench.main(["softmax_fisher", "--smoke", "--ops", "matvec", *chosen])
    assert seen == [["planted", "planted out="]]


def test_quantiles_and_interleaving() -> None:
    q = timing.quantiles([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (q.median, q.p20, q.p80) == (3.0, pytest.approx(1.8), pytest.approx(4.2))
    assert timing.quantiles([2.0]) == timing.Quantiles(2.0, 2.0, 2.0)


def test_rotation_gives_distinct_buffers() -> None:
    first = timing.Buffers((torch.ones(256),), torch.ones(256))
    sets = timing.rotated(first, 5 * 2048)
    addresses = {x.data_ptr() for s in sets for x in (*s.inputs, s.out)}
    assert len(sets) == 5
    assert len(addresses) == 10
    assert timing.rotated(first, 0) == [first]


def test_error_limit_follows_eager() -> None:
    assert accuracy.limit(torch.float32, 1e-6) == pytest.approx(4e-6)
    # an eager that is wrong itself buys nobody more room
    worst = accuracy.limit(torch.float32, accuracy.EAGER_LIMIT[torch.float32])
    assert accuracy.limit(torch.float32, 1.0) == worst


def test_profiled_peak_counts_temporaries() -> None:
    x = torch.ones(1 << 18)
    assert memory.profiled_peak(lambda: (x + 1).sum()) == pytest.approx(1 << 20, abs=4096)


def test_memory_server_sees_temporaries() -> None:
    family = FAMILIES["softmax_fisher"]
    case = Case(family, family.op("matvec"), (64, 16384), torch.float32)
    with memory.MemoryServer() as server:
        eager = server.measure(case, "eager")
        assert server.measure(case, "nobody") is None
    row = 64 * 16384 * 4
    assert eager is not None
    assert eager.torch_bytes == pytest.approx(3 * row, rel=0.02)
    assert eager.torch_bytes <= eager.extra_bytes <= 4 * row


def test_ceilings_are_positive() -> None:
    measured = ceilings.measure("cpu", (torch.float32,), smoke=True)
    assert measured.copy_bandwidth > 0
    assert measured.gemm_rate["float32"] > 0


def test_messages_lose_their_paths() -> None:
    text = results.without_paths("no file /a/b/c.py here\nsecond line")
    assert text == "no file c.py here"


ARGUMENTS = ["softmax_fisher", "--smoke", "--ops", "trace", "--dtypes", "float32"]


def test_command(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--providers", "eager", "reference", "--no-memory", "--output", str(tmp_path)]
    assert bench.main([*ARGUMENTS, *chosen]) == 0
    printed = capsys.readouterr().out
    assert "trace T4_V257 float32 cpu" in printed
    assert "vs eager" in printed
    content = json.loads((tmp_path / "results.json").read_text())
    assert set(content) == {"environment", "ceilings", "verdicts", "ratios", "results"}
    assert not [text for text in json.dumps(content).split('"') if text.startswith("/")]
    assert len(results.read_csv(tmp_path / "results.csv")) == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--providers", "nobody"], "nobody"),
        (["--shapes", "4"], "TxV"),
        (["--shapes", "axb"], "no shape"),
        (["--plots"], "--output"),
        (["--repeats", "0"], "positive"),
        (["--ops", "trase"], "trase"),
        (["--dtypes", "float64"], "--dtypes of softmax_fisher are float32, bfloat16, float16"),
        (["--providers", "reference out="], "--providers ['reference out='] compute none"),
    ],
)
def test_command_refuses(
    extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main([*ARGUMENTS, *extra])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("blocked", ["file", "results.csv", "results.json", "matplotlib"])
def test_output_is_tried_before_anything_is_measured(
    blocked: str, tmp_path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, message = tmp_path / "out", "--output"
    if blocked == "file":
        folder.write_text("")
    elif blocked == "matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        message = "--plots needs matplotlib"
    else:
        (folder / blocked).mkdir(parents=True)
    monkeypatch.setattr(ceilings, "measure", None)
    with pytest.raises(SystemExit):
        bench.main([*ARGUMENTS, "--no-memory", "--plots", "--output", str(folder)])
    assert message in capsys.readouterr().err
    assert not (folder / "results.csv").is_file()


def test_plots_show_every_provider(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    row = replace(_blank("x"), median_s=1.0, extra_bytes=1 << 20)
    rows = [replace(row, provider=f"provider {i}") for i in range(12)]
    rows += [replace(row, case="T8_V257") for row in rows]
    shown: list[int] = []

    def save(figure, file) -> None:
        shown.append(len(figure.axes[0].get_legend_handles_labels()[1]))

    monkeypatch.setattr(plots, "_save", save)
    assert plots.roofline(tmp_path / "x.png", rows, ceilings.Ceilings(1e9, {}))
    assert plots.memory(tmp_path / "x.png", rows)
    assert shown == [12, 12]


def test_plots(tmp_path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    case = _case()
    rows = runner.run_case(case, _found(case, "eager", "reference"), QUICK, LIMITS).results
    rows = [replace(row, extra_bytes=1 << 20) for row in rows]
    rows += [replace(row, case="T8_V257") for row in rows]
    rows += [replace(row, case="T4_V999") for row in rows]
    assert plots.draw_all(tmp_path, rows, LIMITS) == ["bars.png", "roofline.png", "memory.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in tmp_path.glob("*.png"))
    assert plots.draw_all(tmp_path, [], LIMITS) == []
