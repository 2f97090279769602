"""The head family: its truths, formulas and yardsticks on the smoke shape."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fisherkern import bench, reference
from fisherkern.bench import head_fisher, registry, runner
from fisherkern.bench import providers as bench_providers
from fisherkern.bench.registry import Case
from fisherkern.bench.results import OK
from fisherkern.bench.runner import Options

FAMILY = registry.families()["head_fisher"]
OPS = [op.name for op in FAMILY.ops]


def _case(op: str, dtype: str = "float32") -> Case:
    return Case(FAMILY, FAMILY.op(op), FAMILY.smoke, registry.DTYPES[dtype])


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_truths_are_those_of_the_reference(softcap: float | None) -> None:
    h, W = (x.double() for x in _case("stats").make_inputs())
    how = {"softcap": softcap}
    stats, _ = reference.head_fisher_stats(h, W, **how)
    expected = {
        "stats": torch.stack(stats, -1),
        "mean_probs": reference.head_fisher_mean_probs(h, W, **how)[:, None],
        "pullback": reference.head_fisher_pullback(h, W, **how),
        "weight_diagonal": reference.head_fisher_weight_diagonal(h, W, **how).weight,
    }
    for name, truth in expected.items():
        exact = getattr(head_fisher, f"exact_{name}")(h, W, softcap)
        assert torch.allclose(exact, truth, rtol=1e-11, atol=0), name


@pytest.mark.parametrize("dtype", FAMILY.dtypes)
@pytest.mark.parametrize("op", OPS)
def test_everybody_is_right(op: str, dtype: str) -> None:
    case = _case(op, dtype)
    found = bench_providers.providers(FAMILY, "cpu", case.dtype)
    kinds = ("ours", "reference", "eager", "yardstick")
    some = [p for p in found if p.kind in kinds and not p.refusal(case)]
    outcome = runner.run_case(case, some, Options(repeats=2, rotation=0))
    assert {row.provider: row.status for row in outcome.results} == {p.name: OK for p in some}


def test_a_wrong_softcap_is_a_wrong_result() -> None:
    case, capped = _case("pullback"), _case("pullback_softcap")
    inputs = case.make_inputs()
    outputs = (head_fisher.plain_pullback(*inputs),)
    assert case.op.error(inputs, outputs) < 1e-5
    assert capped.op.error(inputs, outputs) > 1e-3


@pytest.mark.parametrize("op", OPS)
def test_yardstick_has_the_products_of_the_op(op: str) -> None:
    case = _case(op)
    tokens, _, width = case.shape
    # of symmetric products, the diagonal and the T rows of d count for the op alone
    apart = 2 * width * (case.shape[1] + tokens * (width + 1))
    for yardstick in case.op.yardsticks.values():
        run = yardstick(case)
        with FlopCounterMode(display=False) as counter:
            run()
        assert abs(case.op.flops(case) - counter.get_total_flops()) <= apart


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ["--providers", "eager", "gemms", "cpp", "--no-memory", "--ops", "stats"]
    assert bench.main(["head_fisher", "--smoke", *chosen]) == 0
    assert "stats T24_V513_d32 bfloat16 cpu (floor" in capsys.readouterr().out
