"""Results do not depend on how much memory the logits are given."""

from __future__ import annotations

import pytest
import torch

from conftest import DEVICE, SLOW
from head_fisher import cases
from head_fisher.cases import IDS, OPS, Op

T, V, d = (4, 40, 9) if SLOW else (37, 257, 33)
# one token, or class, at a time; some; nearly all
WORKSPACES = (1, 12 * V) if SLOW else (1, 1000, 20 * V, 6 * T * V)


@cases.softcaps(5.0)
@pytest.mark.parametrize("op", OPS, **IDS)
def test_any_workspace(backend: str, op: Op, softcap: float | None) -> None:
    count = min(T, 6) if op.matrices else T
    x = cases.make(count, V, d, softcap=softcap)
    w = torch.rand(count, generator=cases.generator(1)).to(DEVICE)
    w[3] = 0
    expected = op.call(x, weights=w)
    for workspace in WORKSPACES:
        # labels are the same too: `close` compares integers exactly
        cases.close(op.call(x, weights=w, workspace=workspace), expected)


@pytest.mark.parametrize("op", OPS, **IDS)
def test_masked_tokens_in_chunks_of_their_own(backend: str, op: Op) -> None:
    """A chunk without a token that counts, first, in the middle and last."""
    x = cases.make(7, V, d)
    mask = torch.tensor([False, True, False, False, True, True, False], device=DEVICE)
    x.hidden[~mask] = torch.nan
    x.u[~mask] = torch.nan
    cases.close(op.call(x, mask=mask, workspace=1), op.call(x, mask=mask))
