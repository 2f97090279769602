"""What capturing the factors of a language model costs: time and memory of a training pass.

``python -m fisherkern.bench.capture`` runs forward and backward passes of the demo's model, bare,
with the factors of plain PyTorch (as kfac-pytorch's ``get_cov`` and its running average), and with
:class:`fisherkern.curvature.Capture`, alternately, and prints Markdown. The head is left out of
both, for kfac-pytorch cannot hold its factor. Capture time is that of the pass less a bare one.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern.bench import results
from fisherkern.curvature import Capture, KroneckerCurvature
from fisherkern.demo import measure, model, text

_DECAY = 0.95
_MIB = 2**20


def linear_layers(network: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers but the head."""
    head = network.get_output_embeddings()  # type: ignore[operator]
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


class PlainFactors:
    """A and G of linear layers by plain PyTorch, in the formulation of kfac-pytorch."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        self.layers = layers
        self.factors: dict[tuple[str, str], Tensor] = {}
        self._handles: list[Any] = []
        self.terms = 1

    def _update(self, key: tuple[str, str], rows: Tensor, scale: float) -> None:
        rows = rows.reshape(-1, rows.shape[-1])
        covariance = rows.t() @ (rows * scale / len(rows))
        covariance = (covariance + covariance.t()) / 2
        if key not in self.factors:
            self.factors[key] = torch.zeros_like(covariance)
        self.factors[key] = _DECAY * self.factors[key] + (1 - _DECAY) * covariance

    def __enter__(self) -> PlainFactors:
        """Put the hooks on."""
        for name, layer in self.layers.items():

            def forward(
                module: nn.Module, args: tuple[Tensor, ...], output: Tensor, name: str = name
            ) -> None:
                self._update((name, "A"), args[0].detach(), 1.0)

            def backward(
                module: nn.Module, inputs: Any, outputs: tuple[Tensor, ...], name: str = name
            ) -> None:
                self._update((name, "G"), outputs[0].detach(), float(self.terms) ** 2)

            self._handles += [
                layer.register_forward_hook(forward),
                layer.register_full_backward_hook(backward),
            ]
        return self

    def __exit__(self, *_: object) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


def training_pass(network: nn.Module, tokens: Tensor) -> None:
    """Forward and backward of the mean loss over all tokens but the last of each row."""
    network(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()


def measured(network: nn.Module, tokens: Tensor, repeats: int) -> dict[str, Any]:
    """Seconds of each kind of pass, peak memory of it, and the error of the factors."""
    layers = linear_layers(network)
    terms = tokens[:, 1:].numel()
    plain = PlainFactors(layers)
    plain.terms = terms
    ours = Capture(network, fisher_type="empirical", ema_decay=_DECAY, layers=list(layers))
    contexts: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "bare": nullcontext,
        "plain PyTorch": lambda: plain,
        "fisherkern": lambda: _batch(ours, terms),
    }
    for context in contexts.values():  # gradients exist and threads are started afterwards
        with context():
            training_pass(network, tokens)
    worst = _difference(plain, ours)
    seconds: dict[str, list[float]] = {name: [] for name in contexts}
    for _ in range(repeats):
        for name, context in contexts.items():
            began = time.perf_counter()
            with context():
                training_pass(network, tokens)
            seconds[name].append(time.perf_counter() - began)
    peaks = {}
    for name, context in contexts.items():

        def once(context: Callable[[], AbstractContextManager[Any]] = context) -> None:
            with context():
                training_pass(network, tokens)

        gc.collect()
        peaks[name] = measure.peak_extra_bytes(once)
    factors = sum(
        average._sum.numel() * average._sum.element_size()
        for curvature in ours.layers.values()
        for average in curvature.averages.values()
    )
    return {
        "layers": len(layers),
        "seconds": seconds,
        "peak_bytes": peaks,
        "factor_bytes": factors,
        "difference": worst,
    }


def _batch(ours: Capture, terms: int) -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.enter_context(ours)
    stack.enter_context(ours.batch(terms=terms))
    return stack


def _difference(plain: PlainFactors, ours: Capture) -> float:
    """The largest relative difference of a factor; both saw one batch."""
    worst = 0.0
    for name, curvature in ours.layers.items():
        assert isinstance(curvature, KroneckerCurvature)
        G, A = curvature.factors()
        tokens = float(curvature.A.count / curvature.G.count)  # G is per term, theirs per token
        for mine, key, scale in ((A, "A", 1.0), (G, "G", tokens)):
            theirs = plain.factors[name, key] / (1 - _DECAY) * scale
            worst = max(worst, float((mine - theirs).norm() / theirs.norm()))
    return worst


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    medians = {name: statistics.median(times) for name, times in found["seconds"].items()}
    bare, least = medians["bare"], found["peak_bytes"]["bare"]
    lines = ["| pass | s | capture s | memory beyond a bare pass, MiB |", "|---|---|---|---|"]
    for name, seconds in medians.items():
        extra = (found["peak_bytes"][name] - least) / _MIB
        lines.append(f"| {name} | {seconds:.2f} | {seconds - bare:.2f} | {extra:.0f} |")
    ratio = (medians["plain PyTorch"] - bare) / (medians["fisherkern"] - bare)
    lines.append(
        f"\nCapture of {found['layers']} layers is {ratio:.2f} times faster; factors take "
        f"{found['factor_bytes'] / _MIB:.0f} MiB and differ by {found['difference']:.1e}."
    )
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m fisherkern.bench.capture")
    parser.add_argument("--model", help="of transformers; default: that of the demo")
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512, help="per window")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    loaded = model.load(arguments.model)
    _, texts = text.passages(None)
    windows = text.windows(texts, loaded.tokenizer, arguments.windows, arguments.tokens).tokens
    found = measured(loaded.model.train(), windows, arguments.repeats)
    print(table(found))
    if arguments.output is not None:
        whole = {"environment": results.environment("cpu"), "tokens": list(windows.shape), **found}
        arguments.output.write_text(json.dumps(whole, indent=1, default=str))


if __name__ == "__main__":
    main()
