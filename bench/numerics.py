"""What precision the damped solve of a softmax Fisher needs: errors of formulations, no times.

``python -m fisherkern.bench.numerics`` prints Markdown: relative errors ‖X − X₆₄‖ / ‖X₆₄‖ of
X = (F̄ + λ I)⁻¹ Y, Y normal with 8 columns, for synthetic logits of three kinds and, where the model
of ``fisherkern demo`` is in its cache, for its logits on the text of the demo. It takes a minute.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fisherkern.bench import woodbury
from fisherkern.operators import SoftmaxFisher

DAMPINGS = (1e-2, 1e-4, 1e-6, 1e-8)
_COLUMNS = 8
_FAILS = "Cholesky fails"

# ---- logits -----------------------------------------------------------------------------------


def _diffuse(z: Tensor, generator: torch.Generator) -> Tensor:
    return z


def _medium(z: Tensor, generator: torch.Generator) -> Tensor:
    return 3 * z


def _peaked(z: Tensor, generator: torch.Generator) -> Tensor:
    # eight tokens in ten are sure of one of four classes
    tokens = z.shape[0]
    sure = torch.nonzero(torch.rand(tokens, generator=generator) < 0.8)[:, 0]
    z = 3 * z
    z[sure, torch.randint(4, (len(sure),), generator=generator)] += 30
    return z


KINDS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "diffuse": _diffuse,
    "medium": _medium,
    "peaked": _peaked,
}


def synthetic(kind: str, tokens: int = 256, classes: int = 8192, seed: int = 0) -> Tensor:
    """Normal logits [T, V] of spread 1 (diffuse) or 3, with certain tokens or without."""
    generator = torch.Generator().manual_seed(seed)
    return KINDS[kind](torch.randn(tokens, classes, generator=generator), generator)


def of_the_demo(tokens: int = 512) -> Tensor | None:
    """Logits [T, V] of the demo's model on its text; None where they are not in its cache."""
    from fisherkern.demo import assets, model, text

    if not all(assets.path_of(asset).exists() for asset in (assets.MODEL, assets.TEXT)):
        return None
    try:
        language = model.load(None)
    except ImportError:
        return None
    _, texts = text.passages(None)
    windows = text.windows(texts, language.tokenizer, 2, tokens // 2)
    return language.logits(windows.tokens).flatten(0, 1)


# ---- formulations -----------------------------------------------------------------------------


def formulation(
    z: Tensor,
    y: Tensor,
    damping: float,
    *,
    stored: torch.dtype = torch.float32,
    multiplied: torch.dtype = torch.float32,
    corrected: bool = False,
) -> Tensor:
    """The sketch in float32, but for the dtype U is stored in and that of the factors of S.

    P is torch's softmax in float32. With P from float64, rounded once, "fp32" is 10 times as
    accurate on real logits at λ = 1e-4 and 1e-6, but a user of float32 has no such P.

    The factors of S are rounded and multiplied in float32, as units with float32 sums do. What is
    done with T × T elements is float64 here, so that nothing but the products of long rows differs.
    The correction imposes S s = λ Uᵀ D_λ⁻¹ 1 on s = 1 / √T, along which S is nearly singular.

    Raises:
        torch.linalg.LinAlgError: S is not positive definite.
    """
    tokens = z.shape[0]
    p = torch.softmax(z.float(), -1)
    d = p.mean(0) + damping
    u = (p / math.sqrt(tokens)).to(stored).float()
    half = (u / d.sqrt()).to(multiplied).float()
    s = torch.eye(tokens, dtype=torch.float64) - half @ half.mT
    du = u / d
    if corrected:
        null = s.new_full((tokens,), 1 / math.sqrt(tokens))
        e = damping * du.sum(1).double() - s @ null
        s += torch.outer(e, null) + torch.outer(null, e)
        s -= (null @ e) * torch.outer(null, null)
    c = torch.cholesky_solve((du @ y).double(), torch.linalg.cholesky(s))
    return y / d[:, None] + du.mT @ c.float()


def _ours(z: Tensor, y: Tensor, damping: float) -> Tensor:
    return SoftmaxFisher(z).solve(y, damping)


def _with(**options: object) -> Callable[[Tensor, Tensor, float], Tensor]:
    return lambda z, y, damping: formulation(z, y, damping, **options)  # type: ignore[arg-type]


COLUMNS: Mapping[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "fp32": _with(),
    "fp32 + correction": _with(corrected=True),
    "U fp16": _with(stored=torch.float16),
    "S from bf16": _with(multiplied=torch.bfloat16),
    "bf16 + correction": _with(multiplied=torch.bfloat16, corrected=True),
    "ours": _ours,
}


def errors(z: Tensor, damping: float, seed: int = 1) -> dict[str, float]:
    """Relative error of every column; NaN where its S is not positive definite."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(z.shape[1], _COLUMNS, generator=generator)
    right = woodbury.exact(z, y, damping)
    found = {}
    for name, solve in COLUMNS.items():
        try:
            found[name] = float((solve(z, y, damping).double() - right).norm() / right.norm())
        except torch.linalg.LinAlgError:
            found[name] = math.nan
    return found


# ---- Markdown ---------------------------------------------------------------------------------


def table(logits: Mapping[str, Tensor], dampings: tuple[float, ...] = DAMPINGS) -> str:
    """A row per kind of logits and damping."""
    lines = ["| logits | λ | " + " | ".join(COLUMNS) + " |", "|---|---|" + "---|" * len(COLUMNS)]
    for kind, z in logits.items():
        for damping in dampings:
            found = errors(z, damping).values()
            cells = [_FAILS if math.isnan(error) else f"{error:.1e}" for error in found]
            lines.append(f"| {kind} | {damping:.0e} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print both tables."""
    print("T = 256, V = 8192\n")
    print(table({kind: synthetic(kind) for kind in KINDS}), flush=True)
    real = of_the_demo()
    if real is None:
        print("\nThe model of `fisherkern demo` is not in its cache: no table of real logits.")
        return
    tokens, classes = real.shape
    print("\nSmolLM2-135M-Instruct (dequantised Q4_1) on WikiText-2, ", end="")
    print(f"T = {tokens}, V = {classes}\n")
    print(table({"real": real}))


if __name__ == "__main__":
    main()
