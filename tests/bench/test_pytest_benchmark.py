"""The registry under pytest-benchmark, on the smoke shape."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fisherkern.bench import providers, registry
from fisherkern.bench.registry import Case, Provider
from fisherkern.bench.timing import Buffers, Timed

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")


# compiling every case takes minutes; `fisherkern bench` does it
PAIRS = [
    pytest.param(case, provider, id=f"{case.key}-{provider.name}")
    for family in registry.families().values()
    for case in registry.cases(family, dtypes=("float32",), shapes=(family.smoke,))
    for provider in providers.providers(family, "cpu", torch.float32)
    if provider.kind != "compile" and provider.default and not provider.refusal(case)
]


@pytest.mark.parametrize(("case", "provider"), PAIRS)
def test_speed(benchmark: Any, case: Case, provider: Provider) -> None:
    benchmark.group = case.key
    inputs = case.make_inputs()
    out = case.op.out(inputs) if provider.uses_out and case.op.out is not None else None
    with provider.context(), torch.no_grad():
        timed = Timed(provider, provider.prepare(case, inputs, out))
        benchmark.pedantic(timed, args=(Buffers(inputs, out),), rounds=3, warmup_rounds=1)
