"""estimate_fisher: a loop over a data loader, whatever it gives, that can be interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_llama
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import cases
from fisherkern.curvature import Capture, EigenCurvature, estimate_fisher
from fisherkern.curvature._models import mask_reader

EXACT = cases.EXACT


def model() -> nn.Module:
    return cases.filled(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)))


def pairs(count: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(cases.drawn(n + 2, 3, seed=n), torch.arange(n + 2) % 4) for n in range(count)]


def estimated(batches: Any, fisher_type: str = "type-2", **options: Any) -> Capture:
    network = options.pop("model") if "model" in options else model()
    return estimate_fisher(network, batches, fisher_type=fisher_type, progress=False, **options)


@pytest.mark.parametrize("structure", ["kfac", "diagonal", "block"])
def test_it_is_the_capture_of_the_union(structure: str) -> None:
    network, x = model(), torch.cat([x for x, _ in pairs()])
    whole = cases.captured(network, x, structure=structure)
    cases.assert_same(estimated(pairs(), structure=structure, model=network), whole)


def test_empirical_leaves_gradients_alone() -> None:
    network = model()
    x, y = (torch.cat(parts) for parts in zip(*pairs(), strict=True))
    fisher = Capture(network, fisher_type="empirical", loss_reduction="sum")
    with fisher, fisher.batch(terms=len(y)):
        functional.cross_entropy(network(x), y, reduction="sum").backward()
    network.zero_grad(set_to_none=True)
    cases.assert_same(estimated(pairs(), "empirical", model=network), fisher)
    assert all(p.grad is None for p in network.parameters())


def test_inputs_alone_and_mappings() -> None:
    class Named(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            return {"logits": self.inner(x)}

    network = model()
    whole = cases.averages(estimated(pairs(), model=network))
    alone = cases.averages(estimated([x for x, _ in pairs()], model=network))
    named = estimated([{"x": x, "labels": y} for x, y in pairs()], model=Named(network))
    for name, value in whole.items():
        assert torch.equal(alone[name], value)
    for mine, theirs in zip(cases.averages(named).values(), whole.values(), strict=True):
        assert cases.error(mine, theirs) < EXACT


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
def test_language_models(fisher_type: str) -> None:
    """Labels are those of the next token, and −100 or padding are no terms."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = tiny_llama.config(vocab_size=17)
    network = transformers.LlamaForCausalLM(config).double()
    tokens = torch.arange(10).view(2, 5) % 17
    labels = tokens.clone()
    labels[1, 3:] = -100
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    batch = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    found = estimated([batch], fisher_type, model=network)
    terms = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    fisher = Capture(network, fisher_type=fisher_type, loss_reduction="sum")
    with fisher, fisher.batch(mask=mask.bool(), terms=6):
        output = network(**batch)
        if fisher_type == "type-2":
            fisher.add(output.logits, mask=terms)
        else:  # transformers' own loss is one of float32
            kept, targets = output.logits[terms], labels.roll(-1, 1)[terms]
            functional.cross_entropy(kept, targets, reduction="sum").backward()
    cases.assert_same(found, fisher)


def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(tiny_llama.config(vocab_size=17)).double().eval()


TOKENS = torch.arange(10).view(2, 5) % 17
LABELS = torch.where(torch.arange(5) < torch.tensor([[5], [3]]), TOKENS, -100)


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
def test_pairs_and_mappings_have_the_same_terms(fisher_type: str) -> None:
    """Six tokens have a label that follows them; those of the data are used by "empirical"."""
    network = llama()
    pair, mapping = (
        estimated([batch], fisher_type, model=network, generator=cases.generator(0))
        for batch in ((TOKENS, LABELS), {"input_ids": TOKENS, "labels": LABELS})
    )
    cases.assert_same(pair, mapping, bits=True)
    assert pair.layers["lm_head"].G.count == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
def test_the_last_position_of_a_causal_model_is_no_term(fisher_type: str) -> None:
    network = llama()
    batches = [
        TOKENS,
        {"input_ids": TOKENS},
        {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)},
        (TOKENS, TOKENS),
    ]
    first, *others = (
        estimated([batch], fisher_type, model=network, generator=cases.generator(0))
        for batch in batches
    )
    assert first.layers["lm_head"].G.count == 8  # type: ignore[attr-defined]
    for other in others:
        cases.assert_same(first, other)


def test_terms_of_the_caller_end_where_labels_do() -> None:
    """The last position has no label, and none of the first token either."""
    found, expected = (
        estimated(
            [(TOKENS, LABELS)],
            "empirical",
            model=llama(),
            terms_of=lambda kwargs, logits, terms=terms: terms,
        )
        for terms in (torch.ones(2, 5).bool(), LABELS.roll(-1, 1).ne(-100) & (torch.arange(5) < 4))
    )
    cases.assert_same(found, expected, bits=True)
    assert found.layers["lm_head"].G.count == 6  # type: ignore[attr-defined]


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
def test_labels_that_are_no_terms(fisher_type: str) -> None:
    network, x = model(), cases.drawn(6, 3)
    y = torch.tensor([0, 1, 2, -100, -100, 3])
    found = estimated([(x, y)], fisher_type, model=network, generator=cases.generator(0))
    assert found.layers["0"].G.count == 4  # type: ignore[attr-defined]
    if fisher_type != "mc":
        kept = estimated([(x[y >= 0], y[y >= 0])], fisher_type, model=network)
        theirs = kept.layers["0"].G.factor()  # type: ignore[attr-defined]
        assert cases.error(found.layers["0"].G.factor(), theirs) < EXACT  # type: ignore[attr-defined]


def renamed(network: Any) -> Any:
    network.__class__ = type("Mine", (type(network),), {})
    return network


@pytest.mark.parametrize(
    "wrap",
    [renamed, lambda m: torch.compile(m, backend="eager"), nn.DataParallel],
    ids=["subclass", "compiled", "parallel"],
)
def test_labels_are_shifted_whatever_the_model_is_called(wrap: Callable[[Any], Any]) -> None:
    torch._dynamo.reset()
    batch = {"input_ids": TOKENS, "labels": LABELS}
    plain = estimated([batch], "empirical", model=llama())
    cases.assert_same(estimated([batch], "empirical", model=wrap(llama())), plain)


def bart() -> Any:
    transformers = pytest.importorskip("transformers")
    config = transformers.BartConfig(
        vocab_size=17,
        d_model=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=8,
        decoder_ffn_dim=8,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    torch.manual_seed(0)
    return transformers.BartForConditionalGeneration(config).double().eval()


@pytest.mark.parametrize("length", [3, 5])
def test_padding_of_an_encoder_is_not_that_of_the_decoder(length: int) -> None:
    network, whole = bart(), torch.ones_like(TOKENS)
    padded = torch.where(LABELS < 0, 0, 1)
    batch = {"input_ids": TOKENS + 3, "labels": TOKENS[:, :length].contiguous() + 3}
    with pytest.raises(ValueError, match="attention_mask has padding, and model is a BartForCond"):
        estimated([{**batch, "attention_mask": padded}], model=network)
    found, bare = (
        estimated([{**batch, **more}], "empirical", model=network)
        for more in ({"attention_mask": whole}, {})
    )
    cases.assert_same(found, bare, bits=True)
    part = estimated(
        [{**batch, "attention_mask": padded}],
        "empirical",
        model=network,
        layers=lambda name, module: ".encoder.layers." in name,
        mask_of=lambda args, kwargs: kwargs["attention_mask"].bool(),
    )
    assert part.layers["model.encoder.layers.0.fc1"].A.count == 8  # type: ignore[attr-defined]


def test_a_mask_that_is_given_by_position() -> None:
    network, mask = llama(), torch.where(LABELS < 0, 0, 1)
    for model in (network, torch.compile(network, backend="eager"), nn.DataParallel(network)):
        read = mask_reader(model)
        for args, kwargs in (
            ((TOKENS, mask), {"labels": LABELS}),
            ((TOKENS,), {"attention_mask": mask}),
            ((), {"attention_mask": mask}),
        ):
            found = read(args, kwargs)
            assert found is not None
            assert torch.equal(found, mask.bool())
        assert read((TOKENS,), {}) is None
        assert read((TOKENS,) * 99, {}) is None


def test_named_tuples() -> None:
    class Pair(NamedTuple):
        x: Tensor
        y: Tensor

    named = estimated([Pair(*pair) for pair in pairs()], "empirical")
    cases.assert_same(named, estimated(pairs(), "empirical"), bits=True)


# ---- logits -------------------------------------------------------------------------------------


class Returns(nn.Module):
    """A layer, and what is made of its output."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.change = nn.Linear(3, 4), change

    def forward(self, x: Tensor) -> Any:
        return self.change(self.layer(x))


@pytest.mark.parametrize(
    "change", [lambda z: (z.sum(), z, z * 2), lambda z: (z.sum(), z), lambda z: (z,)]
)
def test_logits_in_a_tuple(change: Callable[[Tensor], Any]) -> None:
    """As transformers' models return them with their loss, or alone."""
    network = cases.filled(Returns(change))
    cases.assert_same(
        estimated(pairs(), model=network),
        estimated(pairs(), model=network, logits_of=lambda out: out[len(out) > 1]),
        bits=True,
    )


@pytest.mark.parametrize(
    "change", [lambda z: (z, z), lambda z: [z, z[:1]], lambda z: (z.sum(),), lambda z: ()]
)
def test_logits_that_a_tuple_does_not_tell(change: Callable[[Tensor], Any]) -> None:
    with pytest.raises(TypeError, match="in which no logits were found; pass logits_of"):
        estimated(pairs(), model=cases.filled(Returns(change)))


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
def test_logits_of_one_class(fisher_type: str) -> None:
    message = (
        r"^logits has shape \[2, 1\]: of one class the softmax is constant, and its Fisher zero"
    )
    with pytest.raises(ValueError, match=message):
        estimated(pairs(1), fisher_type, model=cases.filled(Returns(lambda z: z[:, :1])))


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 3, 5)])
def test_logits_whose_classes_are_not_last(shape: tuple[int, ...], fisher_type: str) -> None:
    """Those of segmentation, as far as labels show it."""
    size = shape[2:]

    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 4, 1) if len(size) == 2 else nn.Conv1d(1, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    x, y = cases.drawn(2, 1, *size), cases.labels(2, *size)
    network = cases.filled(Pixels())
    with pytest.raises(ValueError, match=r"expected classes last, \[B, \*positions, V\]: move"):
        estimated([(x, y)], fisher_type, model=network)
    found = estimated([(x, y)], fisher_type, model=network, logits_of=lambda z: z.movedim(1, -1))
    assert found.layers["layer"].G.count == y.numel()  # type: ignore[attr-defined]


def test_labels_that_do_not_fit_the_logits() -> None:
    with pytest.raises(
        ValueError, match=r"^labels has shape \[3\]; expected \[2\], one for each of"
    ):
        estimated([(cases.drawn(2, 3), torch.zeros(3).long())], "empirical")


def test_ekfac_refuses_what_ends_with_one_pass() -> None:
    message = "data_loader is a generator, which ends with its first pass"
    with pytest.raises(ValueError, match=message):
        estimated((pair for pair in pairs()), structure="ekfac")
    once = estimated((pair for pair in pairs()), structure="kfac")
    cases.assert_same(once, estimated(pairs(), structure="kfac"), bits=True)


def test_ekfac_goes_over_the_data_twice() -> None:
    network = model()
    found = estimated(pairs(), structure="ekfac", model=network)
    twice = Capture(network, fisher_type="type-2", structure="ekfac")
    with twice:
        for number in range(2):
            for x, _ in pairs():
                with twice.batch():
                    twice.add(network(x))
            if not number:
                for layer in twice.layers.values():
                    assert isinstance(layer, EigenCurvature)
                    layer.refresh()
    cases.assert_same(found, twice)


@pytest.mark.parametrize("structure", ["kfac", "ekfac"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_it_resumes_with_the_same_bits(structure: str, stop: int, tmp_path: Path) -> None:
    network, path = model(), tmp_path / "fisher.pt"
    options: dict[str, Any] = {"structure": structure, "model": network}
    through = estimated(pairs(), **options)
    seen: list[int] = []

    def progress(done: int) -> None:
        seen.append(done)
        if len(seen) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        estimate_fisher(
            network,
            pairs(),
            fisher_type="type-2",
            structure=structure,
            progress=progress,
            checkpoint=path,
            checkpoint_period=1,
        )
    resumed = estimated(pairs(), checkpoint=path, checkpoint_period=1, **options)
    cases.assert_same(resumed, through, bits=True)


def test_hooks_are_gone_and_the_bar_shows(capsys: pytest.CaptureFixture[str]) -> None:
    network = model()
    estimate_fisher(network, pairs(), fisher_type="mc")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    pytest.importorskip("tqdm")
    assert "4/4" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("batches", "options", "message"),
    [
        ([cases.drawn(2, 3)], {"fisher_type": "empirical"}, "data_loader gives no labels"),
        ([(cases.drawn(2, 3),) * 3], {}, "data_loader gave 3 things"),
        ([], {"checkpoint_period": 0}, "checkpoint_period is 0; allowed are ints >= 1"),
    ],
)
def test_bad_input(batches: list[Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        estimated(batches, **options)
