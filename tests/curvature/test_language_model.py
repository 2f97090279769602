"""Language models of transformers: heads, padding, hidden states, and what is left in memory."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import tiny_llama
import torch
from torch import Tensor, nn
from torch.nn import functional

from curvature import cases
from fisherkern.curvature import Capture, KroneckerCurvature, WideCurvature
from fisherkern.operators import DiagonalPlusLowRank, SoftmaxFisher

transformers = pytest.importorskip("transformers")

V, D = 97, 32
# LlamaRMSNorm rounds to float32 on the way forward and back, in each of 5 norms
ROUNDED = 20 * 2**-23


def llama(tied: bool = False) -> Any:
    config = tiny_llama.config(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        use_cache=False,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).double().eval()


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=D, n_layer=2, n_head=4, n_positions=16, attn_implementation="eager"
    )
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(config).double().eval()


def peaked(model: Any) -> Any:
    """Weights large enough for logits that are not all alike."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(5)
    return model


MODELS = {"llama": llama, "llama-tied": lambda: llama(True), "gpt2": gpt2}


def text(B: int, S: int) -> Tensor:
    return torch.randint(V, (B, S), generator=cases.generator(5))


def padding(*lengths: int) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def kronecker(fisher: Capture) -> dict[str, KroneckerCurvature]:
    return {n: c for n, c in fisher.layers.items() if isinstance(c, KroneckerCurvature)}


# ---- hidden states ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "positions", "structure"),
    [
        ("llama", 1, "kfac"),
        ("llama", 2, "kfac"),
        ("llama-tied", 1, "diagonal"),
        ("gpt2", 1, "kfac"),
        ("gpt2", 2, "diagonal"),
    ],
)
def test_hidden_states_give_what_logits_give(name: str, positions: int, structure: str) -> None:
    """Of one position at a time every layer below the head has the same Fisher."""
    model, x = peaked(MODELS[name]()), text(3, positions)
    options: dict[str, Any] = {
        "fisher_type": "type-2",
        "structure": structure,
        "layers": below_the_head,
        "exact_positions": True,
    }
    one, other = (Capture(model, **options) for _ in range(2))
    with one, one.batch():
        one.add(model(x).logits)
    with other, other.batch():
        hidden = model.base_model(x).last_hidden_state
        other.add_hidden(hidden, model.lm_head.weight)
    mine, theirs = cases.averages(one), cases.averages(other)
    assert mine.keys() == theirs.keys()
    assert len(one.layers) >= 8
    for key, value in mine.items():
        # queries and keys get no gradient where there is one position
        if value.norm() > 1e-12:
            assert cases.error(theirs[key], value) < ROUNDED, key


def below_the_head(name: str, module: nn.Module) -> bool:
    return name not in ("lm_head", "transformer.wpe")


def test_layers_above_the_last_attention_are_exact_with_several_positions() -> None:
    """There rows of different positions do not mix, and A and G are sums over rows."""
    model, x = peaked(llama()), text(2, 3)
    names = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    fishers = [Capture(model, fisher_type="type-2", layers=names) for _ in range(2)]
    for fisher, from_hidden in zip(fishers, (False, True), strict=True):
        with fisher, fisher.batch():
            hidden = model.model(x).last_hidden_state
            if from_hidden:
                fisher.add_hidden(hidden, model.lm_head.weight)
            else:
                fisher.add(model.lm_head(hidden))
    for name in names:
        with cases.watched(model.get_submodule(name)) as outputs:
            logits = model(x).logits
        y = outputs[0]
        truth: Any = 0.0
        for z in logits.flatten(0, 1):
            p = z.detach().softmax(-1)
            for column in (p.sqrt().diag() - torch.outer(p, p.sqrt())).T:
                (g,) = torch.autograd.grad(z, y, column, retain_graph=True)
                truth = truth + g.flatten(0, 1).T @ g.flatten(0, 1) / 6
        for fisher in fishers:
            assert cases.error(kronecker(fisher)[name].G.factor(), truth) < ROUNDED


@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
def test_softcap_and_bias_of_a_head_over_hidden_states(fisher_type: str) -> None:
    body = cases.filled(nn.Linear(3, 5))
    weight, bias, x = cases.drawn(6, 5, seed=1), cases.drawn(6, seed=2), cases.drawn(4, 3)
    one, other = (
        Capture(body, fisher_type=fisher_type, generator=cases.generator(0)) for _ in range(2)
    )
    with one, one.batch():
        one.add(2.0 * ((body(x) @ weight.T + bias) / 2.0).tanh())
    with other, other.batch():
        other.add_hidden(body(x), weight, bias=bias, softcap=2.0)
    cases.assert_same(one, other)


# ---- padding ------------------------------------------------------------------------------------

LENGTHS = (5, 2, 4)


@pytest.mark.parametrize(
    ("name", "fisher_type", "structure"),
    [
        ("llama", "type-2", "kfac"),
        ("llama", "empirical", "diagonal"),
        ("llama-tied", "empirical", "kfac"),
        ("gpt2", "empirical", "kfac"),
    ],
)
def test_padding_is_not_there(name: str, fisher_type: str, structure: str) -> None:
    """A padded batch, and its sequences one by one: what causal attention does not see."""
    model, mask = peaked(MODELS[name]()), padding(*LENGTHS)
    x = torch.where(mask, text(3, 5), 7)

    def add(fisher: Capture, x: Tensor, mask: Tensor) -> None:
        positions = torch.arange(x.shape[1]).expand(x.shape)
        with fisher, fisher.batch(mask=mask):
            logits = model(x, attention_mask=mask.long(), position_ids=positions).logits
            if fisher_type == "type-2":
                fisher.add(logits)
            else:
                functional.cross_entropy(logits[mask], x[mask]).backward()

    whole, single = (Capture(model, fisher_type=fisher_type, structure=structure) for _ in range(2))
    add(whole, x, mask)
    for b, n in enumerate(LENGTHS):
        add(single, x[b : b + 1, :n], mask[b : b + 1, :n])
    theirs = cases.averages(single)
    for key, value in cases.averages(whole).items():
        assert cases.error(theirs[key], value) < ROUNDED, key
        assert value.any()
    assert whole.uncovered() == {}


def test_positions_of_gpt2_that_are_made_once_are_left_out() -> None:
    model, mask = gpt2(), padding(*LENGTHS)
    fisher = Capture(model, fisher_type="type-2")
    with fisher, fisher.batch(mask=mask):
        logits = model(text(3, 5), attention_mask=mask.long()).logits
        with pytest.warns(RuntimeWarning, match=r"^transformer.wpe: called on tokens of shape"):
            fisher.add(logits)
    assert list(fisher.uncovered()) == ["transformer.wpe.weight"]
    assert fisher.layers["lm_head"].G.count == 11  # type: ignore[attr-defined]


# ---- the head -----------------------------------------------------------------------------------


def dense(logits: Tensor) -> Tensor:
    """D̄ − U Uᵀ of tokens [N, V]."""
    p = logits.detach().softmax(-1)
    return p.mean(0).diag() - p.T @ p / len(p)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("fisher_type", ["type-2", "mc"])
@pytest.mark.parametrize("name", MODELS)
def test_wide_head(name: str, fisher_type: str, stride: int) -> None:
    """The Fisher of the tokens of the last step that are kept, of terms that count."""
    model, mask = peaked(MODELS[name]()), padding(*LENGTHS)
    terms = functional.pad(mask[:, 1:], (0, 1))  # the last token of each has none to predict
    fisher = Capture(
        model,
        fisher_type=fisher_type,
        widest=64,
        stride=stride,
        layers=["lm_head"],
        generator=cases.generator(0),
    )
    head = fisher.layers["lm_head"]
    assert isinstance(head, WideCurvature)
    with fisher:
        for x in (text(3, 5).flip(0), text(3, 5)):
            with fisher.batch(mask=mask):
                logits = model(x, attention_mask=mask.long()).logits
                fisher.add(logits, mask=terms)
    kept = logits[:, ::stride][terms[:, ::stride]]
    G = head.outputs()
    assert isinstance(G, SoftmaxFisher)
    assert cases.error(G.to_dense(), dense(kept)) < cases.EXACT
    with cases.watched(model.base_model) as hidden:
        rows = [
            model.base_model(x, attention_mask=mask.long()).last_hidden_state[mask]
            for x in (text(3, 5).flip(0), text(3, 5))
        ]
    h = torch.cat(rows).detach()
    A = h.T @ h / len(h)
    assert len(hidden) == 2
    assert cases.error(head.A.factor(), A) < cases.EXACT
    X = cases.drawn(V, D)
    assert cases.error(head.operator() @ X, dense(kept) @ X @ A) < cases.EXACT
    assert (
        cases.error(head.diagonal()["weight"], torch.outer(dense(kept).diagonal(), A.diagonal()))
        < cases.EXACT
    )


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_wide_layer_from_gradients(reduction: str, stride: int) -> None:
    """Where no logits are given; tokens that are kept stand for all of the step."""
    model, mask = peaked(llama()), padding(*LENGTHS)
    fisher = Capture(
        model,
        fisher_type="empirical",
        loss_reduction=reduction,
        widest=64,
        stride=stride,
        layers=["lm_head"],
    )
    head = fisher.layers["lm_head"]
    assert isinstance(head, WideCurvature)
    rows = []
    with fisher:
        for part in (slice(0, 1), slice(1, 3)):
            x, over = text(3, 5)[part], mask[part]
            with fisher.batch(mask=over, new_step=part.start == 0):
                logits = model(x, attention_mask=over.long()).logits
                functional.cross_entropy(logits[over], x[over], reduction=reduction).backward()
            p = logits.detach().softmax(-1) - functional.one_hot(x, V)
            # one in `stride` of those that count in each sample
            rows += [gradients[counts][::stride] for gradients, counts in zip(p, over, strict=True)]
    g = torch.cat(rows)
    truth = g.T @ g / len(g)
    G = head.outputs()
    assert isinstance(G, DiagonalPlusLowRank)
    assert cases.error(G.to_dense(), truth) < cases.EXACT


def test_a_layer_in_the_middle_may_be_wide() -> None:
    model, x = peaked(llama()), text(2, 1)
    name = "model.layers.1.mlp.up_proj"
    wide, narrow = (
        Capture(model, fisher_type="type-2", widest=widest, stride=1, layers=[name])
        for widest in (39, 40)
    )
    for fisher in (wide, narrow):
        with fisher, fisher.batch():
            fisher.add(model(x).logits)
    found = wide.layers[name]
    assert isinstance(found, WideCurvature)
    G = found.outputs()
    assert G is not None
    assert cases.error(G.to_dense(), kronecker(narrow)[name].G.factor()) < cases.EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_bits(name: str, fisher_type: str, dtype: torch.dtype) -> None:
    model, x = peaked(MODELS[name]()).to(dtype), text(2, 5)
    fisher = Capture(model, fisher_type=fisher_type, widest=64)
    results = []
    for captured in (False, True):
        model.zero_grad()
        with fisher.attach().batch(terms=8) if captured else nullcontext():
            output = model(x, labels=x)
            if captured and fisher_type == "mc":
                fisher.add(output.logits)
            output.loss.backward()
        results.append([output.loss.detach(), *(p.grad for p in model.parameters())])
    assert all(map(torch.equal, *results))


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize(
    ("fisher_type", "structure", "checkpointed"),
    [
        ("type-2", "kfac", True),
        ("mc", "ekfac", True),
        ("mc", "diagonal", False),
        ("empirical", "kfac", False),
        ("empirical", "diagonal", True),
    ],
)
def test_nothing_but_averages_is_kept(fisher_type: str, structure: str, checkpointed: bool) -> None:
    """No input, output or graph outlives a batch, and none waits for the garbage collector."""
    model, x = llama().train(), text(2, 5)
    if checkpointed:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fisher = Capture(model, fisher_type=fisher_type, structure=structure, widest=64)
    seen: list[weakref.ref[Tensor]] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.extend(weakref.ref(t) for t in (*args, output) if isinstance(t, Tensor))

    handles = [m.register_forward_hook(note) for m in model.modules() if m is not model]
    gc.collect()
    gc.disable()
    try:
        with fisher:
            with fisher.batch(terms=10):
                logits = model(x).logits
                if fisher_type == "empirical":
                    loss = functional.cross_entropy(logits.flatten(0, 1), x.flatten())
                    loss.backward()
                    del loss
                else:
                    fisher.add(logits)
                seen.append(weakref.ref(logits))
            del logits
            alive = [tuple(t.shape) for ref in seen if (t := ref()) is not None and t is not x]
    finally:
        gc.enable()
        for handle in handles:
            handle.remove()
    assert len(seen) > 30
    assert alive == []
    assert fisher.layers["lm_head"].diagonal()["weight"].any()
