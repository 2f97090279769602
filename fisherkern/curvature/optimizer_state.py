"""Curvature that an optimizer has already averaged: what its second moments say of the Fisher.

A moment of the gradient of a mean loss over N terms is about 1 / N of that of one term, where the
mean gradient itself is small beside its noise; `terms` multiplies it back. All of it is of the
*empirical* Fisher, since gradients are at the labels of the data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fisherkern import checks
from fisherkern.operators import Kronecker


def diagonal_from_adam(
    optimizer: Optimizer, model: nn.Module, *, terms: float = 1.0
) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher from Adam's or AdamW's second moments.

    N · v / (1 − β₂ᵗ) for the moving average v of squared gradients after t steps.

    Args:
        optimizer: whose state has ``exp_avg_sq`` and ``step`` per parameter.
        model: whose parameters are named.
        terms: N, terms of the mean loss per step.

    Returns:
        Diagonals by the names of the parameters, new tensors; of those that have a state.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, or no such state.

    Source: Kingma and Ba 2015, section 3.

    >>> import torch
    >>> from fisherkern.curvature import diagonal_from_adam
    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> model(torch.tensor([[1.0, 3.0]])).sum().backward()
    >>> optimizer.step()
    >>> diagonal_from_adam(optimizer, model)["weight"].round(decimals=4)
    tensor([[1., 9.]])
    """
    scale = checks.positive("terms", terms)
    diagonals = {}
    for name, p, state, group in _states(optimizer, model, ("exp_avg_sq", "step")):
        beta = group["betas"][1]
        corrected = state["exp_avg_sq"] / (1 - beta ** float(state["step"]))
        diagonals[name] = (corrected * scale).to(p.dtype)
    return diagonals


def kronecker_from_adafactor(
    optimizer: Optimizer, model: nn.Module, *, terms: float = 1.0
) -> dict[str, Kronecker]:
    """The diagonal r ⊗ c from Adafactor's row and column moments: v ≈ r cᵀ / mean(r).

    Args:
        optimizer: ``torch.optim.Adafactor`` or the one of transformers.
        model: whose parameters are named.
        terms: N, terms of the mean loss per step.

    Returns:
        Operators by the names of the matrices among the parameters.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, or no such state.

    Source: Shazeer and Stern 2018, "Adafactor", section 3 (the factored estimate).

    >>> import torch
    >>> from fisherkern.curvature import kronecker_from_adafactor
    >>> model = torch.nn.Linear(2, 2, bias=False)
    >>> optimizer = torch.optim.Adafactor(model.parameters())
    >>> model(torch.tensor([[1.0, 3.0]])).sum().backward()
    >>> optimizer.step()
    >>> factors = kronecker_from_adafactor(optimizer, model)["weight"]
    >>> (factors @ torch.ones(2, 2)).round(decimals=4)
    tensor([[1., 9.],
            [1., 9.]])
    """
    scale = checks.positive("terms", terms)
    kinds = (("row_var", "col_var"), ("exp_avg_sq_row", "exp_avg_sq_col"))
    found = {}
    for rows, columns in kinds:
        for name, p, state, _ in _states(optimizer, model, (rows, columns), required=False):
            if p.ndim != 2:
                continue
            r, c = (state[key].float().flatten() for key in (rows, columns))
            mean = r.mean().clamp_min(torch.finfo(r.dtype).tiny)
            found[name] = Kronecker((r / mean).diag(), (c * scale).diag())
    if not found:
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__} without factored moments: it has taken no "
            "step, or is no Adafactor"
        )
    return found


def kronecker_from_shampoo(left: Tensor, right: Tensor, *, terms: float = 1.0) -> Kronecker:
    """L ⊗ R / tr L from Shampoo's statistics L = E[∇ ∇ᵀ] and R = E[∇ᵀ ∇] of one matrix.

    Args:
        left: L [m, m].
        right: R [n, n], of the same trace.
        terms: N, terms of the mean loss per step.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or value.

    Source: Gupta, Koren and Singer 2018, "Shampoo", lemma 8; Morwani et al. 2024, "A new
    perspective on Shampoo's preconditioner" (L ⊗ R over the trace as the Kronecker approximation).

    >>> import torch
    >>> from fisherkern.curvature import kronecker_from_shampoo
    >>> g = torch.tensor([[1.0, 2.0]])
    >>> kronecker_from_shampoo(g @ g.T, g.T @ g).right
    tensor([[1., 2.],
            [2., 4.]])
    """
    dtypes = (torch.float32, torch.float64)
    L = checks.array("left", left, ("m", "m"), dtypes)
    R = checks.array("right", right, ("n", "n"), (L.dtype,))
    trace = L.trace().clamp_min(torch.finfo(L.dtype).tiny)
    return Kronecker(L / trace, R * checks.positive("terms", terms))


def _states(
    optimizer: Optimizer, model: nn.Module, keys: tuple[str, ...], *, required: bool = True
) -> list[tuple[str, Tensor, Mapping[str, Any], Mapping[str, Any]]]:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}"
        )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    found: list[tuple[str, Tensor, Mapping[str, Any], Mapping[str, Any]]] = []
    for name, p in model.named_parameters():
        state = optimizer.state.get(p, {})
        if all(key in state for key in keys):
            found.append((name, p.detach(), state, groups[id(p)]))
    if required and not found:
        raise ValueError(
            f"optimizer is a {type(optimizer).__name__} whose state has no {keys[0]}: it has taken "
            "no step, or averages something else"
        )
    return found
