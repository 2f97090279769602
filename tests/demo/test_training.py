"""The steps of the demo: fair to both optimizers, and the model is left as it was."""

from __future__ import annotations

import pytest
import tiny_llama
import torch

from fisherkern.demo import report, training

transformers = pytest.importorskip("transformers")


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    config = tiny_llama.config(vocab_size=32, hidden_size=16, intermediate_size=24)
    return transformers.LlamaForCausalLM(config).eval()


def windows(count: int) -> torch.Tensor:
    # tokens that can be learned: each follows the one before
    start = torch.arange(count)[:, None] * 5
    return (start + torch.arange(12)) % 32


def test_both_learn_from_the_same_weights_which_come_back() -> None:
    model = tiny()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = training.measure(model, windows(8))
    assert found is not None
    assert [run.name for run in found.runs] == ["AdamW", "KFAC"]
    for run in found.runs:
        assert run.after < found.before
        assert run.seconds > 0
    assert found.tokens == 2 * 12
    assert found.held_out == 4 * 11
    assert not model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    text = report.training(found)
    assert f"| KFAC | {found.before:.4f} | {found.runs[1].after:.4f} |" in text


def test_too_little_text_or_too_large_a_model_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert training.measure(tiny(), windows(5)) is None
    monkeypatch.setattr(training, "LARGEST", 10)
    assert training.measure(tiny(), windows(8)) is None
