"""The scaling contract: splits, merges, saving, empty batches, NaN, and moving averages."""

from __future__ import annotations

import io
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import cases
from curvature.cases import EXACT
from fisherkern.curvature import Capture, EigenCurvature, WideCurvature

STRUCTURES = ("kfac", "ekfac", "diagonal", "block")
IGNORED = -100


class Net(nn.Module):
    """A term at every position, which depends on those before it; a norm, and a wide head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3, padding_idx=0)
        self.body, self.norm = nn.Linear(3, 3), nn.LayerNorm(3)
        self.head = nn.Linear(3, cases.V)
        self.mixes = True

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.embedding(x))
        h = h.cumsum(1) if self.mixes else h
        return self.head(self.norm(h.tanh()))


X = torch.randint(6, (7, 4), generator=cases.generator(0))
MASK = torch.arange(4) < torch.tensor([4, 2, 0, 3, 1, 4, 3])[:, None]
WHOLE = slice(0, 7)
PARTS = (slice(0, 2), slice(2, 3), slice(3, 7))


def made(fisher_type: str, structure: str, **options: Any) -> Capture:
    kind, reduction = fisher_type, "mean"
    if fisher_type.startswith("empirical-"):
        kind, reduction = "empirical", fisher_type.removeprefix("empirical-")
    return Capture(
        cases.filled(Net()),
        fisher_type=kind,
        loss_reduction=reduction,
        structure=structure,
        **options,
    )


def batch(fisher: Capture, part: slice, mask: Tensor = MASK, new_step: bool = True) -> None:
    empirical = fisher.fisher_type == "empirical"
    with fisher, fisher.batch(mask=mask[part], new_step=new_step):
        logits = fisher._model(X[part])
        if not empirical:
            fisher.add(logits)
            return
        y = torch.where(mask[part], cases.labels(7, 4)[part], IGNORED)
        loss = functional.cross_entropy(
            logits.flatten(0, 1),
            y.flatten(),
            ignore_index=IGNORED,
            reduction=fisher.loss_reduction,
        )
        loss.backward()


def refresh(fisher: Capture) -> None:
    for layer in fisher.layers.values():
        if isinstance(layer, EigenCurvature):
            layer.refresh()


def fresh(fisher_type: str, structure: str, **options: Any) -> Capture:
    """A capture that has seen nothing; of EKFAC with eigenbases, so that moments are averaged."""
    fisher = made(fisher_type, structure, **options)
    if structure == "ekfac":
        other = made(fisher_type, structure, **options)
        batch(other, WHOLE)
        refresh(other)
        for name, layer in fisher.layers.items():
            if isinstance(layer, EigenCurvature):
                layer.load_extra_state(other.layers[name].extra_state())
    return fisher


def states_equal(one: Any, other: Any) -> bool:
    """Bit by bit."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(states_equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(states_equal, one, other))
    return bool(one == other)


# ---- splits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher_type", cases.TYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_any_split_is_the_union(approx: str, structure: str, fisher_type: str) -> None:
    singles = [slice(i, i + 1) for i in range(7)]
    results = []
    for parts in ([WHOLE], PARTS, singles):
        results.append(fresh(fisher_type, structure, kfac_approx=approx))
        for part in parts:
            batch(results[-1], part)
    whole, *splits = results
    for split in splits:
        cases.assert_same(split, whole)
    assert all(value.any() for value in cases.averages(whole).values())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_terms_are_those_of_the_mask(structure: str) -> None:
    for layer in made("type-2", structure).layers.values():
        for average in layer.averages.values():
            assert average.count == 0
    fisher = made("type-2", structure)
    batch(fisher, WHOLE)
    used = (MASK & (X != 0)).sum()
    for name, layer in fisher.layers.items():
        for key, average in layer.averages.items():
            rows = used if name == "embedding" else MASK.sum()
            assert average.count == (rows if key == "A" else 0 if key == "moments" else MASK.sum())


@pytest.mark.parametrize("decay", [None, 0.6])
@pytest.mark.parametrize("fisher_type", cases.TYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_micro_batches_are_one_step(structure: str, fisher_type: str, decay: float | None) -> None:
    whole, split = (fresh(fisher_type, structure, ema_decay=decay) for _ in range(2))
    for step in (slice(0, 3), WHOLE):
        batch(whole, step)
        batch(split, step)
    batch(whole, WHOLE)
    for index, part in enumerate(PARTS):
        batch(split, part, new_step=index == 0)
    cases.assert_same(split, whole)


@pytest.mark.parametrize("fisher_type", cases.TYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_merged_captures_are_one(structure: str, fisher_type: str) -> None:
    whole, one, two = (fresh(fisher_type, structure, exact_positions=True) for _ in range(3))
    batch(whole, WHOLE)
    batch(one, slice(0, 3))
    two.number_samples(3)
    batch(two, slice(3, 7))
    assert one.merge_(two) is one
    cases.assert_same(one, whole)


def test_ranks_that_number_their_samples_have_the_signs_of_the_whole() -> None:
    whole, one, two = (made("type-2", "diagonal") for _ in range(3))
    for rank, fisher in enumerate((one, two)):
        fisher.number_samples(rank=rank, ranks=2)
    for first in (0, 2):
        batch(whole, slice(first, first + 2))
        batch(one, slice(first, first + 1))
        batch(two, slice(first + 1, first + 2))
    cases.assert_same(one.merge_(two), whole)


@pytest.mark.parametrize("fisher_type", cases.TYPES)
def test_merged_tokens_of_a_wide_layer_are_those_of_one_step(fisher_type: str) -> None:
    whole, one, two = (made(fisher_type, "kfac", widest=3, stride=1) for _ in range(3))
    for fisher in (whole, one, two):
        batch(fisher, slice(0, 1))
    batch(whole, slice(3, 7))
    batch(one, slice(3, 5))
    batch(two, slice(5, 7))
    one.merge_(two)
    assert cases.error(outputs(one), outputs(whole)) < EXACT
    # a capture that saw nothing of the step adds nothing to it
    late = made(fisher_type, "kfac", widest=3, stride=1)
    batch(late, slice(0, 1))
    late.layers["head"].begin_step()
    for first, second in ((one, late), (late, one)):
        first.merge_(second)
        assert cases.error(outputs(first), outputs(whole)) < EXACT


def outputs(fisher: Capture) -> Tensor:
    head = fisher.layers["head"]
    assert isinstance(head, WideCurvature)
    G = head.outputs()
    assert G is not None
    return G.to_dense()


# ---- saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("widest", [3, 100])
@pytest.mark.parametrize("fisher_type", cases.TYPES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_save_and_resume_give_the_same_bits(structure: str, fisher_type: str, widest: int) -> None:
    options: dict[str, Any] = {"ema_decay": 0.7, "widest": widest, "stride": 2}
    through = made(fisher_type, structure, **options)
    batch(through, PARTS[0])
    refresh(through)
    batch(through, PARTS[1])
    for layer in through.layers.values():
        layer.begin_step()  # a step that had no part so far
    file = io.BytesIO()
    torch.save(through.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = made(fisher_type, structure, **options)
    resumed.load_state_dict(saved)
    assert states_equal(resumed.state_dict(), saved)
    for fisher in (through, resumed):
        batch(fisher, PARTS[2])
    assert states_equal(resumed.state_dict(), through.state_dict())
    assert not states_equal(resumed.state_dict(), saved)
    for name, layer in through.layers.items():
        for role, value in layer.diagonal().items():
            assert torch.equal(resumed.layers[name].diagonal()[role], value)


def test_a_saved_state_is_a_copy() -> None:
    fisher = made("type-2", "ekfac", widest=3)
    batch(fisher, PARTS[0])
    refresh(fisher)
    saved = fisher.state_dict()
    other = made("type-2", "ekfac", widest=3)
    other.load_state_dict(saved)
    before = io.BytesIO()
    torch.save(saved, before)
    for part in PARTS:
        batch(fisher, part)
        batch(other, part)
    before.seek(0)
    assert states_equal(saved, torch.load(before))


# ---- nothing to count ---------------------------------------------------------------------------


@pytest.mark.parametrize("fisher_type", [*cases.TYPES, "mc"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_batch_of_padding_alone(structure: str, fisher_type: str) -> None:
    """N = 0: zeros while nothing else was seen, and no change afterwards."""
    fisher, nothing = made(fisher_type, structure, widest=3), torch.zeros_like(MASK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch(fisher, WHOLE, mask=nothing)
    for value in cases.averages(fisher).values():
        assert (value == 0).all()
    for layer in fisher.layers.values():
        for value in layer.diagonal().values():
            assert (value == 0).all()
    batch(fisher, WHOLE)
    before = cases.averages(fisher)
    batch(fisher, WHOLE, mask=nothing)
    for name, value in cases.averages(fisher).items():
        assert torch.equal(value, before[name]), name
    assert all(value.any() for name, value in before.items() if "moments" not in name)


# ---- NaN ----------------------------------------------------------------------------------------


class Spoil(torch.autograd.Function):
    """The identity; where `when` holds a NaN comes into the gradient of the first token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, when: Any) -> Tensor:
        ctx.when = when
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        g = gradients[0].clone()
        if ctx.when():
            g.view(-1)[0] = torch.nan
        return g, None


class Branches(nn.Module):
    """Of two branches one has a gradient that may be spoilt, after `good` passes that are not."""

    def __init__(self, calls: int = 1) -> None:
        super().__init__()
        self.good, self.bad, self.calls = nn.Linear(3, 3), nn.Linear(3, 3), calls
        self.spoilt, self.passes = False, 0

    def _when(self) -> bool:
        self.passes += 1
        return self.spoilt and self.passes > 1

    def forward(self, x: Tensor) -> Tensor:
        self.passes, h = 0, x
        for _ in range(self.calls):
            h = Spoil.apply(self.bad(h).tanh(), self._when)
        return (self.good(x) + h).tanh() @ cases.drawn(3, cases.V, seed=7)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize(
    ("fisher_type", "calls"), [("type-2", 1), ("type-2", 3), ("mc", 3), ("empirical", 3)]
)
def test_nan_leaves_a_layer_out(fisher_type: str, calls: int, structure: str) -> None:
    """Even where some of its gradients had been added: a later column, or an earlier call."""
    model, x = cases.filled(Branches(calls)), cases.drawn(4, 3)

    def once(fisher: Capture) -> None:
        with fisher, fisher.batch(terms=4):
            logits = model(x)
            if fisher_type == "empirical":
                functional.cross_entropy(logits, cases.labels(4)).backward()
            else:
                fisher.add(logits)

    found, expected = (
        Capture(
            model,
            fisher_type=fisher_type,
            structure=structure,
            ema_decay=0.5,
            generator=cases.generator(0),
        )
        for _ in range(2)
    )
    for fisher in (found, expected):
        once(fisher)
        refresh(fisher)
    model.spoilt = True
    before = found.layers["bad"].state_dict()
    with pytest.warns(RuntimeWarning, match=r"^bad: inputs or gradients hold NaN"):
        once(found)
    with warnings.catch_warnings():  # said once
        warnings.simplefilter("error")
        once(found)
    after = found.layers["bad"].state_dict()
    for key in before:
        if key != "extra":  # but that steps were begun
            assert torch.equal(after[key]["sum"], before[key]["sum"])
            assert torch.equal(after[key]["count"], before[key]["count"])
    assert states_equal(after["extra"], before["extra"])
    model.spoilt = False
    once(expected)
    once(expected)
    for fisher in (found, expected):
        once(fisher)
    mine, theirs = cases.averages(found), cases.averages(expected)
    for name, value in mine.items():
        assert value.isfinite().all()
        if name.startswith("good") and fisher_type != "mc":
            assert torch.equal(value, theirs[name])


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("fisher_type", [*cases.TYPES, "mc"])
def test_nan_in_the_input_of_a_token_that_counts(fisher_type: str, structure: str) -> None:
    fisher, spoilt = made(fisher_type, structure, widest=3, layers=["norm", "head"]), X[0, 0]
    fisher._model.mixes = False
    batch(fisher, PARTS[2])
    before, kept = cases.averages(fisher), fisher.layers["head"].diagonal()
    fisher._model.embedding.weight.data[spoilt] = torch.nan
    with pytest.warns(RuntimeWarning, match="hold NaN") as caught:
        batch(fisher, PARTS[0])
    assert sorted(str(w.message).split(":")[0] for w in caught) == ["head", "norm"]
    for name, value in cases.averages(fisher).items():
        assert torch.equal(value, before[name]), name
    for role, value in fisher.layers["head"].diagonal().items():
        assert torch.equal(value, kept[role])
    # where the token is padding nothing is left out
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch(fisher, PARTS[0], mask=MASK & (spoilt != X))
    changed = cases.averages(fisher)
    assert any(not torch.equal(value, before[name]) for name, value in changed.items())
    assert all(value.isfinite().all() for value in changed.values())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_nan_in_inputs_whose_gradients_are_finite(structure: str) -> None:
    model = cases.filled(nn.Sequential(nn.Linear(3, 2)))
    fisher = Capture(model, fisher_type="empirical", loss_reduction="sum", structure=structure)
    x = torch.full((4, 3), torch.nan, dtype=torch.float64)
    match = r"^0: inputs or gradients hold NaN"
    with pytest.warns(RuntimeWarning, match=match), fisher, fisher.batch(terms=4):
        model(x).sum().backward()
    assert not any(value.any() for value in cases.averages(fisher).values())


# ---- moving averages ----------------------------------------------------------------------------


class Experts(nn.Module):
    """A layer that every sample meets, and one that is called only when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.seldom = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor, both: bool) -> Tensor:
        h = self.always(x)
        if both:
            h = h + self.seldom(x)
        return h.tanh() @ cases.drawn(3, cases.V, seed=7)


@pytest.mark.parametrize("beta", [0.0, 0.6])
def test_moving_average_by_hand(beta: float) -> None:
    """Steps of 4, 2 and 5 samples, the second without one of the layers."""
    model = cases.filled(Experts())
    fisher = Capture(model, fisher_type="type-2", ema_decay=beta)
    steps = [(cases.drawn(n, 3, seed=n), both) for n, both in ((4, True), (2, False), (5, True))]
    sums = {name: {"A": 0.0, "G": 0.0, "a": 0.0, "g": 0.0} for name in ("always", "seldom")}
    for x, both in steps:
        with fisher, fisher.batch():
            fisher.add(model(x, both))
        for name, total in sums.items():
            module, N = getattr(model, name), len(x)
            with cases.watched(module) as outputs:
                logits = model(x, both)
            for key in total:
                total[key] = beta * total[key]
            # without a call the gradient of N terms is zero, and there is no row of inputs
            total["g"] += (1 - beta) * N
            if outputs:
                total["G"] += (1 - beta) * N * cases.type_2(logits, outputs[0], lambda g: g)
                rows = torch.cat([x, torch.ones(N, 1, dtype=x.dtype)], 1)
                total["A"] += (1 - beta) * rows.T @ rows
                total["a"] += (1 - beta) * N
            layer: Any = fisher.layers[name]
            if total["a"]:
                assert cases.error(layer.A.factor(), total["A"] / total["a"]) < EXACT
            assert (
                cases.error(layer.G.factor(), total["G"] / total["g"] + 0 * layer.G.factor())
                < EXACT
            )
            assert abs(layer.G.count - total["g"]) < 1e-14


def test_merged_ranks_of_which_one_did_not_call_a_layer() -> None:
    model, x = cases.filled(Experts()), cases.drawn(9, 3)
    whole, one, two = (Capture(model, fisher_type="type-2", ema_decay=0.6) for _ in range(3))
    parts = [  # step, samples, whether the second layer is called, rank
        (0, slice(0, 3), True, one),
        (0, slice(3, 5), True, two),
        (1, slice(5, 7), True, one),
        (1, slice(7, 9), False, two),
    ]
    before = -1
    for step, part, both, rank in parts:
        for fisher, new_step in ((whole, step != before), (rank, True)):
            with fisher, fisher.batch(new_step=new_step):
                fisher.add(model(x[part], both))
        before = step
    cases.assert_same(one.merge_(two), whole)


def test_without_decay_steps_are_averaged_alike() -> None:
    model = cases.filled(Experts())
    fisher = Capture(model, fisher_type="type-2", structure="diagonal")
    x = cases.drawn(6, 3)
    for part, both in ((slice(0, 4), True), (slice(4, 6), False)):
        with fisher, fisher.batch():
            fisher.add(model(x[part], both))
    truth = cases.block(model, model.seldom, model(x[:4], True)).diagonal() * 4 / 6
    diagonal = cases.matrix(model.seldom, fisher.layers["seldom"].diagonal()).flatten()
    assert cases.error(diagonal, truth) < EXACT
