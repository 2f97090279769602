"""Every refusal: the message names the argument, what it was and what is allowed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import cases
from curvature.test_contract import states_equal
from fisherkern.curvature import Capture, EigenCurvature, WideCurvature, capture


def made() -> nn.Sequential:
    return cases.filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, cases.V)))


X = cases.drawn(2, 5, 3)
MASK = torch.ones(2, 5, dtype=torch.bool)


# ---- construction -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "structure is 'kron'; allowed are 'kfac', 'ekfac', 'diagonal', 'block'",
         {"structure": "kron"}),
        (ValueError, "fisher_type is 'true'; allowed are 'type-2', 'mc', 'empirical'",
         {"fisher_type": "true"}),
        (ValueError, "kfac_approx is None; allowed are 'expand', 'reduce'", {"kfac_approx": None}),
        (ValueError, "loss_reduction is 'none'; allowed are 'mean', 'sum'",
         {"loss_reduction": "none"}),
        (ValueError, "ema_decay is 1: the average would never move; allowed is [0, 1)",
         {"ema_decay": 1.0}),
        (ValueError, "ema_decay is -0.5; allowed are numbers in [0.0, 1.0]", {"ema_decay": -0.5}),
        (TypeError, "ema_decay has type str; expected a number", {"ema_decay": "0.9"}),
        (ValueError, "mc_samples is 0; allowed are ints >= 1", {"mc_samples": 0}),
        (TypeError, "mc_samples has type float; expected an int", {"mc_samples": 1.0}),
        (ValueError, "widest is -1; allowed are ints >= 1", {"widest": -1}),
        (TypeError, "widest has type bool; expected an int", {"widest": True}),
        (ValueError, "stride is 0; allowed are ints >= 1", {"stride": 0}),
        (TypeError, "generator must be a torch.Generator or None, not int", {"generator": 3}),
        (ValueError, "layers holds '1.weight', which the model has no module for",
         {"layers": ["0", "1.weight"]}),
        (TypeError, "layers must be a list of names, a function of name and module, or None, not "
         "str", {"layers": "0"}),
        (ValueError, "model has no layer to cover: 0.weight: left out by `layers`",
         {"layers": ["1"]}),
    ],
)  # fmt: skip
def test_options(error: type[Exception], message: str, options: dict[str, Any]) -> None:
    with pytest.raises(error) as caught:
        capture(made(), **options)
    assert str(caught.value).startswith(message)


def test_models() -> None:
    with pytest.raises(TypeError, match=r"^model must be a torch.nn.Module, not function$"):
        capture(made)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^model has no layer to cover: empty$"):
        capture(nn.Sequential(nn.Tanh()))
    frozen = made().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no layer to cover: 0.weight: frozen; 0.bias: frozen; 2"):
        capture(frozen)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Conv1d(4, 4, 3, groups=2), "a convolution of 2 groups"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"),
         "a convolution with padding_mode 'circular'"),
        (nn.Conv1d(2, 2, 2, padding="same"), "a convolution with padding 'same' that is not "
         "symmetric"),
        (nn.ConvTranspose1d(2, 2, 3), "no rule for modules of type ConvTranspose1d"),
        (nn.Embedding(4, 2, max_norm=1.0), "an embedding with max_norm or scale_grad_by_freq"),
        (nn.Embedding(4, 2, scale_grad_by_freq=True), "an embedding with max_norm or "
         "scale_grad_by_freq"),
        (nn.BatchNorm1d(4), "no rule for modules of type BatchNorm1d"),
        (nn.GRU(2, 2), "no rule for modules of type GRU"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
         "its weight is frozen or computed from other parameters"),
    ],
)  # fmt: skip
def test_modules_that_are_not_covered(module: nn.Module, reason: str) -> None:
    fisher = Capture(nn.ModuleDict({"one": nn.Linear(2, 2), "other": module}))
    assert list(fisher.layers) == ["one"]
    reasons = fisher.uncovered()
    assert {name for name, _ in module.named_parameters()} == {
        name.removeprefix("other.") for name in reasons
    }
    assert reason in reasons.values()


def test_why_parameters_that_changed_are_not_covered() -> None:
    """What was frozen, before or after, and what the model did not have."""
    model = cases.filled(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, cases.V)))
    model[1].bias.requires_grad_(False)
    fisher = Capture(model, fisher_type="type-2")
    model[0].requires_grad_(False)
    model[0].register_parameter("late", nn.Parameter(torch.zeros(2)))
    with fisher, fisher.batch():
        fisher.add(model(cases.drawn(4, 3)))
    assert fisher.uncovered() == {
        "0.weight": "frozen",
        "0.bias": "frozen",
        "0.late": "no layer had it when the layers were covered",
        "1.bias": "frozen",
    }


def test_a_block_that_is_too_large() -> None:
    fisher = Capture(
        nn.ModuleDict({"a": nn.Linear(90, 92), "b": nn.Linear(2, 2)}), structure="block"
    )
    assert list(fisher.layers) == ["b"]
    reason = "8372 parameters, more than a block of 8192"
    assert fisher.uncovered() == {"a.weight": reason, "a.bias": reason}


# ---- batches ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (TypeError, "mask has dtype torch.int64; allowed is bool", {"mask": MASK.long()}),
        (TypeError, "mask must be a torch.Tensor, not list", {"mask": [True]}),
        (ValueError, 'terms is None; "empirical" needs the number of terms of the loss, or a mask',
         {}),
        (ValueError, "terms is -1; allowed are numbers >= 0.0", {"terms": -1}),
        (ValueError, "terms is nan; allowed are numbers >= 0.0", {"terms": float("nan")}),
        (ValueError, "terms is inf; allowed are numbers >= 0.0",
         {"terms": torch.tensor(torch.inf)}),
        (ValueError, "terms has shape [2]; expected a scalar", {"terms": torch.ones(2)}),
        (TypeError, "terms has type str; expected a number", {"terms": "ten"}),
        (ValueError, "loss_scale is 0; allowed are finite numbers > 0",
         {"terms": 1, "loss_scale": 0}),
        (TypeError, "loss_scale has type Tensor; expected a number",
         {"terms": 1, "loss_scale": torch.ones(())}),
    ],
)  # fmt: skip
def test_arguments_of_a_batch(
    error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    fisher = Capture(made(), fisher_type="empirical", ema_decay=0.5).attach()
    before = fisher.state_dict()
    with pytest.raises(error) as caught, fisher.batch(**options):
        raise AssertionError("the batch was entered")
    assert str(caught.value).startswith(message)
    assert states_equal(fisher.state_dict(), before)
    with fisher.batch(terms=0):
        pass


def test_batches_that_must_not_be() -> None:
    fisher = Capture(made(), fisher_type="type-2")
    with pytest.raises(ValueError, match="batch was entered without hooks: use `with`, or attach"):
        fisher.batch().__enter__()
    with fisher, fisher.batch():
        with pytest.raises(ValueError, match="batch was entered inside another batch"):
            fisher.batch().__enter__()
        fisher.add(fisher._model(X))
    assert fisher.layers["0"].G.count == 10  # type: ignore[attr-defined]


def test_terms_that_come_late() -> None:
    model = made()
    fisher = Capture(model, fisher_type="empirical").attach()
    message = 'terms was given outside of a batch of fisher_type "empirical"'
    with pytest.raises(ValueError, match=message):
        fisher.set_terms(3)
    with fisher.batch(terms=2):
        with pytest.raises(ValueError, match="terms is -3; allowed are numbers"):
            fisher.set_terms(-3)
        model(X[:, 0]).sum().backward()
    assert fisher.layers["0"].G.count == 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=message):
        fisher.set_terms(3)
    other = Capture(made(), fisher_type="mc").attach()
    with other.batch(), pytest.raises(ValueError, match=message):
        other.set_terms(3)


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
def test_a_batch_in_which_no_gradient_came(fisher_type: str) -> None:
    """Nothing is counted for it: the average is that of other batches."""
    model, count = made(), 10 if fisher_type == "empirical" else None
    fisher = Capture(model, fisher_type=fisher_type).attach()
    before, logits = fisher.state_dict(), model(X)

    def batch() -> None:
        with fisher.batch(terms=count):
            if fisher_type == "empirical":
                logits.sum().backward()
            else:
                fisher.add(logits)

    with pytest.warns(RuntimeWarning, match="no gradient came to any layer"):
        batch()
    assert states_equal(fisher.state_dict()["layers"], _begun(before)["layers"])


def _begun(state: dict[str, Any]) -> dict[str, Any]:
    """The state with one step begun."""
    begun = copy.deepcopy(state)
    for layer in begun["layers"].values():
        for key, average in layer.items():
            if key != "extra":
                average["steps_due"] += 1
    return begun


def test_a_loss_that_cannot_be_added() -> None:
    model = made()
    fisher = Capture(model, fisher_type="empirical").attach()
    with pytest.raises(ValueError, match='loss was given outside of a batch of fisher_type "emp'):
        fisher.add_loss(model(X).sum())
    with fisher.batch(terms=10):
        z = model(X)
        with pytest.raises(TypeError, match="loss must be a torch.Tensor, not float"):
            fisher.add_loss(1.0)  # type: ignore[arg-type]
        for loss in (z, z.sum().detach()):
            with pytest.raises(ValueError) as caught:
                fisher.add_loss(loss)
            assert str(caught.value) == (
                f"loss has shape {list(loss.shape)} and requires_grad {loss.requires_grad}; "
                f"expected a scalar that requires grad"
            )
        fisher.add_loss(z.sum())
    assert fisher.layers["0"].G.count == 10  # type: ignore[attr-defined]
    assert all(p.grad is None for p in model.parameters())


# ---- masks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 4), (5, 2), (10,), (2, 5, 3)])
def test_a_mask_that_does_not_fit_is_refused_in_the_forward_pass(shape: tuple[int, ...]) -> None:
    model = made()
    fisher = Capture(model, fisher_type="type-2").attach()
    before = fisher.state_dict()
    mask = torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError) as caught, fisher.batch(mask=mask):
        model(X)
    assert str(caught.value) == (
        f"mask has shape {list(shape)}, but 0 was called on tokens of shape [2, 5]: they do not "
        f"match. Leave the layer out with `layers`"
    )
    assert states_equal(fisher.state_dict(), _begun(before))


# ---- logits and hidden states -------------------------------------------------------------------

Give = Callable[[Capture, Tensor], None]


def give(**changes: Any) -> Give:
    """`add` of the logits, changed by a function or with other arguments."""
    change = changes.pop("change", lambda z: z)
    return lambda fisher, z: fisher.add(change(z), **changes)


def give_hidden(**changes: Any) -> Give:
    """`add_hidden` of the output as if it were hidden states."""
    arguments = {"weight": torch.ones(6, cases.V, dtype=torch.float64), **changes}
    return lambda fisher, h: fisher.add_hidden(h, **arguments)


REFUSED: list[tuple[type[Exception], str, Give]] = [
    (TypeError, "logits must be a torch.Tensor, not list", give(change=lambda z: [z])),
    (TypeError, "logits has dtype torch.int64; allowed are", give(change=lambda z: z.long())),
    (ValueError, "logits is a scalar; expected [..., V]", give(change=lambda z: z.sum())),
    (ValueError, "logits does not require grad: there is nothing", give(change=lambda z: z.data)),
    (TypeError, "mask has dtype torch.float32; allowed is bool", give(mask=MASK.float())),
    (TypeError, "mask must be a torch.Tensor, not bool", give(mask=True)),
    (ValueError, "mask has shape [5]; expected [2, 5], the leading shape of logits [2, 5, 4]",
     give(mask=MASK[0])),
    (ValueError, "hidden does not require grad", lambda fisher, h: give_hidden()(fisher, h.data)),
    (ValueError, "mask has shape [5]; expected [2, 5], the leading shape of hidden [2, 5, 4]",
     give_hidden(mask=MASK[0])),
    (TypeError, "weight has dtype torch.float32; expected that of hidden, torch.float64",
     give_hidden(weight=torch.ones(6, 4))),
    (ValueError, "weight has shape [6, 3]; expected [V, 4]",
     give_hidden(weight=torch.ones(6, 3, dtype=torch.float64))),
    (ValueError, "bias has shape [4]; expected [6]",
     give_hidden(bias=torch.ones(4, dtype=torch.float64))),
    (ValueError, "softcap is -1.0; allowed are", give_hidden(softcap=-1.0)),
]  # fmt: skip


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
@pytest.mark.parametrize(("error", "message", "act"), REFUSED)
def test_what_is_added(error: type[Exception], message: str, act: Give, fisher_type: str) -> None:
    fisher = Capture(made(), fisher_type=fisher_type, widest=3).attach()
    with fisher.batch():
        z = fisher._model(X)
        before = fisher.state_dict()
        with pytest.raises(error) as caught:
            act(fisher, z)
        assert str(caught.value).startswith(message)
        assert states_equal(fisher.state_dict(), before)
        fisher.add(z)
    assert fisher.layers["0"].A.count == 10  # type: ignore[attr-defined]


def test_adding_at_the_wrong_time() -> None:
    fisher = Capture(made(), fisher_type="type-2").attach()
    weight = torch.ones(6, cases.V, dtype=torch.float64)
    z = fisher._model(X)
    with pytest.raises(ValueError, match=r"^logits was given outside of a batch$"):
        fisher.add(z)
    with pytest.raises(ValueError, match=r"^hidden was given outside of a batch$"):
        fisher.add_hidden(z, weight)
    fisher = Capture(made(), fisher_type="empirical").attach()
    with fisher.batch(terms=0):
        z = fisher._model(X)
        message = 'was given, but fisher_type is "empirical": differentiate the loss instead'
        with pytest.raises(ValueError, match="logits " + message):
            fisher.add(z)
        with pytest.raises(ValueError, match="hidden " + message):
            fisher.add_hidden(z, weight)


def test_logits_that_the_mask_of_the_batch_does_not_fit() -> None:
    fisher = Capture(made(), fisher_type="type-2").attach()
    with fisher.batch(mask=MASK):
        z = fisher._model(X)
        with pytest.raises(ValueError) as caught:
            fisher.add(z[:, :-1])
        assert str(caught.value) == (
            "logits has shape [2, 4, 4], which the mask of the batch, [2, 5], does not fit: pass "
            "the `mask` of its terms"
        )
        fisher.add(z[:, :-1], mask=MASK[:, :-1])
    assert fisher.layers["2"].G.count == 8  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ({"first": -1}, ValueError, "first is -1; allowed are ints >= 0"),
        ({"first": 1.0}, TypeError, "first has type float; expected an int"),
        ({"rank": 2, "ranks": 2}, ValueError, "rank is 2; allowed are 0 to 1, below ranks"),
        ({"rank": -1}, ValueError, "rank is -1; allowed are 0 to 0, below ranks"),
    ],
)
def test_numbers_of_samples(numbers: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Capture(made()).number_samples(**numbers)


# ---- states -------------------------------------------------------------------------------------


def filled(structure: str = "ekfac", seed: int = 0, **options: Any) -> Capture:
    fisher = Capture(made(), fisher_type="type-2", structure=structure, **options)
    with fisher:
        for _ in range(2):
            with fisher.batch():
                fisher.add(fisher._model(cases.drawn(2, 5, 3, seed=seed)))
            for layer in fisher.layers.values():
                if isinstance(layer, EigenCurvature):
                    layer.refresh()
    return fisher


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        del state[path[-1]]

    return change


def with_value(value: Any, *path: str) -> Callable[[dict[str, Any]], None]:
    def change(state: dict[str, Any]) -> None:
        for key in path[:-1]:
            state = state[key]
        state[path[-1]] = value

    return change


STATES: list[tuple[type[Exception], str, Callable[[dict[str, Any]], None]]] = [
    (KeyError, "state lacks A of layer 2", without("2")),
    (KeyError, "state lacks G of layer 0", without("0", "G")),
    (KeyError, "state lacks count", without("2", "A", "count")),
    (KeyError, "state lacks extra of layer 0", without("0", "extra")),
    (KeyError, "state lacks bases of layer 0", without("0", "extra", "bases")),
    (KeyError, "state lacks kept of layer 2", without("2", "extra", "kept")),
    (KeyError, "state lacks stale of layer 2", without("2", "extra", "stale")),
    (ValueError, "state holds layer 7, which this capture does not cover", with_value({}, "7")),
    (ValueError, "state has a sum of shape [2, 2]; expected [5, 5]",
     with_value(torch.zeros(2, 2), "2", "A", "sum")),
    (ValueError, "state has ema_decay 0.5; expected None", with_value(0.5, "2", "A", "ema_decay")),
    (ValueError, "state has bias False; expected True", with_value(False, "2", "A", "bias")),
    (TypeError, "sum must be a torch.Tensor, not float", with_value(1.0, "2", "A", "sum")),
    (ValueError, "state has bases of shapes [[2, 2], [3, 3]] of layer 0; expected [[4, 4], [4, 4]]",
     with_value((torch.eye(2), torch.eye(3)), "0", "extra", "bases")),
    (ValueError, "state has outputs of shape [2, 7] of layer 2; expected [n, 4]",
     with_value([torch.zeros(2, 7)], "2", "extra", "kept", "logits")),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "change"), STATES)
def test_states(
    error: type[Exception], message: str, change: Callable[[dict[str, Any]], None]
) -> None:
    """Of a layer under EKFAC, and a wide one; nothing is loaded of a state that does not fit."""
    fisher = filled(widest=3, layers=["0", "2"])
    assert isinstance(fisher.layers["2"], WideCurvature)
    narrow = filled(widest=3, seed=1, layers=["0", "2"])
    if "layer 0" in message:
        fisher, narrow = (filled(layers=["0"], seed=seed) for seed in (0, 1))
    state, before = narrow.state_dict(), fisher.state_dict()
    change(state["layers"])
    with pytest.raises(error) as caught:
        fisher.load_state_dict(state)
    assert caught.value.args[0].startswith(message)
    assert states_equal(fisher.state_dict(), before)


def test_a_state_that_lacks_a_part() -> None:
    fisher = filled()
    for part in ("samples", "layers"):
        state = fisher.state_dict()
        del state[part]
        with pytest.raises(KeyError, match=f"state lacks {part}"):
            fisher.load_state_dict(state)


def test_a_state_of_the_wrong_type() -> None:
    fisher = filled()
    before = fisher.state_dict()
    with pytest.raises(TypeError, match="state must be a mapping, not list"):
        fisher.load_state_dict([])  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="state lacks layers, samples"):
        fisher.load_state_dict({})
    with pytest.raises(TypeError, match="samples has type float; expected an int"):
        fisher.load_state_dict({**filled(seed=1).state_dict(), "samples": 1.0})
    assert states_equal(fisher.state_dict(), before)


# ---- merges -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "options"),
    [
        ("other has structure 'kfac'; expected 'ekfac'", {"structure": "kfac"}),
        ("other has kfac_approx 'reduce'; expected 'expand'", {"kfac_approx": "reduce"}),
        ("other covers different layers: 2 is in one of the two only", {"layers": ["0"]}),
        ("other does not keep layer 0 as this capture does", {"ema_decay": 0.5}),
        ("other does not keep layer 0 as this capture does", {"widest": 3}),
        ("other has another eigenbasis of layer 0", {"seed": 1}),
    ],
)
def test_merges(message: str, options: dict[str, Any]) -> None:
    fisher, other = filled(), filled(**options)
    states = fisher.state_dict(), other.state_dict()
    with pytest.raises(ValueError) as caught:
        fisher.merge_(other)
    assert str(caught.value) == message
    assert states_equal(fisher.state_dict(), states[0])
    assert states_equal(other.state_dict(), states[1])


def test_merges_with_something_else() -> None:
    fisher = filled()
    with pytest.raises(TypeError, match="other must be a Capture, not dict"):
        fisher.merge_({})  # type: ignore[arg-type]
    other = Capture(made(), fisher_type="mc", structure="ekfac")
    with pytest.raises(ValueError, match="other has fisher_type 'mc'; expected 'type-2'"):
        fisher.merge_(other)
    bare = Capture(made(), fisher_type="type-2", structure="ekfac")
    with pytest.raises(ValueError, match="other has another eigenbasis of layer 0"):
        fisher.merge_(bare)


# ---- results that are not there yet -------------------------------------------------------------


def test_a_wide_layer_that_saw_nothing() -> None:
    fisher = Capture(made(), widest=3)
    layer = fisher.layers["2"]
    assert isinstance(layer, WideCurvature)
    with pytest.raises(ValueError, match="2 has no curvature yet: no batch was captured"):
        layer.operator()
    assert layer.outputs() is None
    assert not any(value.any() for value in layer.diagonal().values())
