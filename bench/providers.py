"""Who computes an op: back ends, formulas in PyTorch, torch.compile of each, named peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fisherkern
from fisherkern.bench.registry import Case, Family, Provider, Tensors

PEERS = ("liger", "quack", "cublas")


def _fused(case: Case, inputs: Tensors, out: Tensor | None) -> Callable[..., Any]:
    assert case.op.fused is not None
    return case.op.fused


def _eager(name: str, case: Case, inputs: Tensors, out: Tensor | None = None) -> Callable[..., Any]:
    formula = case.op.formula(name)
    assert formula is not None
    return formula


def compiled(function: Callable[..., Any], inputs: Tensors) -> Callable[..., Any]:
    """torch.compile for static shapes, in default mode; without graph breaks where it can be."""
    try:
        call = torch.compile(function, fullgraph=True, dynamic=False)
        call(*inputs)
    except torch._dynamo.exc.Unsupported:
        call = torch.compile(function, dynamic=False)
        call(*inputs)
    return call


def _compile(name: str, case: Case, inputs: Tensors, out: Tensor | None) -> Callable[..., Any]:
    return compiled(_eager(name, case, inputs), inputs)


def _peer(name: str, case: Case, inputs: Tensors, out: Tensor | None) -> Callable[..., Any]:
    return case.op.peers[name]()


def _yardstick(name: str, case: Case, inputs: Tensors, out: Tensor | None) -> Callable[..., Any]:
    work = case.op.yardsticks[name](case)
    return lambda *_: work()


def back_ends(device: str, dtype: torch.dtype) -> list[str]:
    """Back ends worth timing: all that are available, less an interpreter."""
    names = fisherkern.available(device, dtype)
    return [name for name in names if not (name == "triton" and device == "cpu")]


def _formulas(family: Family) -> list[Provider]:
    """Every PyTorch formula of a family, then torch.compile of each."""
    plain = dict.fromkeys(op.plain_name for op in family.ops)
    names = dict.fromkeys([*plain, *(name for op in family.ops for name in op.formulas)])
    eager = [
        Provider(
            name,
            "eager" if name in plain else "peer",
            partial(_eager, name),
            temporaries=6.0,
            formula=name,
        )
        for name in names
    ]
    compiled_too = [
        Provider(
            "compile" if name == "eager" else f"{name} compile",
            "compile",
            partial(_compile, name),
            temporaries=2.0,
            formula=name,
        )
        for name in names
    ]
    return eager + compiled_too


def providers(family: Family, device: str, dtype: torch.dtype) -> list[Provider]:
    """Everybody who may compute an op of this family, ours first."""
    found: list[Provider] = []
    if device == "cuda" and family.automatic:
        found.append(Provider("automatic", "ours", _fused))
    for name in back_ends(device, dtype):
        kind = "reference" if name == "reference" else "ours"
        # the reference computes some of its terms in float64
        temporaries = 10.0 if kind == "reference" else 0.0
        use = partial(fisherkern.backend, name)
        default = kind == "ours" or family.reference
        found.append(Provider(name, kind, _fused, use, temporaries=temporaries, default=default))
        if all(op.out is None for op in family.ops):
            continue
        found.append(
            Provider(
                f"{name} out=",
                kind,
                _fused,
                use,
                uses_out=True,
                temporaries=temporaries,
                default=kind == "ours",
            )
        )
    found += _formulas(family)
    yardsticks = dict.fromkeys(name for op in family.ops for name in op.yardsticks)
    found += [
        Provider(name, "yardstick", partial(_yardstick, name), temporaries=2.0)
        for name in yardsticks
    ]
    if device == "cuda":
        found += [Provider(name, "peer", partial(_peer, name), temporaries=1.0) for name in PEERS]
    return found


def best(found: list[Provider]) -> list[str]:
    """The providers that the bars are for: what is served by default, and its out=."""
    ours = [p for p in found if p.kind == "ours"]
    # an out= that was asked for alone is judged too
    ours = [p for p in ours if not p.uses_out] or ours
    names = [p.name.removesuffix(" out=") for p in ours]
    return [names[0], f"{names[0]} out="] if names else []
