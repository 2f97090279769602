"""Every refused argument is named with what it was, and leaves no hook on the model."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from fisherkern.curvature import Capture
from fisherkern.optim import KFAC, KFACPreconditioner
from optim import cases
from optim.cases import Tokens, filled


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


OF_BOTH: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"damping": 0.0}, ValueError, "damping is 0.0; allowed are finite numbers > 0"),
    ({"damping": -1.0}, ValueError, "damping is -1.0; allowed are finite numbers > 0"),
    ({"damping": "1"}, TypeError, "damping has type str; expected a number"),
    (
        {"damping_mode": "tikhonov"},
        ValueError,
        "damping_mode is 'tikhonov'; allowed are 'pi', 'exact', 'per-factor'",
    ),
    ({"inverse": "lu"}, ValueError, "inverse is 'lu'; allowed are 'cholesky', 'eigh', 'inverse-fr"),
    ({"kl_clip": 0.0}, ValueError, "kl_clip is 0.0; allowed are finite numbers > 0"),
    ({"factor_update_period": 0}, ValueError, "factor_update_period is 0; allowed are ints >= 1"),
    ({"factor_update_period": 1.5}, TypeError, "factor_update_period has type float; expected an"),
    ({"inverse_update_period": -1}, ValueError, "inverse_update_period is -1; allowed are ints >="),
    ({"ema_decay": 1.0}, ValueError, "ema_decay is 1: the average would never move"),
    (
        {"fisher_type": "exact"},
        ValueError,
        "fisher_type is 'exact'; allowed are 'type-2', 'mc', 'empirical'",
    ),
    ({"structure": "dense"}, ValueError, "structure is 'dense'; allowed are 'kfac', 'ekfac'"),
    ({"kfac_approx": "x"}, ValueError, "kfac_approx is 'x'; allowed are 'expand', 'reduce'"),
    ({"layers": ["nowhere"]}, ValueError, "layers holds 'nowhere', which the model has no module"),
    ({"layers": "head"}, TypeError, "layers must be a list of names, a function"),
    ({"layers": []}, ValueError, "model has no layer to cover: embedding.weight: left out by"),
    ({"widest": 0}, ValueError, "widest is 0; allowed are ints >= 1"),
    ({"stride": 0}, ValueError, "stride is 0; allowed are ints >= 1"),
    ({"mc_samples": 0}, ValueError, "mc_samples is 0; allowed are ints >= 1"),
    ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, not int"),
    ({"mask_of": 3}, TypeError, "mask_of must be a function or None, not int"),
    ({"logits_of": 3}, TypeError, "logits_of must be a function or None, not int"),
    ({"terms_of": "x"}, TypeError, "terms_of must be a function or None, not str"),
    (
        {"loss_scale": 0.5},
        TypeError,
        "loss_scale must be a function that gives a number, not float",
    ),
    ({"group": 3}, TypeError, "group must be a torch.distributed.ProcessGroup or None, not int"),
    ({"exact_positions": 3}, TypeError, "exact_positions has type int; expected a bool"),
    ({"unknown": 1}, TypeError, "unexpected keyword argument 'unknown'"),
]
OF_KFAC: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, "lr is -1.0; allowed are numbers >= 0.0"),
    ({"lr": torch.tensor(1.0)}, TypeError, "lr has type Tensor; expected a number"),
    ({"adam_lr": float("nan")}, ValueError, "adam_lr is nan; allowed are numbers"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay is -0.1; allowed are numbers"),
    ({"momentum": 1.0}, ValueError, r"momentum is 1; allowed are numbers in \[0, 1\)"),
    ({"momentum": -0.1}, ValueError, "momentum is -0.1; allowed are numbers"),
    ({"adam_betas": (0.9, 1.0)}, ValueError, r"adam_betas\[1\] is 1; allowed are numbers"),
    ({"adam_betas": 0.9}, ValueError, r"adam_betas is 0.9; expected two numbers in \[0, 1\)"),
    ({"adam_eps": 0.0}, ValueError, "adam_eps is 0.0; allowed are finite numbers > 0"),
    ({"damping_period": 0}, ValueError, "damping_period is 0; allowed are ints >= 1, or None"),
    ({"damping_period": 2.0}, TypeError, "damping_period has type float; expected an int"),
    ({"params": []}, ValueError, "params is empty; expected parameters of the model"),
    (
        {"params": [nn.Parameter(torch.ones(3, 2))]},
        ValueError,
        r"params holds a tensor of shape \[3, 2\], which is no parameter of the model",
    ),
    (
        {"params": [{"params": [nn.Parameter(torch.ones(3))]}]},
        ValueError,
        r"params holds a tensor of shape \[3\], which is no parameter of the model",
    ),
    ({"params": [("name", 1)]}, TypeError, "params holds a tuple; expected parameters of the mode"),
    ({"params": [{"lr": 1}]}, TypeError, "params holds {'lr': 1}; expected groups with an entry"),
]


@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
@pytest.mark.parametrize(("options", "error", "message"), OF_BOTH)
def test_options(kind: Any, options: dict[str, Any], error: Any, message: str) -> None:
    model = filled(Tokens())
    with pytest.raises(error, match=message):
        kind(model, **options)
    assert hooks(model) == 0


@pytest.mark.parametrize(("options", "error", "message"), OF_KFAC)
def test_options_of_the_optimizer(options: dict[str, Any], error: Any, message: str) -> None:
    model = filled(Tokens())
    with pytest.raises(error, match=message):
        KFAC(model, **options)
    assert hooks(model) == 0


def test_a_parameter_in_two_groups() -> None:
    model = filled(Tokens())
    both = [{"params": model.head.parameters()}, {"params": model.parameters()}]
    with pytest.raises(ValueError, match="some parameters appear in more than one parameter group"):
        KFAC(model, both)
    assert hooks(model) == 0


@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
def test_models(kind: Any) -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, not list"):
        kind([nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="model has no layer to cover: empty"):
        kind(nn.Sequential(nn.Tanh()))
    message = "model has no layer to cover: 0.weight: no rule for modules of type BatchNorm1d"
    with pytest.raises(ValueError, match=message):
        kind(nn.Sequential(nn.BatchNorm1d(3)))


def test_a_model_that_is_sharded() -> None:
    """By FSDP1, whose parameters are no DTensors; of those see test_distributed.py."""

    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 2)

    with pytest.raises(TypeError, match="model has a FullyShardedDataParallel inside: gradients"):
        KFAC(nn.Sequential(FullyShardedDataParallel()))


def test_the_damping_that_is_set() -> None:
    optimizer = KFAC(filled(Tokens()))
    with pytest.raises(ValueError, match="damping is 0.0; allowed are finite numbers > 0"):
        optimizer.damping = 0.0
    assert optimizer.damping == 1e-3


def test_a_sparse_gradient() -> None:
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 5))
    message = "a gradient has layout torch.sparse_coo; only dense .* sparse=False"
    tokens = torch.randint(7, (3, 2))
    for made in (KFAC(model), KFACPreconditioner(model)):
        model.zero_grad()
        model(tokens).sum().backward()
        with pytest.raises(TypeError, match=message):
            made.step()


@pytest.mark.parametrize(
    ("output", "found"), [({"scores": 1}, "dict"), ("text", "str"), ((None, 1), "tuple")]
)
def test_outputs_without_logits(output: Any, found: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> Any:
            self.head(x)
            return output

    model = Odd()
    made = KFAC(model)
    with pytest.raises(TypeError, match=f"the model returned {found}, in which no logits were fou"):
        model(torch.ones(1, 3))
    made.detach()
    model(torch.ones(1, 3))


def test_a_model_that_is_converted_afterwards() -> None:
    """Its first layer is named in the forward pass."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 5))
    made = KFAC(model)
    message = "0 gave torch.float64 on .*, but its curvature is of torch.float32 on"
    with pytest.raises(TypeError, match=message):
        model.double()(torch.ones(2, 3, dtype=torch.float64))
    made.detach()


def test_a_mask_that_does_not_fit_is_refused_before_the_step() -> None:
    model = filled(Tokens())
    optimizer = KFAC(model, fisher_type="type-2")
    x, _ = cases.batch_of(model)
    with pytest.raises(
        ValueError, match=r"mask has shape \[6, 3\], but .* was called on tokens of"
    ):
        model(x, attention_mask=torch.ones(6, 3, dtype=torch.bool, device=x.device))
    cases.train(model, optimizer, range(1))
    assert optimizer.preconditioner.steps == 1


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_a_copy_of_the_model_is_not_followed(fisher_type: str) -> None:
    """One for an average of weights takes the hooks along, but neither factors nor batches."""
    model, twin = filled(Tokens()), filled(Tokens())
    optimizer, alone = (
        KFAC(m, fisher_type=fisher_type, generator=cases.generator(0)) for m in (model, twin)
    )
    copied = copy.deepcopy(model)
    cases.train(twin, alone, range(3))
    for seed in range(3):
        cases.train(model, optimizer, range(seed, seed + 1))
        copied.train()
        cases.differentiate(copied, seed)
    cases.assert_close(model, twin)
    gc.collect()
    captures = [kept for kept in gc.get_objects() if type(kept) is Capture]
    mine = [kept for kept in captures if kept._model in (model, copied)]
    assert mine == [optimizer.preconditioner.capture]


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
def test_detach_leaves_nothing_on_the_model(fisher_type: str) -> None:
    model = filled(Tokens())
    optimizer = KFAC(model, fisher_type=fisher_type)
    assert hooks(model) > 0
    cases.train(model, optimizer, range(1))
    cases.differentiate(model)  # a batch of "empirical" is open now
    optimizer.preconditioner.detach()
    assert hooks(model) == 0
    optimizer.preconditioner.detach()
    gone = weakref.ref(optimizer.preconditioner)
    del optimizer
    gc.collect()
    assert gone() is None
