"""K-FAC against AdamW on WikiText-2: a small GPT from scratch, or SmolLM2-135M trained further.

``python -m fisherkern.bench.training --problem gpt --output FOLDER`` gives both as many trials
(seed 0, chosen by the held-out loss at the end), then trains with several seeds as in the best one,
and writes JSON, Markdown and a plot of the loss against steps and against time. AdamW takes
`--steps`, K-FAC `--share` of them; both warm up and decay over their own number of steps, and the
damping of K-FAC falls. Time is that of steps alone, on this machine, one run after another.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fisherkern.bench import results
from fisherkern.bench.training_problems import PROBLEMS, Problem
from fisherkern.optim import KFAC

# Of the steps, the share that the rate rises over, and how often the loss is measured.
WARM_UP, MEASURED = 20, 20


@dataclass
class Run:
    """One training."""

    optimizer: str
    trial: dict[str, Any]
    seed: int
    steps: list[int] = field(default_factory=list)
    """At which the loss was measured."""
    losses: list[float] = field(default_factory=list)
    """Held out."""
    seconds: list[float] = field(default_factory=list)
    """Of training until then."""

    @property
    def final(self) -> float:
        """The last loss, infinite where there is none that is finite."""
        last = self.losses[-1]
        return last if math.isfinite(last) else math.inf


def _schedule(steps: int) -> Callable[[int], float]:
    warm = max(1, steps // WARM_UP)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor


def _make(name: str, model: nn.Module, options: dict[str, Any]) -> Optimizer:
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), **options)
    return KFAC(model, generator=torch.Generator().manual_seed(0), **options)


def train(problem: Problem, name: str, trial: dict[str, Any], seed: int, steps: int) -> Run:
    """One training; batches depend on the seed alone, and so do fresh weights."""
    torch.manual_seed(seed)
    model, run = problem.model(), Run(name, trial, seed)
    optimizer = _make(name, model, {**problem.options[name], **trial})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _schedule(steps))
    batches = torch.Generator().manual_seed(seed)
    spent = 0.0
    try:
        for step in range(1, steps + 1):
            windows = problem.windows(batches)
            if isinstance(optimizer, KFAC) and problem.damping is not None:
                optimizer.damping = problem.damping((step - 1) / steps)
            began = time.perf_counter()
            optimizer.zero_grad()
            problem.loss(model, windows).backward()
            optimizer.step()
            scheduler.step()
            spent += time.perf_counter() - began
            if step % max(1, steps // MEASURED) == 0 or step == steps:
                run.steps.append(step)
                run.losses.append(_held_out(problem, model))
                run.seconds.append(spent)
                if not math.isfinite(run.losses[-1]):
                    break
    finally:
        if isinstance(optimizer, KFAC):
            optimizer.preconditioner.detach()  # the next run may be of the same model
    return run


@torch.no_grad()
def _held_out(problem: Problem, model: nn.Module) -> float:
    model.eval()
    parts = problem.held_out.split(problem.batch)
    total = sum(float(problem.loss(model, part)) * len(part) for part in parts)
    model.train()
    return total / len(problem.held_out)


def measure(problem: Problem, steps: dict[str, int], seeds: int) -> list[Run]:
    """All trials, then all seeds as in the best one; printed as they come."""
    runs = []
    for name, tried in problem.trials.items():
        trials = [_told(train(problem, name, trial, 0, steps[name])) for trial in tried]
        best = min(trials, key=lambda run: run.final).trial
        runs += trials
        for seed in range(1, seeds + 1):
            runs.append(_told(train(problem, name, best, seed, steps[name])))
    return runs


def _told(run: Run) -> Run:
    options = ", ".join(f"{name} {value:g}" for name, value in run.trial.items())
    print(
        f"{run.optimizer} {options}, seed {run.seed}: {run.losses[-1]:.4f} after "
        f"{run.steps[-1]} steps in {run.seconds[-1]:.0f} s",
        flush=True,
    )
    return run


def table(problem: Problem, runs: list[Run]) -> str:
    """Markdown: per seed, the final losses and when K-FAC reached that of AdamW."""
    by = {(r.optimizer, r.seed): r for r in runs if r.seed}
    seeds = sorted({seed for _, seed in by})
    lines = [
        "| seed | AdamW | KFAC | steps to AdamW's loss | time to it | time of a step |",
        "|---|---|---|---|---|---|",
    ]
    for seed in seeds:
        adam, kfac = by["AdamW", seed], by["KFAC", seed]
        reached = [i for i, loss in enumerate(kfac.losses) if loss <= adam.final]
        when = seconds = "never"
        if reached:
            when = f"{kfac.steps[reached[0]] / adam.steps[-1]:.2f}"
            seconds = f"{kfac.seconds[reached[0]] / adam.seconds[-1]:.2f}"
        cost = (kfac.seconds[-1] / kfac.steps[-1]) / (adam.seconds[-1] / adam.steps[-1])
        lines.append(
            f"| {seed} | {adam.losses[-1]:.4f} | {kfac.losses[-1]:.4f} | {when} | {seconds} | "
            f"{cost:.2f} |"
        )
    taken = {name: by[name, seeds[0]].steps[-1] for name in ("AdamW", "KFAC")}
    tokens = problem.batch * problem.length
    note = (
        f"{problem.title}: nats per {problem.unit}, held out, after {taken['AdamW']} steps of "
        f"AdamW and {taken['KFAC']} of KFAC, of {tokens} {problem.unit}s each. The last three "
        "columns are ratios to AdamW."
    )
    return "\n".join([*lines, "", note])


def plot(problem: Problem, runs: list[Run], path: Path) -> None:
    """Loss against steps and against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    colours = {"AdamW": "tab:grey", "KFAC": "tab:blue"}
    for run in (r for r in runs if r.seed):
        label = run.optimizer if run.seed == 1 else None
        for axis, x in zip(axes, (run.steps, run.seconds), strict=True):
            axis.plot(x, run.losses, color=colours[run.optimizer], label=label)
    axes[0].set(xlabel="steps", ylabel=f"held-out loss, nats per {problem.unit}")
    axes[1].set(xlabel="seconds")
    axes[0].legend()
    figure.suptitle(problem.title)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _damping(problem: Problem) -> dict[str, float] | None:
    """λ of K-FAC at tenths of its steps, for the record."""
    if problem.damping is None:
        return None
    return {f"{tenth / 10:g}": problem.damping(tenth / 10) for tenth in range(11)}


def main() -> None:
    """Train, print and write."""
    parser = argparse.ArgumentParser(prog="python -m fisherkern.bench.training")
    parser.add_argument("--problem", choices=PROBLEMS, default="gpt")
    parser.add_argument("--steps", type=int, help="of AdamW")
    parser.add_argument("--share", type=float, default=0.6, help="of them that K-FAC takes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder")
    arguments = parser.parse_args()
    problem = PROBLEMS[arguments.problem]()
    steps = arguments.steps or problem.steps
    numbers = {"AdamW": steps, "KFAC": max(1, round(arguments.share * steps))}
    runs = measure(problem, numbers, arguments.seeds)
    text = table(problem, runs)
    print(text)
    finals = [
        statistics.median(r.losses[-1] for r in runs if r.seed and r.optimizer == name)
        for name in numbers
    ]
    print(f"median final loss: AdamW {finals[0]:.4f}, KFAC {finals[1]:.4f}")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        whole = {
            "environment": results.environment("cpu"),
            "problem": problem.title,
            "options": problem.options,
            "damping_by_share_of_steps": _damping(problem),
            "tokens_per_step": problem.batch * problem.length,
            "runs": [asdict(run) for run in runs],
        }
        (arguments.output / "training.json").write_text(json.dumps(whole, indent=1, default=str))
        (arguments.output / "report.md").write_text(text + "\n")
        plot(problem, runs, arguments.output / "training.png")


if __name__ == "__main__":
    main()
