"""What a step along natural gradients costs beside one of AdamW, by its parts.

``python -m fisherkern.bench.training_cost --problem gpt`` times steps of AdamW and of
`KFACPreconditioner` before it in turn, each on a model of its own. Every step solves with the
inverses; one in `--factor-period` captures the factors; one in `--inverse-period` makes inverses.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from torch import nn

from fisherkern.bench import results
from fisherkern.bench.training import make
from fisherkern.bench.training_problems import NATURAL, PROBLEMS, Problem

# Captures come at every second step, inverses at powers of two, which are left out: of the others
# an odd one solves alone, and an even one captures. Memory is warm after so many.
_WARM = 5
# After that one of each.
_FEWEST = _WARM + 2


def measure(problem: Problem, batch: int, steps: int) -> dict[str, float]:
    """Median seconds of each kind of step, and of making all inverses.

    Args:
        problem: what is trained.
        batch: windows of a step.
        steps: taken with each optimizer, at least `_FEWEST`.
    """
    torch.manual_seed(0)
    model = problem.model()
    models = {"AdamW": copy.deepcopy(model), NATURAL: model}
    options = copy.deepcopy(problem.options)
    options[NATURAL]["preconditioner"].update(factor_update_period=2, inverse_update_period=1 << 20)
    made = {name: make(name, models[name], options[name]) for name in models}
    batches = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = defaultdict(list)
    preconditioner = made[NATURAL][1]
    assert preconditioner is not None
    try:
        for step in range(steps):
            draws = range(-(-batch // problem.batch))
            windows = torch.cat([problem.windows(batches) for _ in draws])[:batch]
            for name, (optimizer, _) in made.items():
                began = time.perf_counter()
                _step(problem, models[name], optimizer, windows)
                if step < _WARM or step & (step - 1) == 0:
                    continue
                captured = "capture" if step % 2 == 0 else "solve"
                kind = "AdamW" if name == "AdamW" else captured
                seconds[kind].append(time.perf_counter() - began)
        for _ in range(2):
            began = time.perf_counter()
            preconditioner.refresh()
            seconds["inverses"].append(time.perf_counter() - began)
    finally:
        preconditioner.detach()
    return {kind: statistics.median(times) for kind, times in seconds.items()}


def _step(
    problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer, windows: torch.Tensor
) -> None:
    optimizer.zero_grad()
    problem.loss(model, windows).backward()
    optimizer.step()


def ratio(seconds: dict[str, float], factor_period: int, inverse_period: int) -> float:
    """The mean step over that of AdamW."""
    captures = (seconds["capture"] - seconds["solve"]) / factor_period
    mean = seconds["solve"] + captures + seconds["inverses"] / inverse_period
    return mean / seconds["AdamW"]


def main() -> None:
    """Time, print and write."""
    parser = argparse.ArgumentParser(prog="python -m fisherkern.bench.training_cost")
    parser.add_argument("--problem", choices=PROBLEMS, default="gpt")
    parser.add_argument("--batch", type=int, help="windows of a step")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--factor-period", type=int, default=10)
    parser.add_argument("--inverse-period", type=int, default=100)
    parser.add_argument("--output", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if arguments.steps < _FEWEST:
        parser.error(f"--steps is {arguments.steps}; allowed are ints >= {_FEWEST}")
    problem = PROBLEMS[arguments.problem]()
    batch = arguments.batch or problem.batch
    seconds = measure(problem, batch, arguments.steps)
    periods = arguments.factor_period, arguments.inverse_period
    found = ratio(seconds, *periods)
    tokens = batch * problem.length
    print(f"{problem.title}, {tokens} {problem.unit}s a step; in steps of AdamW:")
    for kind in ("solve", "capture", "inverses"):
        print(f"  {kind:9}{seconds[kind] / seconds['AdamW']:7.2f}")
    print(f"  mean step, factors every {periods[0]}, inverses every {periods[1]}: {found:.2f}")
    if arguments.output is not None:
        whole = {
            "environment": results.environment("cpu"),
            "problem": problem.title,
            "tokens_per_step": tokens,
            "seconds": seconds,
            "periods": periods,
            "mean_step_over_adamw": found,
        }
        arguments.output.write_text(json.dumps(whole, indent=1))


if __name__ == "__main__":
    main()
