"""The table of precisions: ours is the best column of it, or near to it."""

from __future__ import annotations

import math

import pytest
import torch

from fisherkern.bench import numerics, woodbury


@pytest.mark.parametrize("damping", numerics.DAMPINGS)
@pytest.mark.parametrize("kind", numerics.KINDS)
def test_ours_is_within_twice_the_best(kind: str, damping: float) -> None:
    found = numerics.errors(numerics.synthetic(kind, 32, 256), damping)
    assert found["ours"] <= 2 * min(e for e in found.values() if not math.isnan(e))


def test_columns_differ_by_what_their_names_say() -> None:
    z = numerics.synthetic("medium", 32, 256)
    found = numerics.errors(z, 1e-6)
    assert found["fp32 + correction"] < found["fp32"] / 4
    assert found["U fp16"] > 100 * found["fp32 + correction"]
    assert found["S from bf16"] > 4 * found["bf16 + correction"]


@pytest.mark.parametrize("corrected", [False, True])
def test_formulation_is_that_of_the_truth(corrected: bool) -> None:
    z, y = numerics.synthetic("diffuse", 16, 64), torch.randn(64, 3)
    x = numerics.formulation(z, y, 1e-2, corrected=corrected)
    torch.testing.assert_close(x.double(), woodbury.exact(z, y, 1e-2), rtol=1e-5, atol=1e-5)


def test_failures_are_named_in_the_table() -> None:
    z = numerics.synthetic("peaked", 32, 256)
    header, _, row = numerics.table({"peaked": z}, (1e-6,)).splitlines()
    cells = dict(zip(header.split(" | "), row.split(" | "), strict=True))
    assert cells["S from bf16"] == "Cholesky fails"
    assert float(cells["ours |"].removesuffix(" |")) < 1e-5
