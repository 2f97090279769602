"""What capturing the factors of a language model costs: time and memory of a training pass.

``python -m fisherkern.bench.capture`` runs forward and backward passes of the demo's model, bare,
with the factors of plain PyTorch (as kfac-pytorch's ``get_cov`` and its running average), and with
:class:`fisherkern.curvature.Capture`, alternately, and prints Markdown. The head is left out of
both, for kfac-pytorch cannot hold its factor. Capture time is that of the pass less a bare one.

Memory is the resident high-water mark of a process that makes three such passes alone, less that
of one that makes bare passes and less the factors. It is measured twice: as malloc is, where it
counts the holes in the heap of glibc too, and with a mapping per tensor, where there are none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
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


BARE, PLAIN, OURS = "bare", "plain PyTorch", "fisherkern"
KINDS = (BARE, PLAIN, OURS)
# glibc: that many bytes and more are mapped, always, where it otherwise raises the bound as it goes
_MAPPED = {"MALLOC_MMAP_THRESHOLD_": str(2**17)}
_PASSES = 3


class Passes:
    """Training passes of each kind on one batch."""

    def __init__(self, network: nn.Module, tokens: Tensor, kinds: Sequence[str] = KINDS) -> None:
        self.network, self.tokens = network, tokens
        self.layers = linear_layers(network)
        self.terms = tokens[:, 1:].numel()
        if PLAIN in kinds:
            self.plain = PlainFactors(self.layers)
            self.plain.terms = self.terms
        if OURS in kinds:
            names = list(self.layers)
            self.ours = Capture(network, fisher_type="empirical", ema_decay=_DECAY, layers=names)

    def run(self, kind: str) -> None:
        """Forward and backward of the mean loss over all tokens but the last of each row."""
        with ExitStack() as stack:
            if kind == PLAIN:
                stack.enter_context(self.plain)
            if kind == OURS:
                stack.enter_context(self.ours)
                stack.enter_context(self.ours.batch(terms=self.terms))
            batch = {"input_ids": self.tokens, "labels": self.tokens}
            self.network(**batch, use_cache=False).loss.backward()

    def factor_bytes(self) -> int:
        """Bytes of A and G of all layers."""
        widths = [width for x in self.layers.values() for width in x.weight.shape]
        return sum(4 * width**2 for width in widths)

    def difference(self) -> float:
        """The largest relative difference of a factor; both saw one batch."""
        worst = 0.0
        for name, curvature in self.ours.layers.items():
            assert isinstance(curvature, KroneckerCurvature)
            G, A = curvature.factors()
            tokens = float(curvature.A.count / curvature.G.count)  # G per term, theirs per token
            for mine, key, scale in ((A, "A", 1.0), (G, "G", tokens)):
                theirs = self.plain.factors[name, key] / (1 - _DECAY) * scale
                worst = max(worst, float((mine - theirs).norm() / theirs.norm()))
        return worst


def timed(passes: Passes, repeats: int) -> dict[str, Any]:
    """Seconds of each kind of pass, and the error of the factors."""
    for kind in KINDS:  # gradients exist and threads are started afterwards
        passes.run(kind)
    worst = passes.difference()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind in KINDS:
            began = time.perf_counter()
            passes.run(kind)
            seconds[kind].append(time.perf_counter() - began)
    return {"layers": len(passes.layers), "seconds": seconds, "difference": worst}


def peak_alone(passes: Passes, kind: str) -> int:
    """The high-water mark of this process after some passes of a kind, in bytes."""
    for _ in range(_PASSES):
        passes.run(kind)
    return measure.resident_peak_bytes()


def peaks(options: Sequence[str]) -> dict[str, dict[str, int]]:
    """The same of each kind in a process of its own, by settings of malloc."""
    found: dict[str, dict[str, int]] = {}
    for setting, variables in (("malloc as it is", {}), ("a mapping per tensor", _MAPPED)):
        found[setting] = {}
        for kind in KINDS:
            command = [sys.executable, "-m", "fisherkern.bench.capture", *options, "--alone", kind]
            environment = {**os.environ, **variables}
            told = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
            found[setting][kind] = int(told.stdout)
    return found


def table(found: dict[str, Any]) -> str:
    """Markdown."""
    medians = {kind: statistics.median(times) for kind, times in found["seconds"].items()}
    bare = medians[BARE]
    lines = ["| pass | s | capture s |", "|---|---|---|"]
    for kind, seconds in medians.items():
        lines.append(f"| {kind} | {seconds:.2f} | {seconds - bare:.2f} |")
    ratio = (medians[PLAIN] - bare) / (medians[OURS] - bare)
    lines.append(
        f"\nCapture of {found['layers']} layers is {ratio:.2f} times faster; factors take "
        f"{found['factor_bytes'] / _MIB:.0f} MiB and differ by {found['difference']:.1e}."
    )
    if found["peak_bytes"]:
        lines += [
            "\n| MiB | a bare pass | plain PyTorch beyond it and the factors | fisherkern |",
            "|---|---|---|---|",
        ]
    for setting, peak in found["peak_bytes"].items():
        extra = [(peak[kind] - peak[BARE] - found["factor_bytes"]) / _MIB for kind in (PLAIN, OURS)]
        lines.append(f"| {setting} | {peak[BARE] / _MIB:.0f} | {extra[0]:.0f} | {extra[1]:.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m fisherkern.bench.capture")
    parser.add_argument("--model", help="of transformers; default: that of the demo")
    parser.add_argument("--windows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=512, help="per window")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--alone", choices=KINDS, help="print the peak of passes of one kind")
    arguments = parser.parse_args()
    loaded = model.load(arguments.model)
    _, texts = text.passages(None)
    windows = text.windows(texts, loaded.tokenizer, arguments.windows, arguments.tokens).tokens
    network = loaded.model.train()
    if arguments.alone:
        print(peak_alone(Passes(network, windows, [arguments.alone]), arguments.alone))
        return
    options = ["--windows", str(arguments.windows), "--tokens", str(arguments.tokens)]
    if arguments.model:
        options += ["--model", arguments.model]
    # before the passes of this process, whose memory it keeps
    peak = peaks(options) if measure.sees_resident_memory() else {}
    passes = Passes(network, windows)
    found = {
        **timed(passes, arguments.repeats),
        "factor_bytes": passes.factor_bytes(),
        "peak_bytes": peak,
    }
    print(table(found))
    if arguments.output is not None:
        whole = {"environment": results.environment("cpu"), "tokens": list(windows.shape), **found}
        arguments.output.write_text(json.dumps(whole, indent=1, default=str))


if __name__ == "__main__":
    main()
