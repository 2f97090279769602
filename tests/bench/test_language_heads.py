"""The head family on models: whose hidden states a shape stands for, and that they are kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fisherkern.bench import head_fisher, language_heads
from fisherkern.bench.registry import Case
from fisherkern.demo import assets

FAMILY = language_heads.FAMILY


def _case(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Case:
    return Case(FAMILY, FAMILY.op("stats"), shape, dtype)


def _same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_sizes_of_a_model_are_those_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    h, W = torch.randn(language_heads.TOKENS, 576), torch.randn(1, 576).expand(49152, 576)
    asked = []
    monkeypatch.setattr(language_heads, "of_model", lambda asset: asked.append(asset) or (h, W))
    found = _case((3, 49152, 576), torch.bfloat16).make_inputs()
    assert _same(found, (h[:3].bfloat16(), W.bfloat16()))
    assert asked == [assets.MODEL]


@pytest.mark.parametrize("shape", [(24, 513, 32), (language_heads.TOKENS + 1, 49152, 576)])
def test_other_shapes_are_drawn(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...]) -> None:
    monkeypatch.setattr(language_heads, "of_model", None)
    case = _case(shape)
    drawn = Case(head_fisher.FAMILY, head_fisher.FAMILY.op("stats"), shape, torch.float32)
    assert _same(case.make_inputs(), drawn.make_inputs())


def test_a_model_is_asked_once_unless_the_file_is_damaged(
    monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    pytest.importorskip("safetensors")
    monkeypatch.setenv("FISHERKERN_CACHE", str(tmp_path))
    made = torch.randn(5, 3), torch.randn(7, 3)
    monkeypatch.setattr(language_heads, "_computed", lambda asset: made)
    assert _same(language_heads.of_model(assets.MODEL), made)
    monkeypatch.setattr(language_heads, "_computed", None)
    assert _same(language_heads.of_model(assets.MODEL), made)
    (folder,) = (tmp_path / "heads").iterdir()
    (folder / "head.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(language_heads, "_computed", lambda asset: made)
    assert _same(language_heads.of_model(assets.MODEL), made)
