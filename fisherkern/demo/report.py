"""The demo's printed report: the side by side table, and the findings about the text."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from fisherkern.demo import findings as fact
from fisherkern.demo.comparisons import ERROR_STRIDE, Row
from fisherkern.demo.factors import DECAY, Factors
from fisherkern.demo.factors import ERROR_STRIDE as FACTOR_STRIDE
from fisherkern.demo.findings import Findings, Place
from fisherkern.demo.head import ERROR_TOKENS, HeadFindings
from fisherkern.demo.measure import memory_method
from fisherkern.demo.natural import NaturalGradients
from fisherkern.demo.spectra import Spectra, Spectrum
from fisherkern.demo.training import Training

_MIB = 2**20


def table(rows: list[Row], what: str = "op") -> str:
    """Time, peak extra memory and errors of both implementations, one row per op or `what`."""
    heads = (
        f"{'':21}|{'time, ms':^27}|{'extra memory, MiB':^22}|{'relative error':^20}"
        f"|{'largest error':^20}\n"
        f"{what:21}|{'ours':>8}{'PyTorch':>9}{'ratio':>9} |{'ours':>10}{'PyTorch':>11} "
        f"|{'ours':>9}{'PyTorch':>10} |{'ours':>9}{'PyTorch':>10} "
    )
    rule = "+".join("-" * n for n in (21, 27, 22, 20, 20))
    return "\n".join([heads, rule, *map(_table_row, rows)])


def _table_row(row: Row) -> str:
    ours, plain = row.ours, row.plain
    return (
        f"{row.name:21}"
        f"|{ours.seconds * 1e3:8.1f}{plain.seconds * 1e3:9.1f}"
        f"{plain.seconds / ours.seconds:8.2f}x "
        f"|{ours.extra_bytes / _MIB:10.1f}{plain.extra_bytes / _MIB:11.1f} "
        f"|{ours.relative_error:9.1e}{plain.relative_error:10.1e} "
        f"|{ours.largest_error:9.1e}{plain.largest_error:10.1e} "
    )


def table_notes(tokens: int, classes: int) -> str:
    """What the figures of the table are."""
    size = tokens * classes * 4 / _MIB
    return (
        f"logits [{tokens}, {classes}] float32 = {size:.0f} MiB. Time: median, alternating, warm. "
        f"Memory:\n{memory_method()}. Errors: against float64,\non every {ERROR_STRIDE}th token. "
        "Ours for the entropy computes all five statistics of softmax_fisher_stats."
    )


def factor_notes(factors: Factors) -> str:
    """What the figures of the table of factors are."""
    widths = ", ".join(map(str, factors.widths))
    windows = "1 window" if factors.windows == 1 else f"{factors.windows} windows"
    some = any(count < factors.layers for count in factors.measured)
    return (
        f"A = mean of a aᵀ over the inputs a of a layer, {factors.tokens} tokens in {windows} "
        f"averaged with ema_decay {DECAY}.\n{factors.layers} linear layers ran, of input width "
        f"{widths}; "
        + ("measured on some, evenly spread: all take too long here" if some else "measured on all")
        + ".\nTime: summed over layers. Memory, errors: the largest of a layer. Errors: against "
        f"float64 from the same inputs, on\nevery {FACTOR_STRIDE}th row; relative in norm, and of "
        "one entry beside √(Aᵢᵢ Aⱼⱼ). PyTorch: β A + (1 − β) x.t() @ (x / N), then\nsymmetrised; "
        "with x.float() first, its bfloat16 row would have the error of the float32 row."
    )


def natural_gradients(found: NaturalGradients) -> str:
    """What the two directions took, and how they lie."""
    lines = [
        "| curvature | time | extra memory | residual | cosine with the gradient |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {d.name} | {d.seconds * 1e3:.0f} ms | {d.extra_bytes / 2**20:.0f} MiB | "
        f"{d.residual:.1e} | {d.along_gradient:+.3f} |"
        for d in found.directions
    ]
    dense = found.classes**2 * 4 / 1e9
    lines += [
        "",
        f"The cosine between the two directions is {found.cosine:+.3f}. G has {found.classes} x "
        f"{found.classes} elements, {dense:.1f} GB if it were written down, and is a diagonal and "
        f"one vector for each of {found.tokens} tokens. Memory includes the direction, "
        f"{found.classes * found.width * 4 / 2**20:.0f} MiB.",
    ]
    return "\n".join(lines)


def head(found: HeadFindings) -> str:
    """What the figures of the table of the head are, and the exact Fisher of one hidden state."""
    sizes = (
        f"{n * found.width * 4 / _MIB:.0f} MiB for {what}"
        for n, what in ((found.classes, "W and the diagonal of it"), (found.width, "the Fisher"))
    )
    logits = found.tokens * found.classes * 4 / _MIB
    j = found.jacobian
    return (
        f"h [{found.tokens}, {found.width}] and W [{found.classes}, {found.width}]: logits would "
        f"be {logits:.0f} MiB; {', '.join(sizes)}.\nErrors: against float64, on about "
        f"{ERROR_TOKENS} tokens.\nThe Fisher of one hidden state from the jacobian of "
        f"{found.classes} log-probabilities by autograd: {j.seconds:.1f} s, error {j.error:.1e}.\n"
        f"Ours: {j.our_seconds * 1e3:.0f} ms ({j.seconds / j.our_seconds:.0f} times less), error "
        f"{j.our_error:.1e}"
    )


def training(found: Training) -> str:
    """The loss before and after, and what the steps took."""
    lines = ["| optimizer | loss before | loss after | time |", "|---|---|---|---|"]
    lines += [
        f"| {run.name} | {found.before:.4f} | {run.after:.4f} | {run.seconds:.1f} s |"
        for run in found.runs
    ]
    lines += [
        "",
        f"Nats per token, on {found.held_out} tokens that were not trained on. Steps of so few "
        "tokens are the dear case for K-FAC: what its inverses cost does not depend on their "
        "number.",
    ]
    return "\n".join(lines)


def spectra(found: Spectra) -> str:
    """The most and the least even factor, and the layer in the middle."""
    if found.most_uneven is None or found.most_even is None:
        return "no layer had inputs other than zero"
    middle = statistics.median(found.fractions)
    return (
        f"effective directions (tr A)² / ‖A‖²: {_percent(middle)} of the width in the median "
        "layer\n"
        f"fewest: {_spectrum_line(found.most_uneven)}\n"
        f"most: {_spectrum_line(found.most_even)}"
    )


def _spectrum_line(spectrum: Spectrum) -> str:
    largest = spectrum.largest()
    index, share = spectrum.coordinate()
    eigenvalue = "" if largest is None else f"its largest eigenvalue {_percent(largest)} and "
    return (
        f"{spectrum.name}, {spectrum.effective:.1f} of {spectrum.width}; {eigenvalue}"
        f"its coordinate {index} {_percent(share)} of the trace"
    )


def summary(facts: Findings) -> str:
    """The text as a whole."""
    trace = facts.trace
    sure = (trace < 0.1).float().mean().item()
    open_ = (trace > 0.9).float().mean().item()
    hits = facts.hit.float().mean().item()
    return (
        f"{trace.numel()} predictions: mean trace {trace.mean().item():.3f}, mean entropy "
        f"{facts.entropy.mean().item():.2f} nats, perplexity {facts.perplexity:.1f}\n"
        f"{sure:.0%} are sure (trace < 0.1), {open_:.0%} wide open (trace > 0.9), {hits:.0%} "
        "came true"
    )


def expected_words(facts: Findings, tokenizer: Any, count: int = 6) -> str:
    """The largest entries of D̄ beside how often those tokens came."""
    came = facts.windows.tokens[:, 1:].flatten()
    counts = torch.bincount(came, minlength=facts.mean_probs.numel()) / came.numel()
    best = facts.mean_probs.topk(min(count, facts.mean_probs.numel())).indices.tolist()
    words = (
        f"{_quoted(fact.visible(tokenizer.decode([i])))} {_percent(facts.mean_probs[i].item())} "
        f"({_percent(counts[i].item())})"
        for i in best
    )
    return "expected most on average, by D̄ (and how often it came): " + ", ".join(words)


def places(facts: Findings, tokenizer: Any, count: int) -> str:
    """The most uncertain tokens in context, the surest, and the sure but wrong."""
    few = (count + 1) // 2
    sections = (
        ("Most uncertain: largest trace", fact.most_uncertain(facts, count)),
        ("Surest, and right: smallest trace", fact.surest(facts, few)),
        ("Sure, but something else came", fact.sure_but_wrong(facts, few)),
    )
    return "\n\n".join(
        "\n".join([title, "", *_listed(facts, chosen, tokenizer)]) for title, chosen in sections
    )


def _listed(facts: Findings, chosen: list[tuple[int, int]], tokenizer: Any) -> list[str]:
    if not chosen:
        return ["  none in this text"]
    return [
        _place_lines(number, fact.place(facts, window, position, tokenizer))
        for number, (window, position) in enumerate(chosen, 1)
    ]


def _place_lines(number: int, spot: Place) -> str:
    """Three lines: the figures, the token between ⟦ ⟧ in its context, and what was expected."""
    expected = ", ".join(f"{_quoted(token)} {_percent(p)}" for token, p in spot.expected)
    return (
        f" {number}. trace {_figure(spot.trace)}, entropy {_figure(spot.entropy)} nats: "
        f"{_quoted(spot.came)} came at {_percent(spot.came_probability)}\n"
        f"    {spot.before}⟦{spot.came}⟧{spot.after}\n"
        f"    expected {expected}"
    )


def _quoted(token: str) -> str:
    return f"“{token}”"


def _figure(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else f"{value:.0e}"


def _percent(p: float) -> str:
    if p >= 0.9995:
        return "100%" if p == 1 else ">99.9%"
    if p >= 0.0995:
        return f"{p:.0%}" if p < 0.985 else f"{p:.1%}"
    return f"{p:.1%}" if p >= 0.001 else ("0%" if p == 0 else "<0.1%")
