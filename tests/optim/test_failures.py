"""What cannot be inverted, or is not finite: the last inverse is kept, and training goes on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fisherkern.optim import KFAC, _inverse
from optim import cases
from optim.cases import Tokens, curvature, differentiate, error, filled, train

OPTIONS: dict[str, Any] = {
    "damping": 1e-3,
    "fisher_type": "type-2",
    "inverse_update_period": 1,
    "lr": 0.1,
}


@contextmanager
def one_warning(*words: str) -> Iterator[None]:
    """Exactly one is given, which has these words."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        yield
    messages = [str(w.message) for w in given if issubclass(w.category, RuntimeWarning)]
    assert len(messages) == 1, messages
    for word in words:
        assert word in messages[0]


def indefinite(layer: Any) -> None:
    """Give G an eigenvalue of −1."""
    layer.G._sum.zero_()
    layer.G._sum.diagonal().copy_(-layer.G.count)


def inverses(optimizer: KFAC, name: str = "lower") -> dict[str, Any]:
    tensors = optimizer.preconditioner._solvers[name].tensors()
    return {key: value.clone() for key, value in tensors.items() if isinstance(value, Tensor)}


def assert_kept(optimizer: KFAC, before: dict[str, Any]) -> None:
    after = inverses(optimizer)
    assert all(torch.equal(before[key], after[key]) for key in before)


# ---- factors that cannot be inverted ------------------------------------------------------------


@pytest.mark.parametrize("inverse", ["cholesky", "inverse-free"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_indefinite_factor(inverse: str, dtype: torch.dtype) -> None:
    """The last inverse is kept, and what the layer is stepped along is it times the gradient."""
    model = filled(Tokens(), dtype)
    optimizer = KFAC(model, inverse=inverse, kl_clip=None, momentum=0.0, **OPTIONS)
    train(model, optimizer, range(2))
    before = inverses(optimizer)
    norm = inverses(optimizer, "rms_norm")
    state = optimizer.state_dict()["state"]
    indefinite(curvature(optimizer, "lower"))
    given = differentiate(model, 2)
    indefinite(curvature(optimizer, "lower"))
    with one_warning(
        "lower: a factor with an eigenvalue of -1 is", "more than 1", "its last inverse is kept"
    ):
        optimizer.step()
    assert_kept(optimizer, before)
    assert not torch.equal(norm["inverse"], inverses(optimizer, "rms_norm")["inverse"])
    X = torch.cat([given["lower.weight"], given["lower.bias"][:, None]], 1)
    natural = before["G"] @ X @ before["A"]
    assert error(model.lower.weight.grad, natural[:, :-1].double()) < 1e-6
    assert set(state) == set(optimizer.state_dict()["state"])
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error", RuntimeWarning)
        differentiate(model, 3)
        indefinite(curvature(optimizer, "lower"))
        optimizer.step()
    # what the average holds is forgotten in time, and then the inverse is new again
    curvature(optimizer, "lower").G._sum.zero_()
    train(model, optimizer, range(4, 6))
    assert not torch.equal(before["G"], inverses(optimizer)["G"])


@pytest.mark.parametrize("inverse", ["cholesky", "eigh", "inverse-free"])
@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block"])
def test_nan_in_the_curvature(structure: str, inverse: str) -> None:
    model = filled(Tokens())
    optimizer = KFAC(model, inverse=inverse, structure=structure, **OPTIONS)
    train(model, optimizer, range(2))
    before = inverses(optimizer)
    differentiate(model, 2)
    next(iter(curvature(optimizer, "lower").averages.values()))._sum[0, 0] = math.nan
    with one_warning("lower: the factor holds NaN or infinity", "its last inverse is kept"):
        optimizer.step()
    assert_kept(optimizer, before)
    train(model, optimizer, range(3, 5))
    assert all(p.isfinite().all() for p in model.parameters())


def test_nan_in_what_an_embedding_counts() -> None:
    for mode in ("pi", "exact"):
        model = filled(Tokens())
        optimizer = KFAC(model, damping_mode=mode, **OPTIONS)
        train(model, optimizer, range(1))
        before = inverses(optimizer, "embedding")
        differentiate(model, 1)
        curvature(optimizer, "embedding").A._sum[0] = math.nan
        with one_warning("embedding: the factor holds NaN or infinity"):
            optimizer.step()
        after = inverses(optimizer, "embedding")
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_nan_between_refreshes_of_ekfac() -> None:
    """The eigenvalues of the last step are kept."""
    model = filled(Tokens())
    optimizer = KFAC(model, structure="ekfac", **{**OPTIONS, "inverse_update_period": 10})
    train(model, optimizer, range(3))
    before = inverses(optimizer)
    differentiate(model, 3)
    curvature(optimizer, "lower").moments._sum[0, 0] = math.nan
    optimizer.step()
    assert_kept(optimizer, before)


def test_nan_in_the_tokens_of_a_wide_head() -> None:
    """Found when the inverse is made, while there is a last one to keep."""
    model = filled(Tokens())
    optimizer = KFAC(model, widest=4, stride=1, **OPTIONS)
    train(model, optimizer, range(2))
    before = optimizer.preconditioner._solvers["head"]
    differentiate(model, 2)
    curvature(optimizer, "head").kept.logits[0][0, 0] = math.nan
    with one_warning("head: the factor holds NaN or infinity", "its last inverse is kept"):
        optimizer.step()
    assert optimizer.preconditioner._solvers["head"] is before
    assert model.head.weight.grad is not None
    assert model.head.weight.grad.isfinite().all()
    train(model, optimizer, range(3, 5))
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_wide_head_none_of_whose_tokens_count() -> None:
    """Of a step in which no position has a label there is no G: the one before is kept."""
    model = filled(Tokens())
    terms = torch.ones(6, 8, dtype=torch.bool)
    optimizer = KFAC(model, widest=4, stride=8, terms_of=lambda kwargs, logits: terms, **OPTIONS)
    train(model, optimizer, range(1))
    before = optimizer.preconditioner._solvers["head"]
    terms[:] = False
    train(model, optimizer, range(1, 2))
    assert optimizer.preconditioner._solvers["head"] is before


# ---- what is tried again in float64 -------------------------------------------------------------


def test_eigh_is_tried_again_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", failing(eigh, torch.float32))
    model, twin = filled(Tokens()), filled(Tokens())
    optimizer = KFAC(model, inverse="eigh", **OPTIONS)
    train(model, optimizer, range(2))
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    train(twin, KFAC(twin, inverse="eigh", **OPTIONS), range(2))
    cases.assert_close(model, twin, 1e-3)


def failing(eigh: Any, *dtypes: torch.dtype) -> Any:
    def fails(x: Tensor) -> Any:
        if x.dtype in dtypes:
            raise torch.linalg.LinAlgError("linalg.eigh: The algorithm failed to converge")
        return eigh(x)

    return fails


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
def test_eigh_that_fails(structure: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(Tokens())
    layers = ["lower"]
    optimizer = KFAC(model, inverse="eigh", structure=structure, layers=layers, **OPTIONS)
    train(model, optimizer, range(2))
    before, steps = inverses(optimizer), optimizer.preconditioner.steps
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", failing(eigh, torch.float32, torch.float64))
    with one_warning("lower: linalg.eigh: The algorithm failed to converge", "is kept"):
        train(model, optimizer, range(2, 4))
    assert optimizer.preconditioner.steps == steps + 2
    kept = inverses(optimizer)
    assert torch.equal(before["Q_G"], kept["Q_G"])
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    train(model, optimizer, range(4, 5))
    assert not torch.equal(before["Q_G"], inverses(optimizer)["Q_G"])


def test_iterations_that_do_not_converge(monkeypatch: pytest.MonkeyPatch) -> None:
    model = filled(Tokens())
    optimizer = KFAC(model, inverse="inverse-free", layers=["lower"], **OPTIONS)
    train(model, optimizer, range(1))
    before = inverses(optimizer)
    monkeypatch.setattr(_inverse, "_ITERATIONS", 1)
    # far from the last factor, so that a warm start is of no use
    curvature(optimizer, "lower").G._sum.mul_(1e4)
    with one_warning("lower: a factor with an eigenvalue of", "too little; its last"):
        train(model, optimizer, range(1, 2))
    assert_kept(optimizer, before)
    monkeypatch.undo()
    train(model, optimizer, range(2, 3))
    assert not torch.equal(before["G"], inverses(optimizer)["G"])


# ---- before there is any inverse ----------------------------------------------------------------


def test_a_layer_without_any_inverse_takes_adamw() -> None:
    """Until it has one; from then on the natural gradient."""
    model = filled(Tokens())
    optimizer = KFAC(model, adam_lr=1e-2, adam_eps=1e-30, weight_decay=0.1, **OPTIONS)
    before = cases.parameters(model)
    differentiate(model)
    indefinite(curvature(optimizer, "lower"))
    with one_warning("lower: a factor with an eigenvalue of -1", "its gradient stays as it is"):
        optimizer.step()
    # the first step of AdamW is the sign of the gradient
    shrunk = before["lower.weight"] * (1 - 1e-2 * 0.1)
    change = (model.lower.weight.detach() - shrunk).abs()
    torch.testing.assert_close(change, torch.full_like(change, 1e-2), rtol=1e-4, atol=0)
    assert set(optimizer.state[model.lower.weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(optimizer.state[model.head.weight]) == {"momentum_buffer"}
    curvature(optimizer, "lower").G._sum.zero_()
    train(model, optimizer, range(1, 3))
    assert "momentum_buffer" in optimizer.state[model.lower.weight]


@pytest.mark.parametrize("structure", ["kfac", "ekfac", "diagonal", "block"])
def test_a_layer_that_is_never_called_takes_adamw(structure: str) -> None:
    """Its curvature is zero, and its gradient is not."""

    class Extra(Tokens):
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(4, 6)

        def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(tokens) + (self.extra.weight.sum() + self.extra.bias.sum()) * 0.1

    model = filled(Extra())
    optimizer = KFAC(model, structure=structure, **OPTIONS)
    train(model, optimizer, range(2))
    assert optimizer.fallback()["extra.weight"] == "its module was never called"
    assert "exp_avg" in optimizer.state[model.extra.weight]


# ---- gradients that are not finite --------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["lower.weight", "embedding.weight"])
def test_a_gradient_that_is_not_finite(name: str, bad: float) -> None:
    """The step is left out: no parameter, no momentum and no inverse changes."""
    model, twin = filled(Tokens()), filled(Tokens())
    optimizer, other = KFAC(model, **OPTIONS), KFAC(twin, **OPTIONS)
    train(model, optimizer, range(2))
    train(twin, other, range(2))
    differentiate(model, 2)
    model.get_parameter(name).grad[0, 0] = bad
    before = inverses(optimizer)
    with one_warning("a gradient holds NaN or infinity; the step is left out"):
        optimizer.step()
    cases.assert_close(model, twin)
    assert_kept(optimizer, before)
    assert optimizer.preconditioner.steps == 2
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        mine, theirs = optimizer.state[p], other.state[q]
        assert torch.equal(mine["momentum_buffer"], theirs["momentum_buffer"])
    # and the batch was captured as a step of its own
    differentiate(twin, 2)
    other.preconditioner.skip()
    train(model, optimizer, range(3, 5))
    train(twin, other, range(3, 5))
    cases.assert_close(model, twin)


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
def test_a_model_that_gives_nan_once(fisher_type: str) -> None:
    """The batch is left out of the curvature too."""
    model = filled(Tokens())
    optimizer = KFAC(model, **{**OPTIONS, "fisher_type": fisher_type})
    train(model, optimizer, range(2))
    good = cases.parameters(model)
    with torch.no_grad():
        model.lower.weight[0, 0] = math.nan
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        train(model, optimizer, range(2, 3))
    for layer in optimizer.preconditioner.capture.layers.values():
        assert all(average._sum.isfinite().all() for average in layer.averages.values())
    with torch.no_grad():
        model.lower.weight.copy_(good["lower.weight"])
    cases.assert_close(model, filled_with(good))
    train(model, optimizer, range(3, 5))
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.lower.weight, good["lower.weight"])


def filled_with(values: dict[str, Tensor]) -> nn.Module:
    model = filled(Tokens())
    model.load_state_dict(values)
    return model


def test_a_natural_gradient_that_overflows() -> None:
    """The layer takes an AdamW step instead."""
    model = filled(Tokens())
    optimizer = KFAC(model, **OPTIONS)
    train(model, optimizer, range(3))
    for inverse in optimizer.preconditioner._solvers["lower"].tensors().values():
        inverse.fill_(3e38)
    differentiate(model, 3)
    optimizer.preconditioner.inverse_update_period = 5  # nothing is refreshed in this step
    with one_warning("lower: its natural gradient is not finite", "stays as it is"):
        optimizer.step()
    assert "exp_avg" in optimizer.state[model.lower.weight]
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_step_that_is_left_out_predicts_nothing() -> None:
    model = filled(Tokens())
    optimizer = KFAC(model, damping_period=1, **OPTIONS)
    train(model, optimizer, range(1))
    assert optimizer.wants_loss
    differentiate(model, 1)
    model.lower.weight.grad[0, 0] = math.nan
    with one_warning("the step is left out"):
        optimizer.step()
    assert not optimizer.wants_loss
    with pytest.raises(ValueError, match="the change of the last step was not predicted"):
        optimizer.adapt_damping(1.0, 0.5)


# ---- a forward pass that fails ------------------------------------------------------------------


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_an_error_in_the_forward_pass_leaves_no_batch_open(fisher_type: str) -> None:
    model, twin = filled(Tokens()), filled(Tokens())
    options = {**OPTIONS, "fisher_type": fisher_type}
    refuse = [True]

    def logits_of(output: Tensor) -> Tensor:
        if refuse[0]:
            raise KeyError("no logits")
        return output

    optimizer = KFAC(model, logits_of=logits_of, **options)
    with pytest.raises(KeyError, match="no logits"):
        model(cases.batch_of(model)[0])
    assert not optimizer.preconditioner.capture._active
    refuse[0] = False
    optimizer.preconditioner.skip()
    train(model, optimizer, range(2))
    train(twin, KFAC(twin, **options), range(2))
    cases.assert_close(model, twin, 1e-5)
