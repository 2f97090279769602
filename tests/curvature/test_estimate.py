"""estimate_fisher: a loop over a data loader, whatever it gives, that can be interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_llama
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import cases
from fisherkern.curvature import Capture, EigenCurvature, estimate_fisher

EXACT = cases.EXACT


def model() -> nn.Module:
    return cases.filled(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)))


def pairs(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(cases.drawn(n + 2, 3, seed=n), torch.arange(n + 2) % 4) for n in range(count)]


def estimated(batches: Any, fisher_type: str = "type-2", **options: Any) -> Capture:
    network = options.pop("model", None) or model()
    return estimate_fisher(network, batches, fisher_type=fisher_type, progress=False, **options)


@pytest.mark.parametrize("structure", ["kfac", "diagonal", "block"])
def test_it_is_the_capture_of_the_union(structure: str) -> None:
    network, x = model(), torch.cat([x for x, _ in pairs()])
    whole = cases.captured(network, x, structure=structure)
    cases.assert_same(estimated(pairs(), structure=structure, model=network), whole)


def test_empirical_leaves_gradients_alone() -> None:
    network = model()
    x, y = (torch.cat(parts) for parts in zip(*pairs(), strict=True))
    fisher = Capture(network, fisher_type="empirical", loss_reduction="sum")
    with fisher, fisher.batch(terms=len(y)):
        functional.cross_entropy(network(x), y, reduction="sum").backward()
    network.zero_grad(set_to_none=True)
    cases.assert_same(estimated(pairs(), "empirical", model=network), fisher)
    assert all(p.grad is None for p in network.parameters())


def test_inputs_alone_and_mappings() -> None:
    class Named(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    network = model()
    whole = cases.averages(estimated(pairs(), model=network))
    alone = cases.averages(estimated([x for x, _ in pairs()], model=network))
    named = estimated([{"x": x, "labels": y} for x, y in pairs()], model=Named(network))
    for name, value in whole.items():
        assert torch.equal(alone[name], value)
    for mine, theirs in zip(cases.averages(named).values(), whole.values(), strict=True):
        assert cases.error(mine, theirs) < EXACT


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_language_models(fisher_type: str) -> None:
    """Labels are those of the next token, and −100 or padding are no terms."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = tiny_llama.config(vocab_size=17)
    network = transformers.LlamaForCausalLM(config).double()
    tokens = torch.arange(10).view(2, 5) % 17
    labels = tokens.clone()
    labels[1, 3:] = -100
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    found = estimated([batch], fisher_type, model=network)
    terms = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    fisher = Capture(network, fisher_type=fisher_type, loss_reduction="sum")
    with fisher, fisher.batch(mask=mask.bool(), terms=6):
        output = network(**batch)
        if fisher_type == "type-2":
            fisher.add(output.logits, mask=terms)
        else:  # transformers' own loss is one of float32
            kept, targets = output.logits[terms], labels.roll(-1, 1)[terms]
            functional.cross_entropy(kept, targets, reduction="sum").backward()
    cases.assert_same(found, fisher)


def test_ekfac_goes_over_the_data_twice() -> None:
    network = model()
    found = estimated(pairs(), structure="ekfac", model=network)
    twice = Capture(network, fisher_type="type-2", structure="ekfac")
    with twice:
        for number in range(2):
            for x, _ in pairs():
                with twice.batch():
                    twice.add(network(x))
            if not number:
                for layer in twice.layers.values():
                    assert isinstance(layer, EigenCurvature)
                    layer.refresh()
    cases.assert_same(found, twice)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_it_resumes_with_the_same_bits(structure: str, stop: int, tmp_path: Path) -> None:
    network, path = model(), tmp_path / "fisher.pt"
    options: dict[str, Any] = {"structure": structure, "model": network}
    through = estimated(pairs(), **options)
    seen: list[int] = []

    def progress(done: int) -> None:
        seen.append(done)
        if len(seen) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(
            network,
            pairs(),
            fisher_type="type-2",
            structure=structure,
            progress=progress,
            checkpoint=path,
            checkpoint_period=1,
        )
    resumed = estimated(pairs(), checkpoint=path, checkpoint_period=1, **options)
    cases.assert_same(resumed, through, bits=True)


def test_hooks_are_gone_and_the_bar_shows(capsys: pytest.CaptureFixture[str]) -> None:
    network = model()
    estimate_fisher(network, pairs(), fisher_type="mc")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    pytest.importorskip("tqdm")
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([cases.drawn(2, 3)], {"fisher_type": "empirical"}, "data_loader gives no labels"),
        ([(cases.drawn(2, 3),) * 3], {}, "data_loader gave 3 things"),
        ([], {"checkpoint_period": 0}, "checkpoint_period is 0; allowed are ints >= 1"),
    ],
)
def test_bad_input(batches: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimated(batches, **options)
