"""The cases of the head Fisher on hidden states and heads of language models, SmolLM2 and Gemma 3.

V and d of a shape name the model; h [T, d] are those of the text of the demo, W [V, d] is its head.
Both are kept in the cache of the demo, so that a process that measures memory loads no model.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from fisherkern.bench import head_fisher
from fisherkern.bench.registry import Case, Op, Tensors, register
from fisherkern.demo import assets

# Hidden states that are kept.
TOKENS = 512
_MODELS = {(49152, 576): assets.MODEL, (262144, 640): assets.GEMMA}


def of_model(asset: assets.Asset) -> Tensors:
    """H [T, d] of the text of the demo and W [V, d], float32."""
    from safetensors.torch import load_file, save_file

    def make(target: Path) -> None:
        h, W = _computed(asset)
        target.mkdir()
        save_file({"hidden": h, "weight": W}, target / "head.safetensors")

    folder = assets.cache_folder() / "heads" / f"{asset.sha256[:12]}-{TOKENS}"
    assets.keep(folder, make)
    found = load_file(folder / "head.safetensors")
    # in memory: what is a map of the file would be read while a call is measured
    return found["hidden"].clone(), found["weight"].clone()


@torch.no_grad()
def _computed(asset: assets.Asset) -> Tensors:
    from fisherkern.demo import model, natural, text

    language = model.load(None, asset)
    _, passages = text.passages(None)
    tokens = text.windows(passages, language.tokenizer, 1, TOKENS).tokens[0]
    inputs = natural.head_inputs(language.model, tokens)
    if inputs is None or len(tokens) < TOKENS:
        raise ValueError(
            f"{asset.title} has no linear head, or the text fewer than {TOKENS} tokens"
        )
    return inputs[0].contiguous(), language.model.get_output_embeddings().weight.contiguous()


def _inputs(case: Case, generator: torch.Generator) -> Tensors:
    """Those of the model of this V and d; of none, and for more tokens, drawn as head_fisher's."""
    tokens, *size = case.shape
    asset = _MODELS.get(tuple(size))
    if asset is None or tokens > TOKENS:
        return head_fisher.inputs(case, generator)
    h, W = of_model(asset)
    return h[:tokens].to(case.device, case.dtype), W.to(case.device, case.dtype)


def _of_models(op: Op) -> Op:
    shapes = op.shapes and dict.fromkeys(op.shapes, op.shapes["cpu"])
    return replace(op, inputs=_inputs, shapes=shapes)


FAMILY = register(
    replace(
        head_fisher.FAMILY,
        name="language_heads",
        ops=tuple(_of_models(op) for op in head_fisher.FAMILY.ops),
        shapes=dict.fromkeys(("cpu", "cuda"), tuple((TOKENS, *size) for size in _MODELS)),
    )
)
