"""K-FAC against AdamW on WikiText-2: a small GPT from scratch, or SmolLM2-135M trained further.

``python -m fisherkern.bench.training --problem gpt --output FOLDER`` gives all optimizers as many
trials (seed 0, chosen by the held-out loss at the end), then trains with several seeds as in the
best one, and writes JSON, Markdown and a plot of the loss against steps and against time. AdamW
takes `--steps`, the others, KFAC and AdamW along natural gradients, `--share` of them; all warm up
and decay over their own number of steps. Time is that of steps alone, one run after another.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fisherkern.bench import results
from fisherkern.bench.training_problems import NATURAL, PROBLEMS, Problem
from fisherkern.optim import KFAC, KFACPreconditioner

# How often the loss is measured.
MEASURED = 20
COLOURS = {"AdamW": "tab:grey", "KFAC": "tab:blue", NATURAL: "tab:orange"}


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


def schedule(steps: int, warm_up: float) -> Callable[[int], float]:
    """Of the rate: a linear rise over a share of the steps, and a cosine down to a tenth."""
    warm = max(1, round(warm_up * steps))

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return factor


def make(
    name: str, model: nn.Module, options: dict[str, Any]
) -> tuple[Optimizer, KFACPreconditioner | None]:
    """The optimizer, and what makes the gradients natural on its steps."""
    generator = torch.Generator().manual_seed(0)
    if name == "KFAC":
        kfac = KFAC(model, generator=generator, **options)
        return kfac, kfac.preconditioner
    before = options.get("preconditioner")
    options = {key: value for key, value in options.items() if key != "preconditioner"}
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    if before is None:
        return optimizer, None
    preconditioner = KFACPreconditioner(model, generator=generator, **before)

    def precede(*_: Any) -> None:
        preconditioner.step()

    optimizer.register_step_pre_hook(precede)
    return optimizer, preconditioner


def train(problem: Problem, name: str, trial: dict[str, Any], seed: int, steps: int) -> Run:
    """One training; batches depend on the seed alone, and so do fresh weights."""
    torch.manual_seed(seed)
    model, run = problem.model(), Run(name, trial, seed)
    optimizer, preconditioner = make(name, model, {**problem.options[name], **trial})
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps, problem.warm_up))
    batches = torch.Generator().manual_seed(seed)
    spent = 0.0
    try:
        for step in range(1, steps + 1):
            windows = problem.windows(batches)
            if preconditioner is not None and problem.damping is not None:
                preconditioner.damping = problem.damping((step - 1) / steps)
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
        if preconditioner is not None:
            preconditioner.detach()  # the next run may be of the same model
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
    names = [name for name in problem.trials if (name, 1) in by]
    lines = [
        "| | seed | loss | AdamW's | steps to AdamW's | time to it | time of a step |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, seed), run in by.items():
        if name == "AdamW":
            continue
        adam = by["AdamW", seed]
        reached = [i for i, loss in enumerate(run.losses) if loss <= adam.final]
        when = seconds = "never"
        if reached:
            when = f"{run.steps[reached[0]] / adam.steps[-1]:.2f}"
            seconds = f"{run.seconds[reached[0]] / adam.seconds[-1]:.2f}"
        cost = (run.seconds[-1] / run.steps[-1]) / (adam.seconds[-1] / adam.steps[-1])
        lines.append(
            f"| {name} | {seed} | {run.losses[-1]:.4f} | {adam.losses[-1]:.4f} | {when} | "
            f"{seconds} | {cost:.2f} |"
        )
    taken = ", ".join(f"{by[name, 1].steps[-1]} of {name}" for name in names)
    tokens = problem.batch * problem.length
    note = (
        f"{problem.title}: nats per {problem.unit}, held out, after steps of {tokens} "
        f"{problem.unit}s: {taken}. The last three columns are ratios to AdamW."
    )
    return "\n".join([*lines, "", note])


def plot(problem: Problem, runs: list[Run], path: Path) -> None:
    """Loss against steps and against seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for run in (r for r in runs if r.seed):
        label = run.optimizer if run.seed == 1 else None
        for axis, x in zip(axes, (run.steps, run.seconds), strict=True):
            axis.plot(x, run.losses, color=COLOURS[run.optimizer], label=label)
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
    parser.add_argument("--share", type=float, help="of them that the others take")
    parser.add_argument("--optimizers", nargs="+", choices=list(COLOURS)[1:], help="beside AdamW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="folder")
    arguments = parser.parse_args()
    problem = PROBLEMS[arguments.problem]()
    if arguments.optimizers:
        kept = {"AdamW", *arguments.optimizers}
        problem = replace(
            problem, trials={name: t for name, t in problem.trials.items() if name in kept}
        )
    steps = arguments.steps or problem.steps
    share = arguments.share or problem.share
    numbers = {name: max(1, round(share * steps)) for name in problem.trials}
    runs = measure(problem, {**numbers, "AdamW": steps}, arguments.seeds)
    text = table(problem, runs)
    print(text)
    for name in problem.trials:
        finals = [r.losses[-1] for r in runs if r.seed and r.optimizer == name]
        print(f"median final loss of {name}: {statistics.median(finals):.4f}")
    if arguments.output is not None:
        arguments.output.mkdir(parents=True, exist_ok=True)
        whole = {
            "environment": results.environment("cpu"),
            "problem": problem.title,
            "options": {name: problem.options[name] for name in problem.trials},
            "damping_by_share_of_steps": _damping(problem),
            "tokens_per_step": problem.batch * problem.length,
            "runs": [asdict(run) for run in runs],
        }
        (arguments.output / "training.json").write_text(json.dumps(whole, indent=1, default=str))
        (arguments.output / "report.md").write_text(text + "\n")
        plot(problem, runs, arguments.output / "training.png")


if __name__ == "__main__":
    main()
