"""KFAC finds masks and labels of transformers' models however they are called."""

from __future__ import annotations

import pytest
import torch

from conftest import DEVICE
from fisherkern.curvature import KroneckerCurvature
from fisherkern.optim import KFAC
from optim.llama import VOCABULARY, llama, tokens, transformers


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_arguments_by_position_are_those_by_name(fisher_type: str) -> None:
    batch = tokens()
    factors = []
    for given in ({}, {"input_ids": None, "attention_mask": None}):
        model, by_name = llama(), {name: x for name, x in batch.items() if name not in given}
        generator = torch.Generator(DEVICE).manual_seed(0) if fisher_type == "mc" else None
        optimizer = KFAC(model, fisher_type=fisher_type, generator=generator)
        model(*(batch[name] for name in given), **by_name).loss.backward()
        optimizer.preconditioner.step()
        layers = optimizer.preconditioner.capture.layers.items()
        kept = {name: x for name, x in layers if isinstance(x, KroneckerCurvature)}
        factors.append({name: x.factors() for name, x in kept.items()})
    by_name, by_position = factors
    assert len(by_name) > 5
    for name, expected in by_name.items():
        for a, b in zip(by_position[name], expected, strict=True):
            assert torch.equal(a, b)


def test_padding_of_an_encoder_is_refused() -> None:
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=12,
        decoder_ffn_dim=12,
        max_position_embeddings=16,
    )
    model = transformers.BartForConditionalGeneration(config).to(DEVICE).train()
    optimizer = KFAC(model)
    with pytest.raises(ValueError, match="attention_mask has padding, and model is a BartFor"):
        model(**tokens())
    assert not optimizer.preconditioner.capture.called
