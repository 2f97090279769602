"""Which modules of a model are covered, by which curvature, and why others are not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from fisherkern.curvature.layers import Layer, layer_of
from fisherkern.curvature.structures import LayerCurvature

Chosen = list[str] | Callable[[str, nn.Module], bool] | None
"""Names of modules, what tells by name and module, or None for all."""


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
            theirs = found.layers[before].layer
            if type(theirs) is type(curvature.layer):
                if not _same(theirs, curvature.layer):
                    found.refuse(
                        name, module, f"shares its weight, but not its bias, with {before}"
                    )
                    continue
                found.modules[module] = before  # one weight in two places: one curvature
                continue
            # a tied head comes after its embeddings, and weighs more
            del found.layers[before]
            found.modules = {m: owner for m, owner in found.modules.items() if owner != before}
        owners[id(weight)] = name
        found.layers[name], found.modules[module] = curvature, name
    if not found.layers:
        raise ValueError("model has no layer to cover: " + (_listed(found.reasons) or "empty"))
    return found


def _curvature(
    name: str, module: nn.Module, chosen: Chosen, make: Callable[[Layer], LayerCurvature | str]
) -> LayerCurvature | str | None:
    layer = layer_of(name, module)
    if not isinstance(layer, Layer):
        return layer
    if chosen is not None:
        wanted = name in chosen if isinstance(chosen, list) else chosen(name, module)
        if not wanted:
            return "left out by `layers`"
    return make(layer)


def _same(one: Layer, other: Layer) -> bool:
    mine, theirs = ({role: id(p) for role, p in layer.parameters.items()} for layer in (one, other))
    return mine == theirs


def _listed(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in list(reasons.items())[:5])
