"""What bench/training.py trains: a small GPT from scratch, and SmolLM2-135M, both on WikiText-2."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherkern.demo import assets
from fisherkern.demo import model as models


@dataclass(frozen=True)
class Problem:
    """A model, its data, and what is tried with each optimizer."""

    title: str
    unit: str
    """That the loss is per."""
    model: Callable[[], nn.Module]
    """With the weights that training starts from."""
    loss: Callable[[nn.Module, Tensor], Tensor]
    """Mean over the predicted tokens of windows [B, S + 1]."""
    text: Tensor
    """Tokens to cut windows from."""
    held_out: Tensor
    """Windows [W, S + 1]."""
    batch: int
    steps: int
    """Of AdamW, unless the command says otherwise."""
    options: dict[str, dict[str, Any]]
    """Of each optimizer, in all its runs."""
    trials: dict[str, tuple[dict[str, Any], ...]]
    """What is added to them in turn, as many for each."""
    share: float
    """Of the steps of AdamW, what the others take, unless the command says otherwise."""
    warm_up: float
    """Of its steps, the share over which the rate of each optimizer rises."""
    damping: Callable[[float], float] | None = None
    """λ of K-FAC by the share of its steps that are done; None: that of the options."""

    @property
    def length(self) -> int:
        """Predicted tokens of a window."""
        return self.held_out.shape[1] - 1

    def windows(self, generator: torch.Generator) -> Tensor:
        """A batch, drawn from the text."""
        starts = len(self.text) - self.length - 1
        first = torch.randint(starts, (self.batch, 1), generator=generator)
        return self.text[first + torch.arange(self.length + 1)].long()


# What bench/training.py knows beside KFAC and AdamW: this entry among the options of AdamW.
NATURAL = "KFACPreconditioner + AdamW"


def gpt() -> Problem:
    """Four layers over bytes: 8192 of them in a step."""
    adam = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    rates = tuple({"lr": lr} for lr in (2e-3, 3e-3, 6e-3))
    fresh = {"ema_decay": 0.7, "factor_update_period": 10, "inverse_update_period": 10}
    text, held_out = (_raw(asset) for asset in (assets.TRAINING_TEXT, assets.TEXT))
    return Problem(
        title="GPT of 4 layers of 128, from scratch",
        unit="byte",
        model=GPT,
        loss=lambda model, windows: functional.cross_entropy(
            model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()
        ),
        text=torch.frombuffer(bytearray(text), dtype=torch.uint8),
        held_out=_spread(torch.frombuffer(bytearray(held_out), dtype=torch.uint8), 64, 128),
        batch=64,
        steps=400,
        share=0.6,
        warm_up=0.2,
        options={
            "AdamW": adam,
            "KFAC": {"lr": 0.3, "momentum": 0.5, **fresh},
            NATURAL: {**adam, "preconditioner": {"kl_clip": None, **fresh}},
        },
        trials={
            "AdamW": rates,
            "KFAC": tuple({"kl_clip": bound} for bound in (3e-4, 1e-3, 3e-3)),
            NATURAL: rates,
        },
        # curvature of fresh weights holds for a short way only
        damping=lambda done: 3e-2 * 1e-2 ** min(1.0, 2 * done),
    )


def smollm2() -> Problem:
    """The model of the demo, trained further: 1024 tokens in a step."""
    language = models.load(None)
    texts = [_raw(asset).decode() for asset in (assets.TRAINING_TEXT, assets.TEXT)]
    # of the training text as much as a run of some dozen steps can see
    text, held_out = (
        torch.tensor(language.tokenizer(text[: 1 << 20], verbose=False).input_ids) for text in texts
    )
    weights = {name: value.clone() for name, value in language.model.state_dict().items()}

    def model() -> nn.Module:
        language.model.load_state_dict(weights)
        language.model.zero_grad(set_to_none=True)
        return language.model.train()

    adam = {"betas": (0.9, 0.99), "weight_decay": 0.0}
    rates = tuple({"lr": lr} for lr in (1e-4, 2e-4, 4e-4))
    rarely = {"damping": 1e-2, "factor_update_period": 10, "inverse_update_period": 100}
    return Problem(
        title="SmolLM2-135M, trained further",
        unit="token",
        model=model,
        loss=lambda model, windows: model(input_ids=windows, labels=windows, use_cache=False).loss,
        text=text,
        held_out=_spread(held_out, 6, 256),
        batch=4,
        steps=12,
        share=0.6,
        warm_up=0.1,
        options={
            "AdamW": adam,
            "KFAC": {"lr": 1.0, "momentum": 0.5, "adam_lr": 1e-4, **rarely},
            NATURAL: {**adam, "preconditioner": {"kl_clip": None, **rarely}},
        },
        trials={
            "AdamW": rates,
            "KFAC": tuple({"kl_clip": bound} for bound in (3e-3, 1e-2, 3e-2)),
            NATURAL: rates,
        },
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {"gpt": gpt, "smollm2": smollm2}


def _raw(asset: assets.Asset) -> bytes:
    return gzip.decompress(assets.fetch(asset).read_bytes())


def _spread(tokens: Tensor, count: int, length: int) -> Tensor:
    """Windows from all over a text."""
    step = len(tokens) // count
    return torch.stack([tokens[i * step :][: length + 1] for i in range(count)]).long()


class Block(nn.Module):
    """Attention and a perceptron, each after a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, d]."""
        B, S, d = x.shape
        parts = self.qkv(self.norm1(x)).view(B, S, 3, self.heads, d // self.heads)
        q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(B, S, d))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Bytes to logits of the byte that follows."""

    def __init__(
        self, width: int = 128, layers: int = 4, heads: int = 4, context: int = 128
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                scale = (2 * layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1
                nn.init.normal_(p, std=0.02 * scale)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, S] to [B, S, 256]."""
        place = torch.arange(tokens.shape[1]).expand_as(tokens)
        x = self.embedding(tokens) + self.position(place)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
