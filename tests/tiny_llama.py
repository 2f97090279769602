"""The configuration of a Llama of a few numbers, for tests that need a real language model."""

from __future__ import annotations

from typing import Any

import pytest

transformers = pytest.importorskip("transformers")


def config(**changes: Any) -> Any:
    """Of one layer, with every kind of module that a large one has."""
    sizes = {
        "vocab_size": 13,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "tie_word_embeddings": False,
        "attn_implementation": "eager",
    }
    return transformers.LlamaConfig(**{**sizes, **changes})
