"""Which tokens are of which sample: what is exact per sample, and what has to be left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import cases
from curvature.cases import EXACT, B, V
from fisherkern.curvature import Capture, estimate_fisher
from fisherkern.optim import KFACPreconditioner

APART = "called on tokens of shape .* their gradients cannot be told apart"
S = 4


class Cut(nn.Module):
    """A layer that is given the tokens of samples in another shape, and one term per sample."""

    def __init__(self, layer: nn.Module, shape: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.layer, self.shape = nn.Linear(3, 3), layer, shape

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(self.shape(self.first(x).tanh())).tanh()
        return h.reshape(len(x), -1) @ cases.drawn(h.numel() // len(x), V, seed=7)


def windows(x: Tensor) -> Tensor:
    """[B · 2, S / 2, d]."""
    return x.reshape(-1, S // 2, x.shape[-1])


def flat(x: Tensor) -> Tensor:
    """[B · S, d]."""
    return x.flatten(0, 1)


def cut(layer: nn.Module, shape: Callable[[Tensor], Tensor]) -> Any:
    return cases.filled(Cut(layer, shape))


def truth(model: Any, x: Tensor) -> Tensor:
    return cases.block(model, model.layer, model(x))


# ---- tokens of samples that are not the first dimension -----------------------------------------

LAYERS = {
    "linear": lambda: nn.Linear(3, 4),
    "norm": lambda: nn.LayerNorm(3),
}


@pytest.mark.parametrize("structure", ["diagonal", "block", "ekfac", "low-rank"])
@pytest.mark.parametrize("kind", LAYERS)
def test_windows_are_left_out_where_samples_matter(kind: str, structure: str) -> None:
    """Whether samples or windows come first cannot be seen; the layers around are not affected."""
    model, x = cut(LAYERS[kind](), windows), cases.drawn(B, S, 3)
    with pytest.warns(RuntimeWarning, match=f"^layer: {APART}") as caught:
        fisher = cases.captured(model, x, structure=structure)
    assert len(caught) == 1
    assert set(fisher.uncovered()) == {"layer.weight", "layer.bias"}
    first = cases.captured(model, x, structure=structure, layers=["first"])
    found = fisher.layers["first"].diagonal()
    for role, value in first.layers["first"].diagonal().items():
        assert torch.equal(found[role], value)


def test_windows_are_rows_like_others() -> None:
    """The factors of K-FAC are sums over rows, whichever sample these are of."""
    model, x = cut(nn.Linear(3, 4), windows), cases.drawn(B, S, 3)
    fisher = cases.captured(model, x)
    assert fisher.uncovered() == {}
    with cases.watched(model.layer) as outputs:
        logits = model(x)
    expected = cases.type_2(logits, outputs[0], lambda g: g.flatten(0, 1))
    assert cases.error(fisher.layers["layer"].G.factor(), expected) < EXACT  # type: ignore[attr-defined]
    assert fisher.layers["layer"].A.count == B * S  # type: ignore[attr-defined]


@pytest.mark.parametrize("structure", ["diagonal", "block"])
def test_windows_of_sampled_labels_are_summed_over_all_samples(structure: str) -> None:
    """Without bias: products of windows of a sample stay, those of samples cancel on average."""
    model, x = cut(nn.Linear(3, 2), windows), cases.drawn(B, S, 3)
    groups, found = 30, []
    generator = cases.generator(0)
    options: dict[str, Any] = {"structure": structure, "layers": ["layer"], "mc_samples": 40}
    for _ in range(groups):
        fisher = cases.captured(model, x, "mc", generator=generator, **options)
        found.append(torch.cat([v.flatten() for v in fisher.layers["layer"].diagonal().values()]))
    spread = torch.stack(found).std(0) / groups**0.5
    # the columns of the matrix [2, 3 + 1], the bias last
    matrix = truth(model, x).diagonal().view(2, 4)
    expected = torch.cat([matrix[:, :3].flatten(), matrix[:, 3]])
    # five standard errors, for a fixed seed
    assert ((torch.stack(found).mean(0) - expected).abs() <= 5 * spread).all()
    assert spread.norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("structure", ["diagonal", "block"])
@pytest.mark.parametrize("shape", [windows, flat])
@pytest.mark.parametrize("kind", LAYERS)
def test_of_one_sample_all_tokens_are_its_own(
    kind: str, shape: Callable[[Tensor], Tensor], structure: str
) -> None:
    model, x = cut(LAYERS[kind](), shape), cases.drawn(1, S, 3)
    fisher = cases.captured(model, x, structure=structure, kfac_approx="reduce")
    matrix = truth(model, x)
    found = fisher.layers["layer"]
    expected = found.layer.split(matrix.diagonal().view(found.layer.d_out, -1))
    for role, value in found.diagonal().items():
        assert cases.error(value, expected[role]) < EXACT


class Frames(nn.Module):
    """A convolution over the frames of films, [B · T, C, H, W]; logits [B, T, V] or [B, V]."""

    def __init__(self, per_frame: bool) -> None:
        super().__init__()
        self.layer, self.per_frame = nn.Conv2d(2, 3, 2), per_frame

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x.flatten(0, 1)).tanh().reshape(*x.shape[:2], -1)
        z = h @ cases.drawn(h.shape[-1], V, seed=7)
        # frames of a sample mix, as they do in attention
        z = z + z.roll(1, 1).tanh()
        return z if self.per_frame else z.sum(1)


@pytest.mark.parametrize("structure", ["diagonal", "block"])
@pytest.mark.parametrize(("samples", "per_frame"), [(1, False), (1, True), (B, True)])
def test_frames_of_films(samples: int, per_frame: bool, structure: str) -> None:
    model, x = cases.filled(Frames(per_frame)), cases.drawn(samples, 2, 2, 3, 3)
    fisher = cases.captured(model, x, structure=structure, exact_positions=True)
    found = torch.cat(
        [v.flatten(1) for v in map(as_rows, fisher.layers["layer"].diagonal().values())], 1
    )
    assert cases.error(found, truth(model, x).diagonal().view(3, -1)) < EXACT


def as_rows(value: Tensor) -> Tensor:
    return value.reshape(len(value), -1)


def test_frames_of_films_that_have_one_term_are_left_out() -> None:
    model, x = cases.filled(Frames(False)), cases.drawn(B, 2, 2, 3, 3)
    with pytest.warns(RuntimeWarning, match=f"^layer: {APART}"):
        cases.captured(model, x, structure="diagonal")
    whole = cases.captured(model, x)
    with cases.watched(model.layer) as outputs:
        logits = model(x)
    expected = cases.type_2(logits, outputs[0], lambda g: cases.channels_last(g).flatten(0, 1))
    assert cases.error(whole.layers["layer"].G.factor(), expected) < EXACT  # type: ignore[attr-defined]


# ---- "empirical" learns the samples from the logits ----------------------------------------------


def per_sample(model: Any, x: Tensor, y: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Squares of the gradients of each sample's loss, over the number of terms."""
    parameters = dict(module.named_parameters())
    total = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for b in range(len(x)):
        logits = model(x[b : b + 1])
        loss = functional.cross_entropy(logits.flatten(0, -2), y[b].flatten(), reduction="sum")
        for name, g in zip(
            total, torch.autograd.grad(loss, list(parameters.values())), strict=True
        ):
            total[name] += g.square() / y.numel()
    return total


@pytest.mark.parametrize("structure", ["diagonal", "block"])
@pytest.mark.parametrize("kind", LAYERS)
def test_tokens_that_the_model_flattened_without_a_mask(kind: str, structure: str) -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = LAYERS[kind]()

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x.flatten(0, 1)).tanh().reshape(*x.shape[:2], -1)
            h = h + h.roll(1, 1).tanh()
            return h @ cases.drawn(h.shape[-1], V, seed=7)

    model, x, y = cases.filled(Language()), cases.drawn(B, S, 3), cases.labels(B, S)
    fisher = estimate_fisher(
        model,
        [(x, y)],
        fisher_type="empirical",
        structure=structure,
        kfac_approx="reduce",
        progress=False,
    )
    found = fisher.layers["layer"].diagonal()
    for name, value in per_sample(model, x, y, model.layer).items():
        assert cases.error(found[name], value) < EXACT


# ---- tokens that all samples share --------------------------------------------------------------


class Relative(nn.Module):
    """A bias of attention by the distance of positions [S, S], as of T5, and a norm of [2 k]."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(6, 3)
        self.bias, self.norm = nn.Embedding(2 * S, 1), nn.LayerNorm(3)
        self.table = nn.Parameter(torch.ones(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1])
        bias = self.bias(position[:, None] - position + S)[..., 0]
        h = self.token(x) + (bias @ self.norm(self.table)[: x.shape[1]])
        return h.tanh() @ cases.drawn(3, V, seed=7)


SHARED = ["bias.weight", "norm.weight", "norm.bias"]


def mask_of(x: Tensor) -> Tensor:
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[0, -1] = False
    return mask


@pytest.mark.parametrize("structure", ["kfac", "diagonal"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_shared_tokens_are_left_out(fisher_type: str, masked: bool, structure: str) -> None:
    model, x = cases.filled(Relative()), torch.randint(6, (B, S), generator=cases.generator(3))
    with pytest.warns(RuntimeWarning, match=APART) as caught:
        fisher = estimate_fisher(
            model,
            [(x, cases.labels(B, S))],
            mask_of=lambda args, kwargs: mask_of(args[0]) if masked else None,
            fisher_type=fisher_type,
            structure=structure,
            progress=False,
        )
    assert len(caught) == 2
    assert sorted(fisher.uncovered()) == sorted(["table", *SHARED])


def test_a_training_loop_knows_the_samples_by_the_logits() -> None:
    model, x = cases.filled(Relative()), torch.randint(6, (B, S), generator=cases.generator(3))
    preconditioner = KFACPreconditioner(model, fisher_type="empirical")
    loss = functional.cross_entropy(model(x).flatten(0, 1), cases.labels(B, S).flatten())
    with pytest.warns(RuntimeWarning, match=APART):
        loss.backward()
    preconditioner.detach()
    assert sorted(preconditioner.capture.uncovered()) == sorted(["table", *SHARED])


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
def test_a_training_loop_of_one_output_needs_the_gradients_of_its_loss(fisher_type: str) -> None:
    model = nn.Linear(3, 1)
    preconditioner = KFACPreconditioner(model, fisher_type=fisher_type)
    if fisher_type == "empirical":
        z = model(torch.ones(2, 3))
        functional.binary_cross_entropy_with_logits(z, torch.ones(2, 1)).backward()
    else:
        with pytest.raises(ValueError, match=r"^logits has shape \[2, 1\]: of one class the soft"):
            model(torch.ones(2, 3))
    preconditioner.detach()


def test_shared_tokens_of_sampled_labels_under_a_mask() -> None:
    """They count where they do for any sample, as if there were no mask."""
    model, x = cases.filled(Relative()), torch.randint(6, (B, S), generator=cases.generator(3))
    terms = mask_of(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        masked, bare = (
            cases.captured(
                model, x, "mc", mask, terms, generator=cases.generator(0), layers=["bias", "norm"]
            )
            for mask in (terms, None)
        )
    cases.assert_same(masked, bare, bits=True)
    assert masked.layers["bias"].G.factor().any()  # type: ignore[attr-defined]


def test_one_sample_under_a_mask_that_masks_nothing() -> None:
    """Tokens of another number than S are no mistake there."""
    model, x = cases.filled(Relative()), torch.arange(S).unsqueeze(0)
    mask = torch.ones_like(x, dtype=torch.bool)
    cases.assert_same(cases.captured(model, x, mask=mask), cases.captured(model, x), bits=True)


def test_heads_of_one_sample_of_which_logits_are_flattened() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LayerNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x).tanh().flatten(-2)  # [1, S, heads, 3]
            return (h @ cases.drawn(h.shape[-1], V, seed=7)).flatten(0, 1)

    model, x = cases.filled(Flat()), cases.drawn(1, S, 2, 3)
    fisher = cases.captured(model, x, structure="block", kfac_approx="reduce", exact_positions=True)
    assert fisher.uncovered() == {}
    fisher = cases.captured(model, x, structure="block")
    with cases.watched(model.layer) as outputs:
        logits = model(x)

    def rows(g: Tensor) -> Tensor:
        return cases.scores(model, cases.centred(x), g).flatten(0, 2)

    expected = cases.type_2(logits, outputs[0], rows)
    assert cases.error(fisher.layers["layer"].matrix(), expected) < EXACT  # type: ignore[attr-defined]


# ---- as many heads as positions -----------------------------------------------------------------


class Heads(nn.Module):
    """A norm on [B, heads, S, d]."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LayerNorm(3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = self.layer(x.transpose(1, 2)).transpose(1, 2)
        y = torch.where(mask[..., None, None], y, 0.0)
        return y.tanh().flatten(1) @ cases.drawn(y[0].numel(), V, seed=7)


def test_heads_that_are_as_many_as_positions() -> None:
    """The mask may be over either; what was seen of calls of another length tells."""
    model, x, mask = cases.filled(Heads()), cases.drawn(B, S, S, 3), mask_of(torch.ones(B, S))
    fisher = Capture(model, fisher_type="type-2").attach()

    def batch(x: Tensor, mask: Tensor) -> Tensor:
        with fisher.batch(mask=mask):
            logits = model(x, mask)
            fisher.add(logits, mask=mask[:, 0])
        return fisher.layers["layer"].matrix()  # type: ignore[attr-defined, no-any-return]

    message = (
        r"^mask has shape \[3, 4\], but layer was called on tokens of shape \[3, 4, 4\], of wh"
    )
    with pytest.raises(ValueError, match=message):
        batch(x, mask)
    fresh = cases.captured(model, x, mask=mask | True, over=mask[:, 0], arguments=(mask | True,))
    bare = cases.captured(model, x, over=mask[:, 0], arguments=(mask | True,))
    cases.assert_same(fresh, bare, bits=True)
    before = batch(x[:, :3], mask[:, 1:])
    after = batch(x, mask)

    def one(x: Tensor, mask: Tensor) -> Tensor:
        with cases.watched(model.layer) as outputs:
            logits = model(x, mask)

        def rows(g: Tensor) -> Tensor:
            normalised = cases.centred(x.transpose(1, 2))
            return cases.scores(model, normalised, g).transpose(1, 2)[mask].flatten(0, 1)

        return cases.type_2(logits, outputs[0], rows)

    assert cases.error(before, one(x[:, :3], mask[:, 1:])) < EXACT
    assert cases.error(after, (one(x[:, :3], mask[:, 1:]) + one(x, mask)) / 2) < EXACT


# ---- a mask of other samples --------------------------------------------------------------------


def test_a_mask_of_other_samples_is_refused_with_the_logits() -> None:
    """In a layer the tokens may be shared; logits are of samples."""
    model, x = cases.filled(cases.TokenNet(nn.Linear(3, 4))), cases.drawn(2, 5, 3)
    fisher = Capture(model, fisher_type="type-2").attach()
    with fisher.batch(mask=torch.ones(3, dtype=torch.bool)):
        logits = model(x)
        with pytest.raises(ValueError) as caught:
            fisher.add(logits)
    assert str(caught.value) == (
        "logits has shape [2, 5, 4], which the mask of the batch, [3], does not fit: pass the "
        "`mask` of its terms"
    )
