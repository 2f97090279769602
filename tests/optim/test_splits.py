"""A step is the same however its batch is split into micro-batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from fisherkern.optim import KFAC
from optim import cases, llama
from optim.cases import Images, Tokens, assert_close, batch_of, filled

WHOLE = (6,)
SPLITS = [(2, 4), (1, 3, 2)]
STEPS = 3
# sums of a few hundred products, through the inverses of three steps whose damped factors have
# condition numbers below 100
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
OPTIONS: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "inverse_update_period": 2}

# of (model, step, split, tell), where tell(share) is called before every forward pass
Steps = Callable[[Any, int, tuple[int, ...], Callable[[float], None]], None]


def slices(split: tuple[int, ...]) -> list[slice]:
    ends = list(itertools.accumulate(split))
    return [slice(end - size, end) for end, size in zip(ends, split, strict=True)]


def plain(model: nn.Module, step: int, split: tuple[int, ...], tell: Any) -> None:
    x, y = batch_of(model, step)
    for rows in slices(split):
        share = len(y[rows]) / len(y)
        tell(share)
        (cases.loss_of(model, x[rows], y[rows]) * share).backward()


def padded(model: nn.Module, step: int, split: tuple[int, ...], tell: Any) -> None:
    """A mask that the model is given, and a loss over what it lets through."""
    x, y = batch_of(model, step)
    mask = torch.rand(x.shape, generator=cases.generator(step)).to(x.device) > 0.4
    mask[:, 0] = True
    for rows in slices(split):
        share = int(mask[rows].sum()) / int(mask.sum())
        tell(share)
        logits = model(x[rows], attention_mask=mask[rows])
        (functional.cross_entropy(logits[mask[rows]], y[rows][mask[rows]]) * share).backward()


def of_llama(
    model: Any, step: int, split: tuple[int, ...], tell: Any, trimmed: bool = False
) -> None:
    """The loss that the model computes itself from labels."""
    batch = llama.tokens(step)
    whole = llama.terms(batch["labels"])
    for rows in slices(split):
        part = llama.part(batch, rows, trimmed)
        share = llama.terms(part["labels"]) / whole
        tell(share)
        (model(**part).loss * share).backward()


def trimmed_llama(model: Any, step: int, split: tuple[int, ...], tell: Any) -> None:
    """Micro-batches padded to lengths of their own."""
    of_llama(model, step, split, tell, trimmed=True)


def trainer_llama(model: Any, step: int, split: tuple[int, ...], tell: Any) -> None:
    """As Trainer does: the model divides by the number of terms of all micro-batches."""
    batch = llama.tokens(step)
    whole = torch.tensor(llama.terms(batch["labels"]))
    for rows in slices(split):
        model(**llama.part(batch, rows, True), num_items_in_batch=whole).loss.backward()


def trained(model: Any, steps: Steps, split: tuple[int, ...], **options: Any) -> KFAC:
    share = [1.0]
    if options["fisher_type"] == "empirical":
        options["loss_scale"] = lambda: share[0]
    optimizer = KFAC(model, **{**OPTIONS, **options})
    for step in range(STEPS):
        optimizer.zero_grad()
        steps(model, step, split, lambda value: share.__setitem__(0, value))
        optimizer.step()
    return optimizer


def check(
    make: Callable[[], Any],
    steps: Steps,
    splits: Sequence[tuple[int, ...]] = SPLITS,
    **options: Any,
) -> None:
    whole = make()
    start = cases.parameters(whole)
    reference = trained(whole, steps, WHOLE, **options)
    assert not reference.fallback()
    for name, value in cases.parameters(whole).items():
        assert not torch.equal(value, start[name]), name
    for split in splits:
        model = make()
        other = trained(model, steps, split, **options)
        assert_close(model, whole, TOLERANCE[next(model.parameters()).dtype])
        for name, layer in reference.preconditioner.capture.layers.items():
            averages = other.preconditioner.capture.layers[name].averages
            for key, average in layer.averages.items():
                torch.testing.assert_close(averages[key].count, average.count)


def tokens_of_float64() -> Any:
    return filled(Tokens(), torch.float64)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block"])
def test_structures(structure: str, fisher_type: str) -> None:
    check(tokens_of_float64, plain, structure=structure, fisher_type=fisher_type)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("structure", ["kfac", "diagonal", "block"])
def test_convolutions(structure: str, fisher_type: str) -> None:
    """Without "ekfac": A has a null space here, of which rounding chooses the basis."""

    def make() -> Any:
        return filled(Images(), torch.float64)

    check(make, plain, structure=structure, fisher_type=fisher_type)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize(
    "options",
    [
        {"kfac_approx": "reduce"},
        {"inverse": "inverse-free"},
        {"damping_mode": "exact", "factor_update_period": 2},
        {"structure": "ekfac"},
        {"widest": 4, "stride": 1},
    ],
    ids=str,
)
def test_padding(options: dict[str, Any], fisher_type: str) -> None:
    check(tokens_of_float64, padded, fisher_type=fisher_type, **options)


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("steps", [of_llama, trimmed_llama, trainer_llama])
def test_llama(steps: Steps, fisher_type: str) -> None:
    check(llama.llama, steps, SPLITS[1:], fisher_type=fisher_type)


@pytest.mark.parametrize(("fisher_type", "stride"), [("type-2", 2), ("empirical", 1)])
def test_llama_with_a_wide_head(fisher_type: str, stride: int) -> None:
    options = {"fisher_type": fisher_type, "widest": 12, "stride": stride}
    check(llama.llama, trimmed_llama, SPLITS[1:], **options)


@pytest.mark.parametrize("scale", [2.0**-10, 2.0**10])
def test_a_scaled_loss(scale: float) -> None:
    """The curvature is that of the loss; the gradients are unscaled before the step."""
    model, twin = filled(Tokens()), filled(Tokens())
    scaled = KFAC(model, fisher_type="empirical", loss_scale=lambda: scale, **OPTIONS)
    plain_one = KFAC(twin, fisher_type="empirical", **OPTIONS)
    for step in range(STEPS):
        scaled.zero_grad()
        (cases.loss_of(model, *batch_of(model, step)) * scale).backward()
        for p in model.parameters():
            p.grad /= scale
        scaled.step()
        cases.train(twin, plain_one, range(step, step + 1))
    assert_close(model, twin)
