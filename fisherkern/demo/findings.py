"""What the Fisher of the predictions says about a text: uncertain, sure and wrong places.

Position t of a window predicts its token t + 1, so a window of T tokens has T − 1 predictions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import fisherkern
from fisherkern.demo.text import Windows

# Predictions with fewer tokens of context than this are uncertain for lack of it, and not listed.
LEAST_CONTEXT = 8
# Listed predictions are at least this many tokens apart.
_APART = 4


@dataclass(frozen=True)
class Findings:
    """Facts about every prediction, each a tensor [W, T − 1], and the logits they came from."""

    windows: Windows
    logits: Tensor
    """[W, T, V]."""
    trace: Tensor
    """tr F = Σ p (1 − p): 0 for a sure prediction, towards 1 for a spread out one."""
    entropy: Tensor
    """In nats."""
    surprise: Tensor
    """−log p of the token that came, in nats."""
    hit: Tensor
    """Whether the most likely token came."""
    mean_probs: Tensor
    """D̄ [V], the mean of p over all predictions."""

    @property
    def perplexity(self) -> float:
        """The exponential of the mean surprise."""
        return self.surprise.mean().exp().item()


@dataclass(frozen=True)
class Place:
    """One prediction in the text, ready to print."""

    trace: float
    entropy: float
    before: str
    came: str
    after: str
    came_probability: float
    expected: list[tuple[str, float]]


@torch.no_grad()
def find(windows: Windows, logits: Tensor) -> Findings:
    """Compute the facts from logits [W, T, V] with our ops."""
    predictions, following = logits[:, :-1], windows.tokens[:, 1:]
    stats = fisherkern.softmax_fisher_stats(predictions)
    chosen = predictions.gather(-1, following[..., None])[..., 0]
    return Findings(
        windows=windows,
        logits=logits,
        trace=stats.trace,
        entropy=stats.entropy,
        surprise=stats.logsumexp - chosen,
        hit=predictions.argmax(-1) == following,
        mean_probs=fisherkern.softmax_fisher_mean_probs(predictions),
    )


def most_uncertain(findings: Findings, count: int) -> list[tuple[int, int]]:
    """(window, position) of the largest traces."""
    return _first(findings, -findings.trace, torch.ones_like(findings.hit), count)


def surest(findings: Findings, count: int) -> list[tuple[int, int]]:
    """(window, position) of the smallest traces among those that came true."""
    return _first(findings, findings.trace, findings.hit, count)


def sure_but_wrong(findings: Findings, count: int) -> list[tuple[int, int]]:
    """(window, position) of the smallest traces below ½ where another token came."""
    return _first(findings, findings.trace, ~findings.hit & (findings.trace < 0.5), count)


def _first(findings: Findings, key: Tensor, allowed: Tensor, count: int) -> list[tuple[int, int]]:
    """The first `count` allowed predictions by ascending key, spaced and with enough context."""
    positions = findings.trace.shape[-1]
    least = LEAST_CONTEXT if positions > 2 * LEAST_CONTEXT else 0
    chosen: list[tuple[int, int]] = []
    for index in key.flatten().argsort(stable=True).tolist():
        window, t = divmod(index, positions)
        near = any(w == window and abs(t - u) < _APART for w, u in chosen)
        if len(chosen) == count:
            break
        # the first of several tokens that make up one character has no text of its own
        shown = bool(findings.windows.pieces[window][t + 1])
        if t >= least and shown and allowed[window, t] and not near:
            chosen.append((window, t))
    return chosen


def place(findings: Findings, window: int, position: int, tokenizer: Any, width: int = 92) -> Place:
    """The prediction at a position: its context in `width` characters and its best candidates."""
    pieces = findings.windows.pieces[window]
    came = pieces[position + 1]
    before, after = around(pieces, position + 1, width)
    z = findings.logits[window, position]
    best = z.topk(min(3, z.numel()))
    normaliser = z.logsumexp(-1)
    candidates = zip(best.indices.tolist(), (best.values - normaliser).exp().tolist(), strict=True)
    return Place(
        trace=findings.trace[window, position].item(),
        entropy=findings.entropy[window, position].item(),
        before=before,
        came=visible(came),
        after=after,
        came_probability=findings.surprise[window, position].neg().exp().item(),
        expected=[(visible(tokenizer.decode([token])), p) for token, p in candidates],
    )


def around(pieces: list[str], index: int, width: int) -> tuple[str, str]:
    """Whole words before and after a piece, two thirds and the rest of `width` characters."""
    room = max(0, width - len(visible(pieces[index])))
    before = visible("".join(pieces[:index]))
    after = visible("".join(pieces[index + 1 :]))
    right = after[: room // 3]
    if len(right) < len(after):
        right = right[: right.rfind(" ") + 1 or len(right)] + "…"
    left = before[max(0, len(before) - room + room // 3) :]
    if len(left) < len(before):
        left = "…" + left[max(0, left.find(" ")) :]
    return left, right


def visible(piece: str) -> str:
    """A piece of text with its line breaks and broken characters made visible."""
    return piece.replace("\r", "").replace("\n", "↵").replace("\t", " ").replace("\ufffd", "·")
