"""The covariance factors of the linear layers: which layers, how exact, and in bounded time."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fisherkern
from fisherkern.demo import factors, report
from fisherkern.demo.spectra import Spectra

transformers = pytest.importorskip("transformers", reason="the demo needs transformers")

LAYERS = {
    f"transformer.h.{i}.{name}": width
    for i in range(2)
    for name, width in (
        ("attn.c_attn", 32),
        ("attn.c_proj", 32),
        ("mlp.c_fc", 32),
        ("mlp.c_proj", 128),
    )
} | {"lm_head": 32}


@pytest.fixture(autouse=True)
def time_enough(monkeypatch):
    # a busy machine measures every layer too, but where a test takes its time away
    monkeypatch.setattr(factors, "BUDGET", 1e6)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture
def tokens():
    return torch.randint(50, (3, 48), generator=torch.Generator().manual_seed(0))


class Repeating(nn.Module):
    """A layer that runs twice, one that gets no tokens, and one called by keyword."""

    def __init__(self):
        super().__init__()
        self.twice, self.idle, self.keyword = (nn.Linear(4, 4) for _ in range(3))

    def forward(self, tokens, use_cache):
        x = torch.ones(*tokens.shape, 4)
        self.keyword(input=x)
        self.idle(x[:0].flatten(0, 1))
        return self.twice(self.twice(x).flatten(0, 1))


def test_all_layers_are_measured_and_exact(model, tokens):
    assert factors.linear_layers(model) == LAYERS
    ticks = []
    found = factors.measure(model, tokens, lambda: ticks.append(1))
    assert found.layers == len(ticks) == len(LAYERS)
    assert found.measured == [len(LAYERS)] * 2
    assert found.widths == [32, 128]
    assert (found.windows, found.tokens) == (2, 96)
    assert [row.name for row in found.rows] == ["float32, 9 layers", "bfloat16, 9 layers"]
    for row in found.rows:
        assert 0 < row.ours.relative_error < 1e-6
        assert 0 < row.ours.largest_error < 1e-5
        assert row.ours.seconds > 0
        assert row.plain.seconds > 0
    half = found.rows[1]
    assert found.rows[0].plain.relative_error < 1e-6
    assert 1e-4 < half.plain.relative_error < 1e-2  # its products are rounded to bfloat16
    assert len(found.spectra.fractions) == len(LAYERS)
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "9 linear layers ran, of input width 32, 128; measured on all." in report.factor_notes(
        found
    )


def test_factor_is_that_of_the_inputs(model, tokens):
    found = factors.measure(model, tokens)
    kept = []
    hook = model.get_submodule(found.spectra.most_even.name).register_forward_pre_hook(
        lambda module, arguments: kept.append(arguments[0])
    )
    with torch.no_grad():
        model(tokens[:2])
    hook.remove()
    x = kept[0].double().flatten(0, 1)
    torch.testing.assert_close(
        found.spectra.most_even.factor.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-6
    )


def test_reference_serves_too(model, tokens):
    with fisherkern.backend("reference"):
        found = factors.measure(model, tokens)
    assert found.measured == [len(LAYERS)] * 2
    assert found.rows[0].ours.relative_error < 1e-6


def test_layers_are_left_out_when_time_runs_out(model, tokens, monkeypatch):
    monkeypatch.setattr(factors, "BUDGET", 0.0)
    monkeypatch.setattr(factors, "_HEAD_START", 0.0)
    found = factors.measure(model, tokens)
    assert found.layers == len(LAYERS)
    assert found.measured == [1, 1]
    assert "measured on some, evenly spread" in report.factor_notes(found)


def test_layers_left_out_are_spread_evenly(monkeypatch):
    monkeypatch.setattr(factors, "BUDGET", 8.0)
    monkeypatch.setattr(factors, "_HEAD_START", 0.0)
    # every layer takes one second, by a clock that only the two readings in a measurement move
    clock = iter(range(1000))
    monkeypatch.setattr(factors, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    monkeypatch.setattr(factors, "median_seconds", lambda *_, **__: [1.0, 1.0])
    tally = factors._Tally(torch.float32, 32 * 4**2)
    x = [torch.randn(8, 4)]
    chosen = [i for i in range(32) if tally.measure(x) is not None]
    assert chosen == [0, *range(3, 32, 4)]


def test_layers_without_inputs_of_their_own_are_not_counted():
    found = factors.measure(Repeating(), torch.zeros(2, 3, dtype=torch.int64))
    assert found.layers == 1
    assert found.spectra.most_uneven.name == "twice"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_see_every_kind_of_fault(dtype):
    torch.manual_seed(0)
    windows = [torch.randn(1, 40, 24).to(dtype) for _ in range(2)]
    good = factors.ours(windows)
    assert max(factors.errors(good, windows)) < 1e-6
    wrong = good.clone()
    wrong[8, 3] += 0.01
    relative, largest = factors.errors(wrong, windows)
    assert 1e-4 < relative < 1e-2
    assert largest == pytest.approx(0.01 / (good[8, 8] * good[3, 3]).sqrt().item(), rel=1e-3)
    wrong[8, 3] = math.nan
    assert all(map(math.isnan, factors.errors(wrong, windows)))
    assert math.isnan(factors._larger(0.0, math.nan))
    assert math.isnan(factors._larger(math.nan, 0.0))


def test_coordinates_that_are_always_zero_have_no_error():
    x = torch.randn(1, 40, 24)
    x[..., ::2] = 0
    assert max(factors.errors(factors.ours([x]), [x])) < 1e-6
    assert max(factors.errors(torch.zeros(24, 24), [torch.zeros(1, 4, 24)])) == 0


def test_spectra_keep_the_extreme_layers():
    found = Spectra()
    for name, diagonal in {"middle": [2, 1], "even": [1, 1], "uneven": [3, 1]}.items():
        found.add(name, torch.diag(torch.tensor(diagonal, dtype=torch.float32)))
    found.add("zero", torch.zeros(2, 2))
    found.add("not finite", torch.full((2, 2), math.nan))
    assert found.fractions == pytest.approx([0.9, 1.0, 0.8])
    assert (found.most_even.name, found.most_uneven.name) == ("even", "uneven")
    assert found.most_uneven.effective == pytest.approx(1.6)
    assert found.most_uneven.largest() == pytest.approx(0.75)
    assert found.most_uneven.coordinate() == (0, 0.75)
    printed = report.spectra(found)
    assert "90% of the width in the median layer" in printed
    assert (
        "fewest: uneven, 1.6 of 2; its largest eigenvalue 75% and its coordinate 0 75% of the trace"
        in printed
    )


def test_spectra_leave_out_what_they_lack(monkeypatch):
    assert report.spectra(Spectra()) == "no layer had inputs other than zero"
    monkeypatch.setattr("fisherkern.demo.spectra._WIDEST", 1)
    found = Spectra()
    found.add("wide", torch.eye(2))
    assert "wide, 2.0 of 2; its coordinate 0 50% of the trace" in report.spectra(found)
