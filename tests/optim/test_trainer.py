"""In transformers' Trainer, as it is."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fisherkern.optim import KFAC
from optim import cases, llama

pytest.importorskip("accelerate")
transformers = llama.transformers

OPTIONS: dict[str, Any] = {
    "lr": 0.3,
    "damping": 0.1,
    "kl_clip": 0.01,
    "factor_update_period": 2,
    "inverse_update_period": 3,
}


# the names that transformers has had all along, and now calls old
CHECKPOINTING: dict[str, Any] = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")


class Losses(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.found: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self.found.append(logs["loss"])


def sentences(count: int = 24) -> list[dict[str, Any]]:
    """Tokens that count up, which can be learnt."""
    g = cases.generator(0)
    rows = []
    for _ in range(count):
        start, length = (int(torch.randint(n, (), generator=g)) for n in (llama.VOCABULARY, 4))
        ids = torch.arange(start, start + 8) % llama.VOCABULARY
        mask = (torch.arange(8) < 8 - length).long()
        labels = ids.masked_fill(mask == 0, llama.IGNORE)
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return rows


def classes() -> list[dict[str, Any]]:
    """Whose class is that of the first token."""
    return [{**row, "labels": int(row["input_ids"][0]) % 3} for row in sentences()]


def trainer(
    model: nn.Module,
    data: list[dict[str, Any]],
    folder: Path,
    optimizer: KFAC,
    scheduler: Any = None,
    **arguments: Any,
) -> Any:
    settings = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 10,
            "per_device_train_batch_size": 12,
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "seed": 0,
            **arguments,
        }
    )
    callbacks = [losses := Losses()]
    made = transformers.Trainer(
        model,
        settings,
        train_dataset=data,
        eval_dataset=data[:6],
        optimizers=(optimizer, scheduler),
        callbacks=callbacks,
    )
    made.losses = losses.found
    return made


def models() -> dict[str, Any]:
    return {"llama": (llama.fresh_llama, sentences), "bert": (llama.fresh_bert, classes)}


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("arguments", [{}, {"bf16": True}], ids=str)
@pytest.mark.filterwarnings("ignore:bert.embeddings.position_embeddings")
def test_the_loss_falls(
    arguments: dict[str, Any], name: str, fisher_type: str, tmp_path: Path
) -> None:
    make, data = models()[name]
    model = make()
    optimizer = KFAC(model, fisher_type=fisher_type, **OPTIONS)
    made = trainer(model, data(), tmp_path, optimizer, **arguments)
    made.train()
    assert len(made.losses) == 10
    assert made.losses[-1] < 0.5 * made.losses[0]  # measured on a CPU: at most 0.2
    assert optimizer.preconditioner.steps == 10
    left = optimizer.fallback()
    if name == "bert" and fisher_type == "empirical":
        # called once for all samples: their gradients cannot be told apart
        assert set(left) == {"bert.embeddings.position_embeddings.weight"}
    else:
        assert not left


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_checkpointing_gives_the_same_steps(fisher_type: str, tmp_path: Path) -> None:
    """Activations are computed twice, and captured once."""
    found = []
    for arguments in ({}, CHECKPOINTING):
        model = llama.fresh_llama()
        optimizer = KFAC(model, fisher_type=fisher_type, **OPTIONS)
        trainer(model, sentences(), tmp_path, optimizer, max_steps=4, **arguments).train()
        found.append(model)
    cases.assert_close(found[1], found[0], 1e-5)


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_accumulation_is_one_batch(fisher_type: str, tmp_path: Path) -> None:
    """Of a model that is told the number of terms in all micro-batches."""
    found, counts = [], []
    for size, count in ((12, 1), (4, 3)):
        model = llama.fresh_llama()
        optimizer = KFAC(model, fisher_type=fisher_type, **OPTIONS)
        made = trainer(
            model,
            sentences(),
            tmp_path,
            optimizer,
            max_steps=3,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=count,
        )
        made.train()
        assert optimizer.preconditioner.steps == 3
        found.append(model)
        counts.append(cases.curvature(optimizer, "lm_head").G.count)
    torch.testing.assert_close(counts[1], counts[0])
    if fisher_type != "mc":  # whose labels are drawn in another order
        cases.assert_close(found[1], found[0], 1e-5)


@pytest.mark.parametrize(
    ("fisher_type", "options"),
    [
        ("mc", {}),
        ("mc", {"widest": 12, "stride": 2}),
        ("empirical", {"structure": "ekfac"}),
    ],
)
def test_a_checkpoint_is_gone_on_from(
    fisher_type: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """With the same bits, in the middle of a period; sampling goes on with Trainer's seeds."""
    found = []
    for start in (None, tmp_path / "checkpoint-4"):
        model = llama.fresh_llama(seed=0 if start is None else 1)
        optimizer = KFAC(model, fisher_type=fisher_type, **OPTIONS, **options)
        made = trainer(
            model,
            sentences(),
            tmp_path,
            optimizer,
            max_steps=7,
            save_strategy="steps",
            save_steps=4,
            lr_scheduler_type="cosine",
        )
        made.train(resume_from_checkpoint=None if start is None else str(start))
        assert optimizer.preconditioner.steps == 7
        found.append(model)
    cases.assert_close(found[1], found[0])


def test_a_scheduler_and_groups(tmp_path: Path) -> None:
    """Warm-up from a rate of zero, and weight decay of matrices alone, clipping as usual."""
    model = llama.fresh_llama()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = KFAC(model, groups, **OPTIONS)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(step / 3, 1.0))
    made = trainer(model, sentences(), tmp_path, optimizer, scheduler, max_grad_norm=0.5)
    made.train()
    assert made.losses[1] == pytest.approx(made.losses[0], rel=0.2)
    assert made.losses[-1] < 0.8 * made.losses[0]
    assert [g["lr"] for g in optimizer.param_groups] == [0.3, 0.3]


def test_an_evaluation_between_steps_changes_nothing(tmp_path: Path) -> None:
    found = []
    evaluated: tuple[dict[str, Any], ...] = ({}, {"eval_strategy": "steps", "eval_steps": 1})
    for arguments in evaluated:
        model = llama.fresh_llama()
        optimizer = KFAC(model, fisher_type="type-2", **OPTIONS)
        trainer(model, sentences(), tmp_path, optimizer, max_steps=4, **arguments).train()
        found.append(model)
    cases.assert_close(found[1], found[0])


def test_nothing_is_kept_of_the_graph(tmp_path: Path) -> None:
    """Neither activations nor logits outlive a step."""
    model = llama.fresh_llama()
    outputs = []
    model.lm_head.register_forward_hook(lambda *call: outputs.append(weakref.ref(call[2])))
    optimizer = KFAC(model, fisher_type="mc", widest=12, **OPTIONS)
    trainer(model, sentences(), tmp_path, optimizer, max_steps=2).train()
    gc.collect()
    assert [output() for output in outputs] == [None, None]
