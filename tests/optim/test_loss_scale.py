"""What the loss of a model of transformers is multiplied by is known from its own gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fisherkern.optim import KFAC
from optim import cases, llama


def truth(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """G of the head: the mean of (p − e_y)(p − e_y)ᵀ over the terms of the loss."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    kept = labels != llama.IGNORE
    p = logits[:, :-1][kept].softmax(-1)
    gradients = p - functional.one_hot(labels[kept], p.shape[1])
    return gradients.mT @ gradients / len(gradients)


def as_trainer_on_two_ranks(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Which share the count of both, and multiply by their number, in place."""
    whole = torch.tensor(2 * llama.terms(batch["labels"]) + 3)
    loss = model(**batch, num_items_in_batch=whole).loss
    loss *= 2
    return loss


def of_a_tuple(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch, return_dict=False)[0] * 2.0**12


def one_of_three_micro_batches(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).loss / 3


def from_logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The model returns a loss, but it is not the one that is differentiated."""
    logits = model(**batch).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()) * 0.25


@pytest.mark.parametrize(
    ("loss_of", "told"),
    [
        (as_trainer_on_two_ranks, 1.0),
        (of_a_tuple, 1.0),
        (one_of_three_micro_batches, 1.0),
        (one_of_three_micro_batches, 1 / 3),
        (from_logits, 0.25),
    ],
)
def test_what_a_loss_is_multiplied_by(loss_of: Any, told: float) -> None:
    model, batch = llama.llama(torch.float64), llama.tokens()
    expected = truth(model, batch)
    optimizer = KFAC(model, fisher_type="empirical", loss_scale=lambda: told)
    loss_of(model, batch).backward()
    optimizer.step()
    G = cases.curvature(optimizer, "lm_head").G
    # transformers computes its loss in float32
    assert cases.error(G.factor(), expected) < 1e-6
