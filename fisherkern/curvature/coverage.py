"""Which modules of a model are covered, by which curvature, and why others are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn
from torch.nn.parameter import is_lazy

from fisherkern.curvature.layers import EmbeddingLayer, Layer, ScaledEmbeddingLayer
from fisherkern.curvature.recognition import layer_of
from fisherkern.curvature.structures import LayerCurvature

Chosen = list[str] | Callable[[str, nn.Module], bool] | None
"""Names of modules, what tells by name and module, or None for all."""

_LEFT_OUT = "left out by `layers`"
NO_PART = "no layer had it when the layers were covered"


@dataclass
class Coverage:
    """What :func:`cover` found."""

    layers: dict[str, LayerCurvature] = field(default_factory=dict)
    """By the name of a module in the model."""
    modules: dict[nn.Module, str] = field(default_factory=dict)
    """Whose calls go to which of the layers: two modules of one weight go to the same."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a parameter is not covered."""

    def refuse(self, name: str, module: nn.Module, reason: str) -> None:
        """Note why the parameters of a module are not covered."""
        for role, _ in module.named_parameters(recurse=False):
            self.reasons[f"{name}.{role}" if name else role] = reason

    def drop(self, name: str) -> None:
        """Take a layer out again."""
        del self.layers[name]
        self.modules = {m: owner for m, owner in self.modules.items() if owner != name}


def cover(
    model: nn.Module, chosen: Chosen, make: Callable[[Layer], LayerCurvature | str]
) -> Coverage:
    """The layers of a model; `make` gives the curvature of one, or why there is none.

    Raises:
        TypeError: `chosen` is neither of its types.
        ValueError: a chosen name that the model does not have, or no layer is left.
    """
    modules = dict(model.named_modules())
    if not (chosen is None or isinstance(chosen, list) or callable(chosen)):
        raise TypeError(
            f"layers must be a list of names, a function of name and module, or None, not "
            f"{type(chosen).__name__}"
        )
    if isinstance(chosen, list):
        unknown = [name for name in chosen if name not in modules]
        if unknown:
            raise ValueError(f"layers holds {unknown[0]!r}, which the model has no module for")
    found = Coverage()
    owners: dict[int, str] = {}
    for name, module in modules.items():
        curvature = _curvature(name, module, chosen, make)
        if isinstance(curvature, str):
            found.refuse(name, module, curvature)
            continue
        if curvature is None:
            continue
        weight = next(iter(curvature.layer.parameters.values()))
        before = owners.get(id(weight))
        if before is not None:
            theirs, mine = found.layers[before].layer, curvature.layer
            if isinstance(theirs, EmbeddingLayer) is isinstance(mine, EmbeddingLayer):
                differs = _difference(theirs, mine)
                if differs is None:  # one weight in two places: one curvature
                    found.modules[module] = before
                    continue
                reason = f"shares its weight, but not its {differs}, with {{}}"
                found.refuse(name, module, reason.format(before))
                if differs == "scale":  # the gradients of one rule are not those of the other
                    found.refuse(before, theirs.module, reason.format(name))
                    found.drop(before)
                    del owners[id(weight)]
                continue
            if isinstance(mine, EmbeddingLayer):  # a tied head weighs more
                continue
            found.drop(before)
        owners[id(weight)] = name
        found.layers[name], found.modules[module] = curvature, name
    if not found.layers:
        raise ValueError("model has no layer to cover: " + (_listed(found.reasons) or "empty"))
    return found


def _curvature(
    name: str, module: nn.Module, chosen: Chosen, make: Callable[[Layer], LayerCurvature | str]
) -> LayerCurvature | str | None:
    if any(map(is_lazy, module.parameters(recurse=False))):
        if not _wanted(name, module, chosen):
            return _LEFT_OUT
        raise ValueError(
            f"model has a {type(module).__name__} as {name or 'itself'}, whose parameters have no "
            "shapes yet: run the model once first, or leave the layer out with `layers`"
        )
    layer = layer_of(name, module)
    if not isinstance(layer, Layer):
        return layer
    return make(layer) if _wanted(name, module, chosen) else _LEFT_OUT


def _wanted(name: str, module: nn.Module, chosen: Chosen) -> bool:
    if chosen is None:
        return True
    return name in chosen if isinstance(chosen, list) else bool(chosen(name, module))


def _difference(one: Layer, other: Layer) -> str | None:
    """What two layers of one weight do not share."""
    mine, theirs = ({role: id(p) for role, p in layer.parameters.items()} for layer in (one, other))
    if mine != theirs:
        return "bias"
    scales = [
        float(layer.scale) if isinstance(layer, ScaledEmbeddingLayer) else 1.0
        for layer in (one, other)
    ]
    return None if scales[0] == scales[1] else "scale"


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5])
