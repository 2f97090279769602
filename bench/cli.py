"""``fisherkern bench``: arguments, the run, what it prints and writes."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

from fisherkern.bench import ceilings, providers, registry, report, results, runner, verdict
from fisherkern.bench.memory import MemoryServer
from fisherkern.bench.registry import Case, Family, Provider, Shape
from fisherkern.bench.results import OK
from fisherkern.bench.runner import Options, Outcome


def _shape(text: str) -> Shape:
    try:
        shape = tuple(int(part) for part in text.lower().split("x"))
    except ValueError:
        shape = ()
    if not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape, e.g. 256x50257")
    return shape


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parser(families: Sequence[str]) -> argparse.ArgumentParser:
    """The arguments of ``fisherkern bench``."""
    p = argparse.ArgumentParser(
        prog="fisherkern bench",
        description="Time the ops of a family against plain PyTorch, torch.compile and peers; "
        "a case whose result is wrong gets no speed.",
    )
    p.add_argument("family", choices=families)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--ops", nargs="+", help='names, or "all"; default: the ops with a stated bar')
    p.add_argument("--dtypes", nargs="+", choices=tuple(registry.DTYPES))
    p.add_argument(
        "--shapes", nargs="+", type=_shape, help="e.g. 256x50257 (T x V), 4096x1024 (T x d)"
    )
    p.add_argument("--providers", nargs="+", help='names, e.g. cpp "cpp out=" eager compile')
    p.add_argument("--repeats", type=_positive, default=15, help="rounds (default: 15)")
    p.add_argument("--seed", type=int, default=0, help="of the inputs (default: 0)")
    p.add_argument("--backend-threads", type=_positive, help="threads of every CPU provider")
    p.add_argument("--output", type=Path, help="folder for results.csv and results.json")
    p.add_argument("--plots", action="store_true", help="PNG plots in the output folder too")
    p.add_argument("--no-memory", action="store_true", help="do not measure memory")
    p.add_argument("--smoke", action="store_true", help="tiny shape, two rounds, no bars")
    p.add_argument("--strict", action="store_true", help="exit with status 1 if a bar is missed")
    return p


@dataclass(frozen=True)
class Plan:
    """Checked arguments."""

    family: Family
    cases: list[Case]
    names: tuple[str, ...] | None
    """Providers asked for; None: the default ones."""

    def chosen(self, case: Case) -> list[Provider]:
        """The providers of a case."""
        found = providers.providers(self.family, case.device, case.dtype)
        if self.names is None:
            return [p for p in found if p.default]
        return [p for p in found if p.name in self.names]


def plan(arguments: argparse.Namespace) -> Plan:
    """What to run; ValueError names the argument that cannot be followed."""
    family = registry.families()[arguments.family]
    ops = arguments.ops and tuple(arguments.ops)
    if ops == ("all",):
        ops = tuple(op.name for op in family.ops)
    shapes = arguments.shapes and tuple(arguments.shapes)
    if any(len(shape) != len(family.dimensions) for shape in shapes or ()):
        raise ValueError(f"--shapes of {family.name} are {'x'.join(family.dimensions)}")
    if arguments.smoke and not shapes:
        shapes = (family.smoke,)
    if arguments.plots and arguments.output is None:
        raise ValueError("--plots needs --output")
    dtypes = arguments.dtypes and tuple(arguments.dtypes)
    if set(dtypes or ()) - set(family.written_for):
        allowed = ", ".join(family.written_for)
        raise ValueError(f"--dtypes of {family.name} are {allowed}, got {' '.join(dtypes)}")
    cases = registry.cases(family, arguments.device, ops=ops, dtypes=dtypes, shapes=shapes)
    names = arguments.providers and tuple(arguments.providers)
    known = {p.name for c in cases for p in providers.providers(family, c.device, c.dtype)}
    if names and set(names) - known:
        raise ValueError(f"--providers allows {sorted(known)}, got {sorted(set(names) - known)}")
    todo = Plan(family, cases, names)
    if names and all(p.refusal(c) for c in cases for p in todo.chosen(c)):
        raise ValueError(f"--providers {list(names)} compute none of the cases asked for")
    return todo


def _require_output(folder: Path) -> None:
    """Make the folder and try its files, before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("results.csv", "results.json"):
            new = not (folder / name).exists()
            (folder / name).open("a").close()
            if new:
                (folder / name).unlink()
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be written: {error}") from error


def _print(text: str) -> None:
    print(text, flush=True)


def run(arguments: argparse.Namespace) -> int:
    """Run a benchmark; 1 if a provider was wrong (or, with ``--strict``, a bar was missed)."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda needs a GPU that torch can see")
    if arguments.backend_threads:
        torch.set_num_threads(arguments.backend_threads)
    todo = plan(arguments)
    device, smoke = arguments.device, arguments.smoke
    if arguments.output is not None:
        _require_output(arguments.output)
    if arguments.plots:
        from fisherkern.bench import plots

        plots.require()
    environment = results.environment(device)
    _print(report.environment(environment))
    outcome = Outcome()
    with ExitStack() as stack:
        options = Options(repeats=2 if smoke else arguments.repeats, seed=arguments.seed)
        options.budget = todo.family.budget
        options.patience = math.inf if todo.names else todo.family.patience
        options.rotation = 0 if smoke else None
        if device == "cpu" and not arguments.no_memory:
            # forked from a process of its own, before this one has a large heap
            options.server = stack.enter_context(MemoryServer())
        limits = ceilings.measure(device, _ceiling_dtypes(todo.cases), smoke=smoke)
        _print(report.ceilings(limits))
        for case in todo.cases:
            one = runner.run_case(case, todo.chosen(case), options, limits)
            _print(report.case(one.results, one.ratios))
            outcome.extend(one)
        drift = None if smoke else ceilings.copy_bandwidth(device) / limits.copy_bandwidth
        sweep = _sweep(todo, options, device) if arguments.plots and not smoke else []
    # back ends differ with the dtype, so the first case does not tell
    named = (name for case in todo.cases for name in providers.best(todo.chosen(case)))
    subjects = list(dict.fromkeys(named))
    bars = verdict.judge(
        outcome.results,
        outcome.ratios,
        todo.family,
        subjects,
        device,
        memory_asked=options.server is not None,
    )
    bars = [] if smoke else bars
    _print(report.summary(outcome.results, outcome.ratios, bars, drift))
    if smoke:
        _print("A smoke run: it shows that everything works, and its speeds mean nothing.")
    outcome.results += sweep
    if arguments.output is not None:
        _write(arguments, outcome, environment, limits, bars)
    wrong = any(r.status.startswith(("wrong", "failed")) for r in outcome.results)
    return int(wrong or (arguments.strict and not all(bar.passed for bar in bars)))


def _ceiling_dtypes(cases: Sequence[Case]) -> tuple[torch.dtype, ...]:
    dtypes = [case.dtype for case in cases]
    # the other ceiling of a product in half precision
    dtypes += [torch.float32 for case in cases if case.op.ceiling == "gemm"]
    return tuple(dict.fromkeys(dtypes))


def _sweep(todo: Plan, options: Options, device: str) -> list[results.Result]:
    """Memory of the first op in its first dtype, over the shapes of the plot."""
    if not todo.cases or (device == "cpu" and options.server is None):
        return []
    first = todo.cases[0]
    shapes = [Case(todo.family, first.op, s, first.dtype, device) for s in todo.family.sweeps]
    return runner.memory_sweep(shapes, todo.chosen, options)


def _write(
    arguments: argparse.Namespace,
    outcome: Outcome,
    environment: dict[str, object],
    limits: ceilings.Ceilings,
    bars: list[verdict.Verdict],
) -> None:
    folder = arguments.output
    results.write_csv(folder / "results.csv", outcome.results)
    sections = {"environment": environment, "ceilings": limits, "verdicts": bars}
    results.write_json(folder / "results.json", outcome.results, **sections, ratios=outcome.ratios)
    names = ["results.csv", "results.json"]
    if arguments.plots:
        from fisherkern.bench import plots

        names += plots.draw_all(folder, outcome.results, limits)
    timed = sum(r.status == OK for r in outcome.results)
    _print(f"Wrote {', '.join(names)} ({timed} timed rows).")


def main(argv: list[str] | None = None) -> int:
    """Entry point of ``fisherkern bench``; returns the exit status."""
    p = parser(sorted(registry.families()))
    arguments = p.parse_args(argv)
    try:
        return run(arguments)
    except ValueError as error:
        p.error(str(error))
