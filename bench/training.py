"""K-FAC against AdamW: a small GPT from scratch on the bytes of WikiText-2, each at its best rate.

``python -m fisherkern.bench.training --output FOLDER`` gives both as many trials of learning rates
(seed 0, chosen by the held-out loss at the end), then trains with several seeds at the best one,
and writes JSON, Markdown and a plot of the loss against steps and against time. Both have the same
warm-up and cosine decay. Time is that of steps alone, on this machine, one run after another.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from fisherkern.bench import results
from fisherkern.demo import assets
from fisherkern.optim import KFAC

CONTEXT, BATCH = 128, 16
HELD_OUT = 64  # windows that the loss is measured on
RATES = {"AdamW": (5e-4, 1e-3, 2e-3), "KFAC": (0.1, 0.3, 1.0)}
OPTIONS: dict[str, Any] = {
    "momentum": 0.5,
    "damping": 3e-2,
    "kl_clip": 3e-2,
    "factor_update_period": 10,
    "inverse_update_period": 100,
    "adam_lr": 2e-3,
}


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

    def __init__(self, width: int = 192, layers: int = 4, heads: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.position = nn.Embedding(CONTEXT, width)
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


@dataclass
class Run:
    """One training."""

    optimizer: str
    rate: float
    seed: int
    steps: list[int] = field(default_factory=list)
    """At which the loss was measured."""
    losses: list[float] = field(default_factory=list)
    """Held out, nats per byte."""
    seconds: list[float] = field(default_factory=list)
    """Of training until then."""


def _bytes(asset: assets.Asset) -> Tensor:
    raw = gzip.decompress(assets.fetch(asset).read_bytes())
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8)


def _make(name: str, model: nn.Module, rate: float) -> Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    generator = torch.Generator().manual_seed(0)
    return KFAC(model, lr=rate, generator=generator, **OPTIONS)


def _schedule(steps: int) -> Callable[[int], float]:
    warm = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor


def train(name: str, rate: float, seed: int, steps: int, data: Tensor, held_out: Tensor) -> Run:
    """One training from fresh weights; batches depend on the seed alone."""
    torch.manual_seed(seed)
    model, run = GPT(), Run(name, rate, seed)
    optimizer = _make(name, model, rate)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(steps))
    batches = torch.Generator().manual_seed(seed)
    spent = 0.0
    for step in range(steps):
        began = time.perf_counter()
        start = torch.randint(len(data) - CONTEXT - 1, (BATCH, 1), generator=batches)
        window = data[start + torch.arange(CONTEXT + 1)].long()
        optimizer.zero_grad()
        logits = model(window[:, :-1])
        functional.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten()).backward()
        optimizer.step()
        scheduler.step()
        spent += time.perf_counter() - began
        if (step + 1) % max(1, steps // 20) == 0 or step + 1 == steps:
            run.steps.append(step + 1)
            run.losses.append(_loss(model, held_out))
            run.seconds.append(spent)
            if not math.isfinite(run.losses[-1]):
                break
    return run


@torch.no_grad()
def _loss(model: nn.Module, windows: Tensor) -> float:
    model.eval()
    logits = model(windows[:, :-1])
    model.train()
    return float(functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()))


def measure(steps: int, seeds: int, data: Tensor, held_out: Tensor) -> list[Run]:
    """All trials, then all seeds at the best rate; printed as they come."""
    runs = []
    for name, rates in RATES.items():
        trials = [train(name, rate, 0, steps, data, held_out) for rate in rates]
        for trial in trials:
            print(f"{name} rate {trial.rate:g}: {trial.losses[-1]:.4f}", flush=True)
        best = min(trials, key=lambda r: r.losses[-1] if math.isfinite(r.losses[-1]) else math.inf)
        runs += trials
        for seed in range(1, seeds + 1):
            runs.append(train(name, best.rate, seed, steps, data, held_out))
            last = runs[-1]
            print(
                f"{name} seed {seed}: {last.losses[-1]:.4f} in {last.seconds[-1]:.0f} s", flush=True
            )
    return runs


def table(runs: list[Run]) -> str:
    """Markdown: per seed, the final losses and when K-FAC reached that of AdamW."""
    by = {(r.optimizer, r.seed): r for r in runs if r.seed}
    seeds = sorted({seed for _, seed in by})
    lines = [
        "| seed | AdamW | KFAC | steps to AdamW's loss | time to it | time of a step |",
        "|---|---|---|---|---|---|",
    ]
    for seed in seeds:
        adam, kfac = by["AdamW", seed], by["KFAC", seed]
        reached = [i for i, loss in enumerate(kfac.losses) if loss <= adam.losses[-1]]
        when = seconds = "never"
        if reached:
            when = f"{kfac.steps[reached[0]] / adam.steps[-1]:.2f}"
            seconds = f"{kfac.seconds[reached[0]] / adam.seconds[-1]:.2f}"
        cost = (kfac.seconds[-1] / kfac.steps[-1]) / (adam.seconds[-1] / adam.steps[-1])
        lines.append(
            f"| {seed} | {adam.losses[-1]:.4f} | {kfac.losses[-1]:.4f} | {when} | {seconds} | "
            f"{cost:.2f} |"
        )
    return "\n".join(lines) + "\n\nNats per byte, held out; the last three are ratios to AdamW."


def plot(runs: list[Run], path: Path) -> None:
    """Loss against steps and against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    colours = {"AdamW": "tab:grey", "KFAC": "tab:blue"}
    for run in (r for r in runs if r.seed):
        label = run.optimizer if run.seed == 1 else None
        for axis, x in zip(axes, (run.steps, run.seconds), strict=True):
            axis.plot(x, run.losses, color=colours[run.optimizer], label=label)
    axes[0].set(xlabel="steps", ylabel="held-out loss, nats per byte")
    axes[1].set(xlabel="seconds")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(prog="python -m fisherkern.bench.training")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder")
    arguments = parser.parse_args()
    data, held = _bytes(assets.TRAINING_TEXT), _bytes(assets.TEXT)
    step = len(held) // HELD_OUT
    held_out = torch.stack([held[i * step :][: CONTEXT + 1] for i in range(HELD_OUT)]).long()
    runs = measure(arguments.steps, arguments.seeds, data, held_out)
    text = table(runs)
    print(text)
    finals = [
        statistics.median(r.losses[-1] for r in runs if r.seed and r.optimizer == n) for n in RATES
    ]
    print(f"median final loss: AdamW {finals[0]:.4f}, KFAC {finals[1]:.4f}")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        whole = {
            "environment": results.environment("cpu"),
            "options": OPTIONS,
            "tokens_per_step": BATCH * CONTEXT,
            "runs": [asdict(run) for run in runs],
        }
        (arguments.output / "training.json").write_text(json.dumps(whole, indent=1, default=str))
        (arguments.output / "report.md").write_text(text + "\n")
        plot(runs, arguments.output / "training.png")


if __name__ == "__main__":
    main()
