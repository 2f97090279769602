"""The smallest models of transformers that have every kind of their layers."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_llama
import torch
from torch import Tensor

from conftest import DEVICE
from optim.cases import filled, generator

transformers = pytest.importorskip("transformers")
IGNORE = -100
VOCABULARY = 13


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A language model with weights of its own, so that no two layers are alike."""
    config = tiny_llama.config(vocab_size=VOCABULARY, **changes)
    return filled(transformers.LlamaForCausalLM(config), dtype).train()


def fresh_llama(seed: int = 0) -> Any:
    """One to be trained, on the CPU."""
    torch.manual_seed(seed)
    config = llama(initializer_range=0.2).config
    return transformers.LlamaForCausalLM(config).train()


def fresh_bert(seed: int = 0) -> Any:
    """A classifier to be trained, on the CPU."""
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=3,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config).train()


def tokens(seed: int = 0, size: int = 6, length: int = 9) -> dict[str, Tensor]:
    """A batch padded on the right; prompts have no labels."""
    g = generator(200 + seed)
    ids = torch.randint(VOCABULARY, (size, length), generator=g)
    lengths = torch.randint(4, length + 1, (size, 1), generator=g)
    mask = torch.arange(length) < lengths
    labels = ids.masked_fill(~mask, IGNORE)
    labels[:, 0] = IGNORE
    labels[0, :3] = IGNORE
    batch = {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}
    return {name: value.to(DEVICE) for name, value in batch.items()}


def terms(labels: Tensor) -> int:
    """Of the loss of a causal model."""
    return int((labels[:, 1:] != IGNORE).sum())


def part(batch: dict[str, Tensor], rows: slice, trimmed: bool = False) -> dict[str, Tensor]:
    """Some samples, and no more positions than they have."""
    chosen = {name: value[rows] for name, value in batch.items()}
    longest = int(chosen["attention_mask"].sum(1).max()) if trimmed else None
    return {name: value[:, :longest] for name, value in chosen.items()}
