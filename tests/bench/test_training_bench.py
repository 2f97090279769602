"""The training bench, on a problem of a few parameters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherkern.bench import training, training_cost
from fisherkern.bench.training import Run
from fisherkern.bench.training_problems import GPT, NATURAL, Problem
from fisherkern.optim import KFACPreconditioner

KFAC = {"lr": 0.5, "damping": 1e-2}


class Bigram(nn.Module):
    """Each token predicts the next."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def loss(model: nn.Module, windows: Tensor) -> Tensor:
    logits = model(windows[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


@pytest.fixture
def problem() -> Problem:
    text = torch.arange(7).repeat(50)
    return Problem(
        title="Counting",
        unit="token",
        model=Bigram,
        loss=loss,
        text=text,
        held_out=torch.stack([text[i : i + 9] for i in range(5)]),
        batch=2,
        steps=20,
        share=0.6,
        warm_up=0.05,
        options={
            "AdamW": {"weight_decay": 0.0},
            "KFAC": KFAC,
            NATURAL: {"weight_decay": 0.0, "preconditioner": {"damping": 1e-2, "kl_clip": None}},
        },
        trials={
            "AdamW": ({"lr": 1e-5}, {"lr": 3e-2}),
            "KFAC": ({"kl_clip": 1e-6}, {"kl_clip": 1e-2}),
            NATURAL: ({"lr": 1e-5}, {"lr": 3e-2}),
        },
    )


def test_trials_then_seeds_as_in_the_best(problem: Problem) -> None:
    runs = training.measure(problem, {"AdamW": 20, "KFAC": 10, NATURAL: 10}, seeds=2)
    assert [(run.optimizer, run.seed) for run in runs] == [
        (name, seed) for name in ("AdamW", "KFAC", NATURAL) for seed in (0, 0, 1, 2)
    ]
    assert runs[2].trial == runs[3].trial == {"lr": 3e-2}
    assert runs[6].trial == runs[7].trial == {"kl_clip": 1e-2}
    assert runs[10].trial == runs[11].trial == {"lr": 3e-2}
    assert [run.steps[-1] for run in runs] == [20] * 4 + [10] * 8
    assert all(run.final < run.losses[0] for run in runs)
    assert all(run.seconds == sorted(run.seconds) for run in runs)


@pytest.mark.parametrize(("name", "trial"), [("KFAC", {"kl_clip": 1e-2}), (NATURAL, {"lr": 3e-2})])
def test_a_run_is_that_of_its_seed(problem: Problem, name: str, trial: dict[str, float]) -> None:
    first, again, other = (
        training.train(problem, name, trial, seed, 5).losses for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


def test_natural_gradients_reach_adamw(problem: Problem) -> None:
    plain = training.train(problem, "AdamW", {"lr": 3e-2}, 1, 10).losses
    natural = training.train(problem, NATURAL, {"lr": 3e-2}, 1, 10).losses
    assert natural != plain
    assert natural[-1] < natural[0]


@pytest.mark.parametrize(("name", "trial"), [("KFAC", {"kl_clip": 1e-2}), (NATURAL, {"lr": 3e-2})])
def test_the_damping_follows_the_share_of_the_steps(
    problem: Problem, name: str, trial: dict[str, float]
) -> None:
    told = []

    def falling(done: float) -> float:
        told.append(done)
        return 1e-1 if done < 0.5 else 1e-3

    constant = training.train(problem, name, trial, 1, 5).losses
    scheduled = replace(problem, damping=falling)
    falls = training.train(scheduled, name, trial, 1, 5).losses
    assert told == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert falls != constant
    same = replace(problem, damping=lambda _: 1e-2)
    assert training.train(same, name, trial, 1, 5).losses == constant
    training.train(scheduled, "AdamW", {"lr": 1e-2}, 1, 5)
    assert len(told) == 5


def test_the_rate_rises_and_falls() -> None:
    rates = [training.schedule(20, 0.2)(step) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert 0.1 < rates[-1] < 0.12
    assert training.schedule(3, 0.05)(0) == 1.0


def test_the_loss_is_the_mean_over_all_windows(problem: Problem) -> None:
    model = Bigram()
    whole = float(loss(model, problem.held_out).detach())
    assert abs(training._held_out(problem, model) - whole) < 1e-6
    assert model.training


def test_the_table(problem: Problem) -> None:
    """0.25: the second of four measurements is the first that is at AdamW's last loss."""
    runs = [
        Run("AdamW", {}, 1, [10, 20, 30, 40], [4.0, 3.0, 2.5, 2.0], [1.0, 2.0, 3.0, 4.0]),
        Run("KFAC", {}, 1, [5, 10, 15, 20], [3.0, 2.0, 1.5, 1.0], [1.0, 2.0, 3.0, 4.0]),
        Run("AdamW", {}, 2, [40], [2.0], [4.0]),
        Run("KFAC", {}, 2, [20], [float("nan")], [4.0]),
    ]
    rows = training.table(problem, runs).splitlines()
    assert rows[2] == "| KFAC | 1 | 1.0000 | 2.0000 | 0.25 | 0.50 | 2.00 |"
    assert rows[3] == "| KFAC | 2 | nan | 2.0000 | never | never | 2.00 |"
    assert len(rows) == 6
    assert "steps of 16 tokens: 40 of AdamW, 20 of KFAC." in rows[-1]


def test_files(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(
        training.PROBLEMS, "gpt", lambda: replace(problem, damping=lambda d: d / 2 + 1e-9)
    )
    command = ["training", "--output", str(tmp_path / "x"), "--seeds", "1", "--optimizers"]
    monkeypatch.setattr("sys.argv", [*command, NATURAL])
    training.main()
    written = json.loads((tmp_path / "x" / "training.json").read_text())
    assert [run["optimizer"] for run in written["runs"]] == ["AdamW"] * 3 + [NATURAL] * 3
    assert set(written["options"]) == {"AdamW", NATURAL}
    assert written["damping_by_share_of_steps"]["0.5"] == pytest.approx(0.25)
    assert written["runs"][-1]["steps"][-1] == 12
    assert (tmp_path / "x" / "training.png").stat().st_size > 1000
    assert (tmp_path / "x" / "report.md").read_text().strip() in capsys.readouterr().out


def test_the_gpt_sees_no_later_byte() -> None:
    model = GPT(width=8, layers=2, heads=2, context=6)
    tokens = torch.arange(12).reshape(2, 6)
    other = tokens.clone()
    other[:, 4:] += 1
    before, after = model(tokens), model(other)
    assert torch.equal(before[:, :4], after[:, :4])
    assert not torch.equal(before[:, 4:], after[:, 4:])


def test_the_cost_of_a_step(
    problem: Problem, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """2 + 3 / 10 for captures + 270 / 100 for inverses, over 2."""
    parts = {"AdamW": 2.0, "solve": 2.0, "capture": 5.0, "inverses": 270.0}
    assert training_cost.ratio(parts, 10, 100) == 2.5
    monkeypatch.setitem(training_cost.PROBLEMS, "gpt", lambda: problem)
    path = tmp_path / "cost.json"
    monkeypatch.setattr("sys.argv", ["cost", "--batch", "3", "--steps", "7", "--output", str(path)])
    training_cost.main()
    written = json.loads(path.read_text())
    assert written["tokens_per_step"] == 24
    assert set(written["seconds"]) == {"AdamW", "solve", "capture", "inverses"}
    assert min(written["seconds"].values()) > 0
    assert f"{written['mean_step_over_adamw']:.2f}" in capsys.readouterr().out


def test_too_few_steps_to_time(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["cost", "--steps", "6"])
    with pytest.raises(SystemExit):
        training_cost.main()
    assert "--steps is 6; allowed are ints >= 7" in capsys.readouterr().err


def test_steps_that_are_timed_are_of_their_kind(
    problem: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captures at even steps, inverses at the eighth alone, which is left out."""
    refreshed, counts = [], []
    refresh, step = KFACPreconditioner.refresh, KFACPreconditioner.step

    def telling_refresh(self: KFACPreconditioner) -> None:
        refreshed.append(self.steps)
        refresh(self)

    def telling_step(self: KFACPreconditioner, *lr: float) -> set[int]:
        found = step(self, *lr)
        counts.append(next(iter(self.capture.layers.values())).G.count)
        return found

    monkeypatch.setattr(KFACPreconditioner, "refresh", telling_refresh)
    monkeypatch.setattr(KFACPreconditioner, "step", telling_step)
    training_cost.measure(problem, 2, 13)
    assert refreshed == [0, 1, 2, 4, 8, 13, 13]
    grown = [step for step in range(1, 13) if counts[step] > counts[step - 1]]
    assert grown == [1, 2, 4, 6, 8, 10, 12]
