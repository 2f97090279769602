"""Which passes are captured: what is said where none are, and for how long hooks stay."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fisherkern.curvature import Capture
from fisherkern.optim import KFAC, KFACPreconditioner
from optim import cases
from optim.cases import Tokens, filled

OPTIONS: dict[str, Any] = {"damping": 0.1, "fisher_type": "type-2"}
NOTHING = "no gradient was made natural: nothing was captured"


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


# ---- passes that are not followed ---------------------------------------------------------------


class Inner(nn.Module):
    """A model whose loss a method of its own computes."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Tokens()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return cases.loss_of(self.inner, x, y)


def in_evaluation(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    model.eval()
    return lambda x, y: cases.loss_of(model, x, y)


def by_a_method(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    return model.loss


def compiled_and_run_before(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    torch._dynamo.reset()
    made = torch.compile(model, backend="eager")
    made(cases.batch_of(model)[0])
    return lambda x, y: cases.loss_of(made, x, y)


@pytest.mark.filterwarnings("ignore:no gradient came to any layer")
@pytest.mark.parametrize("how", [in_evaluation, by_a_method, compiled_and_run_before])
def test_a_model_of_which_nothing_is_captured(how: Any) -> None:
    """One warning, every parameter is stepped by AdamW, and fallback() says so."""
    model = filled(Inner())
    loss = how(model)
    optimizer = KFAC(model, **OPTIONS)
    assert not optimizer.fallback()
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for seed in range(3):
            optimizer.zero_grad()
            loss(*cases.batch_of(model, seed)).backward()
            optimizer.step()
    said = [str(w.message) for w in given if NOTHING in str(w.message)]
    assert len(said) == 1
    assert "training mode" in said[0]
    assert all("exp_avg" in state for state in optimizer.state.values())
    reasons = optimizer.fallback()
    assert list(reasons) == [name for name, _ in model.named_parameters()]
    assert all(reason.startswith("nothing was captured") for reason in reasons.values())
    if how is not compiled_and_run_before:  # and no longer, once the model is followed
        cases.train(model.train(), optimizer, range(3, 4))
        assert not optimizer.fallback()


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_a_model_that_is_frozen_as_a_whole(fisher_type: str) -> None:
    """There is nothing to differentiate, and its calls are those of any model."""
    model = filled(Tokens())
    optimizer = KFAC(model, **{**OPTIONS, "fisher_type": fisher_type})
    model.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(cases.batch_of(model)[0])
        optimizer.step()
    model.requires_grad_(True)
    cases.train(model, optimizer, range(1))
    assert not optimizer.fallback()


class Scaled(Tokens):
    """With a parameter that is in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(cases.V))

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(tokens) * self.scale


def test_layers_that_are_all_frozen_beside_what_is_trained() -> None:
    """AdamW steps the rest, and nothing is said: there is no curvature to miss."""
    model = filled(Scaled())
    optimizer = KFAC(model, **OPTIONS)
    model.requires_grad_(False)
    model.scale.requires_grad_(True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cases.train(model, optimizer, range(2))
    assert list(optimizer.state) == [model.scale]
    reasons = optimizer.fallback()
    assert reasons.pop("scale").startswith("no rule for modules of type Scaled")
    assert set(reasons.values()) == {"frozen"}
    model.requires_grad_(True)
    cases.train(model, optimizer, range(2, 3))
    assert list(optimizer.fallback()) == ["scale"]


class Checkpointed(Tokens):
    """Whose middle is computed again, by re-entry; before it nothing is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding.requires_grad_(False)
        self.layer_norm.requires_grad_(False)

    def middle(self, x: Tensor) -> Tensor:
        return self.rms_norm(self.lower(x).tanh())

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.layer_norm(self.embedding(tokens)).detach().requires_grad_()
        return self.head(checkpoint(self.middle, x, use_reentrant=True))


def test_layers_inside_reentrant_checkpointing() -> None:
    """No pass before the loss's comes to them: that is said, and "empirical" sees them."""
    model = filled(Checkpointed())
    optimizer = KFAC(model, **OPTIONS)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        cases.train(model, optimizer, range(2))
    said = [str(w.message) for w in given if issubclass(w.category, RuntimeWarning)]
    assert len(said) == 1
    assert said[0].startswith("3 gradients stay, of lower.weight first: its module was called with")
    reasons = optimizer.fallback()
    assert list(reasons) == ["lower.weight", "lower.bias", "rms_norm.weight"]
    assert all("use_reentrant=False" in reason for reason in reasons.values())
    optimizer.detach()
    other = KFAC(model, **{**OPTIONS, "fisher_type": "empirical"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cases.train(model, other, range(2))
    assert not other.fallback()


def test_a_preconditioner_of_which_nothing_is_captured() -> None:
    model = filled(Tokens()).eval()
    made = KFACPreconditioner(model, **OPTIONS)
    before = cases.differentiate(model)
    with pytest.warns(RuntimeWarning, match=NOTHING):
        assert made.step() == set()
    assert all(torch.equal(g, before[name]) for name, g in cases.gradients(model).items())
    assert set(made.uncovered()) == set(before)


# ---- how long hooks stay ------------------------------------------------------------------------


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
def test_hooks_go_with_what_they_are_of(kind: Any, fisher_type: str) -> None:
    """At once, and in the middle of a batch; another one made then has the model for itself."""
    model, twin = filled(Tokens()), filled(Tokens())
    made = kind(model, fisher_type=fisher_type)
    cases.differentiate(model)
    made.step()
    cases.differentiate(model)
    gc.disable()
    try:
        del made
        assert hooks(model) == 0
        gc.collect()
        assert not [c for c in gc.get_objects() if type(c) is Capture and c._model is model]
    finally:
        gc.enable()
    model.load_state_dict(twin.state_dict())
    options = [{**OPTIONS, "fisher_type": fisher_type, "generator": cases.generator(0)}] * 2
    for one in (model, twin):
        options[0]["generator"] = cases.generator(0)
        cases.train(one, KFAC(one, **options[0]), range(2))
    cases.assert_close(model, twin)


def test_detach() -> None:
    model = filled(Tokens())
    optimizer = KFAC(model, **OPTIONS)
    optimizer.detach()
    assert hooks(model) == 0


def test_a_capture_that_is_dropped_takes_its_hooks_along() -> None:
    model = filled(Tokens())
    fisher = Capture(model).attach()
    assert hooks(model) > 0
    del fisher
    assert hooks(model) == 0


@pytest.mark.parametrize("through", [copy.deepcopy, "file"])
def test_a_model_is_copied_and_saved_with_hooks_on_it(through: Any) -> None:
    """The copy computes what the model does, and what it computes is not captured."""
    model = filled(Tokens())
    optimizer = KFAC(model, **OPTIONS)
    if through == "file":
        file = io.BytesIO()
        torch.save(model, file)
        assert len(file.getvalue()) < 2 * len(pickle.dumps(filled(Tokens()).state_dict())) + 20_000
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        copied = through(model)
    x, y = cases.batch_of(model)
    cases.loss_of(copied, x, y).backward()
    assert cases.curvature(optimizer, "head").G.count == 0
    cases.differentiate(model)
    cases.assert_close(copied, model)
    mine, theirs = cases.gradients(model), cases.gradients(copied)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("act", [copy.copy, copy.deepcopy, pickle.dumps])
def test_an_optimizer_is_not_copied(act: Any) -> None:
    optimizer = KFAC(filled(Tokens()), **OPTIONS)
    with pytest.raises(
        TypeError, match=r"KFAC follows its model and can .* save its state_dict\(\)"
    ):
        act(optimizer)
