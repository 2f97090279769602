"""Models that torch.compile has made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from fisherkern.optim import KFAC
from optim import cases
from optim.cases import Tokens, filled

# at which the graph of the model breaks, and is traced by autograd all the same
BACKEND = "aot_eager"
OPTIONS: dict[str, Any] = {"lr": 0.1, "damping": 0.1, "factor_update_period": 2}


def compiled_first(model: nn.Module, **options: Any) -> tuple[nn.Module, KFAC]:
    made = torch.compile(model, backend=BACKEND)
    return made, KFAC(model, **options)


def of_compiled(model: nn.Module, **options: Any) -> tuple[nn.Module, KFAC]:
    made = torch.compile(model, backend=BACKEND)
    return made, KFAC(made, **options)


def compiled_afterwards(model: nn.Module, **options: Any) -> tuple[nn.Module, KFAC]:
    optimizer = KFAC(model, **options)
    return torch.compile(model, backend=BACKEND), optimizer


def compiled_in_place(model: nn.Module, **options: Any) -> tuple[nn.Module, KFAC]:
    optimizer = KFAC(model, **options)
    model.compile(backend=BACKEND)
    return model, optimizer


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
@pytest.mark.parametrize(
    "make", [compiled_first, of_compiled, compiled_afterwards, compiled_in_place]
)
def test_the_steps_are_those_of_the_model(
    make: Callable[..., tuple[nn.Module, KFAC]], fisher_type: str
) -> None:
    torch._dynamo.reset()
    model, twin = filled(Tokens(), torch.float64), filled(Tokens(), torch.float64)
    draws = (torch.Generator(p.device).manual_seed(0) for p in (twin.lower.bias,) * 2)
    options = [{**OPTIONS, "fisher_type": fisher_type, "generator": g} for g in draws]
    called, optimizer = make(model, **options[0])
    cases.train(called, optimizer, range(4))
    cases.train(twin, KFAC(twin, **options[1]), range(4))
    assert next(iter(optimizer.preconditioner.capture.layers)) == "embedding"
    assert not optimizer.fallback()
    assert all(set(state) == {"momentum_buffer"} for state in optimizer.state.values())
    # sums of a few products in another order, through inverses of condition numbers below 100
    cases.assert_close(model, twin, 1e-10)


def test_a_causal_model_is_known_by_its_own_name() -> None:
    """Whose labels are for the token that follows."""

    class Small(Tokens):
        pass

    class ForCausalLM(Small):
        pass

    model = filled(ForCausalLM())
    optimizer = KFAC(torch.compile(model, backend=BACKEND))
    assert optimizer.preconditioner.model is model
    assert optimizer.preconditioner._follower._causal
