"""One runner for CPU and CUDA: check, then time, then measure memory; case by case."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fisherkern.bench import accuracy, results, timing
from fisherkern.bench.ceilings import Ceilings
from fisherkern.bench.memory import Memory, MemoryServer, measure_here
from fisherkern.bench.registry import Case, Provider, as_tuple
from fisherkern.bench.results import OK, Ratio, Result
from fisherkern.bench.timing import Buffers, Timed

# Room for the float64 truth of one chunk of tokens.
_TRUTH_BYTES = 1 << 30


@dataclass
class Options:
    """How to run; `rotation`: bytes that rotated buffers span, None for what the caches ask.

    `budget` and `patience`: see :class:`fisherkern.bench.registry.Family`.
    """

    repeats: int = 15
    seed: int = 0
    rotation: int | None = None
    server: MemoryServer | None = None
    """Measures memory on the CPU; None: memory is not measured there."""
    budget: float = math.inf
    patience: float = math.inf


@dataclass
class Outcome:
    """All that a run found."""

    results: list[Result] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)

    def extend(self, other: Outcome) -> None:
        """Add what another run found."""
        self.results += other.results
        self.ratios += other.ratios


def blank(case: Case, provider: Provider, ceilings: Ceilings | None) -> Result:
    """The row of a case and provider before anything is known."""
    # a product whose result is float32 has that rate as its ceiling
    dtype = str(case.accuracy_dtype).removeprefix("torch.")
    rate = None if ceilings is None else ceilings.rate(case.op.ceiling, dtype)
    return Result(
        family=case.family.name,
        op=case.op.name,
        case=case.label,
        provider=provider.name,
        kind=provider.kind,
        device=case.device,
        dtype=case.dtype_name,
        status="not timed",
        threads=torch.get_num_threads(),
        repeats=0,
        median_s=None,
        p20_s=None,
        p80_s=None,
        floor_bytes=case.op.floor_bytes(case),
        flops=case.op.flops(case),
        bandwidth=None,
        ceiling=case.op.ceiling,
        ceiling_rate=rate,
        ceiling_fraction=None,
        extra_bytes=None,
        torch_extra_bytes=None,
        memory_method="",
        max_error=None,
        error_limit=None,
        versions=results.versions(),
    )


def _poison(out: Tensor | None) -> None:
    if out is not None:
        out.fill_(float("nan") if out.is_floating_point() else -1)


def _working(case: Case, buffers: Buffers) -> Buffers:
    """Buffers that may be written to: the inputs of a case serve every provider of it."""
    if not case.op.in_place:
        return buffers
    first, *rest = buffers.inputs
    return Buffers((first.clone(), *rest), buffers.out)


@dataclass(frozen=True)
class _Check:
    """One call of a provider against float64."""

    error: float | None
    wrong: str
    """What is wrong with its result beyond an error; "" if nothing is."""
    seconds: float


def _check(timed: Timed, case: Case, buffers: Buffers) -> _Check:
    _poison(buffers.out)
    working = _working(case, buffers)
    start = time.perf_counter()
    outputs = as_tuple(timed(working))
    seconds = time.perf_counter() - start
    try:
        error = case.op.error(buffers.inputs, outputs)
    except ValueError as reason:
        return _Check(None, results.without_paths(str(reason)), seconds)
    if math.isnan(error):
        return _Check(None, "the error is NaN", seconds)
    return _Check(error, "", seconds)


def _failure(error: BaseException) -> str:
    return f"{type(error).__name__}: {results.without_paths(str(error))}"


def needed_bytes(case: Case, provider: Provider, rotation: int) -> int:
    """Bytes that checking and timing may take, generously."""
    floor = case.op.floor_bytes(case)
    temporaries = int(provider.temporaries * floor * max(1, 4 / case.dtype.itemsize))
    return max(floor, rotation) + floor + temporaries + _TRUTH_BYTES


def run_case(
    case: Case, found: Sequence[Provider], options: Options, ceilings: Ceilings | None = None
) -> Outcome:
    """Check every provider, time those that are right, in turns, and measure their memory."""
    rows = {p.name: blank(case, p, ceilings) for p in found if not p.refusal(case)}
    active = [p for p in found if p.name in rows]
    rotation = timing.rotation_bytes(case.device) if options.rotation is None else options.rotation
    plain = Provider(case.op.plain_name, "eager", lambda *_: case.op.plain, temporaries=6.0)
    if any(p.kind == "compile" for p in active):
        # one code object serves every shape of an op, and dynamo stops after a few versions of it
        torch._dynamo.reset()
    free = timing.free_memory(case.device)
    fits = {p.name: needed_bytes(case, p, rotation) <= free for p in [*active, plain]}
    try:
        if not fits[plain.name]:
            raise MemoryError(f"not even {plain.name}, the yardstick of errors, fits into memory")
        inputs = case.make_inputs(options.seed)
        wants_out = case.op.out is not None and any(p.uses_out for p in active)
        buffers = Buffers(inputs, case.op.out(inputs) if wants_out and case.op.out else None)
        # eager sets the error budget of everybody else
        with torch.no_grad():
            yardstick = _check(Timed(plain, case.op.plain), case, buffers)
    except (MemoryError, RuntimeError) as error:
        skipped = f"skipped: {_failure(error)}"
        return Outcome([replace(row, status=skipped) for row in rows.values()])
    ready: list[Timed] = []
    slow: dict[str, float] = {}
    for provider in active:
        row = rows[provider.name]
        if not fits[provider.name]:
            row = replace(row, status="skipped: it does not fit into memory")
        elif provider.kind == "compile" and slow.get(provider.formula, 0) > options.patience:
            row = _too_slow(row, provider.formula, slow[provider.formula])
        else:
            row, timed = _checked(case, provider, buffers, row, yardstick)
            if yardstick.wrong and provider.kind != "eager":
                reason = f"{plain.name} is wrong: {yardstick.wrong}"
                row = replace(row, status=f"failed: no error budget, {reason}")
            elif timed is not None:
                slow[provider.name] = timed.seconds
                if timed.seconds > options.patience and provider.kind not in ("ours", "eager"):
                    row = _too_slow(row, provider.name, timed.seconds)
                else:
                    ready.append(timed)
        rows[provider.name] = row
    try:
        with torch.no_grad():
            sets = timing.rotated(buffers, rotation) if ready else []
            seconds = timing.interleaved(ready, sets, options.repeats, case.device, options.budget)
    except (MemoryError, RuntimeError) as error:
        for timed in ready:
            rows[timed.provider.name] = replace(
                rows[timed.provider.name], status=f"failed: {_failure(error)}"
            )
        ready, seconds = [], {}
    sets = []
    del buffers, inputs
    gc.collect()
    for timed in ready:
        name = timed.provider.name
        rows[name] = _timed(rows[name], seconds[name])
        if timed.provider.kind != "yardstick":
            rows[name] = with_memory(rows[name], memory_of(case, timed.provider, options.server))
    if case.device == "cuda":
        torch.cuda.empty_cache()
    return Outcome(list(rows.values()), _ratios(case, ready, seconds))


def _too_slow(row: Result, name: str, seconds: float) -> Result:
    return replace(row, status=f"skipped: a call of {name} takes {seconds:.0f} s")


def _checked(
    case: Case, provider: Provider, buffers: Buffers, row: Result, yardstick: _Check
) -> tuple[Result, Timed | None]:
    """The row with its error, and the call if its result was right."""
    if provider.kind == "yardstick":
        return _unchecked(case, provider, buffers, row)
    allowed: float | None = accuracy.EAGER_LIMIT[case.accuracy_dtype]
    if provider.kind != "eager":
        # an eager that is wrong has no error to be compared with, and then nobody is timed
        known = yardstick.error
        allowed = None if known is None else accuracy.limit(case.accuracy_dtype, known)
    try:
        with provider.context(), torch.no_grad():
            working = _working(case, buffers)
            call = Timed(
                provider,
                provider.prepare(case, working.inputs, working.out),
                capturable=not _waits(case, provider),
            )
            check = yardstick if provider.kind == "eager" else _check(call, case, buffers)
    except Exception as exception:
        missing = provider.kind == "peer" and isinstance(exception, ImportError)
        status = "skipped: not installed" if missing else f"failed: {_failure(exception)}"
        return replace(row, status=status), None
    right = check.error is not None and allowed is not None and check.error <= allowed
    call.seconds = check.seconds
    status = OK if right else "wrong result" + (f": {check.wrong}" if check.wrong else "")
    row = replace(row, status=status, max_error=check.error, error_limit=allowed)
    return row, call if right else None


def _waits(case: Case, provider: Provider) -> bool:
    """Whether a call waits for the GPU."""
    if provider.formula:
        return case.op.plain_synchronizes
    return case.op.synchronizes and provider.kind in ("ours", "reference")


def _unchecked(
    case: Case, provider: Provider, buffers: Buffers, row: Result
) -> tuple[Result, Timed | None]:
    """The row of a yardstick: its call has no result to be right or wrong."""
    try:
        with provider.context(), torch.no_grad():
            call = Timed(provider, provider.prepare(case, buffers.inputs, None))
            start = time.perf_counter()
            call(buffers)
            call.seconds = time.perf_counter() - start
    except Exception as exception:
        return replace(row, status=f"failed: {_failure(exception)}"), None
    return replace(row, status=OK), call


def _timed(row: Result, seconds: list[float]) -> Result:
    q = timing.quantiles(seconds)
    work = row.floor_bytes if row.ceiling == "copy" else row.flops
    return replace(
        row,
        repeats=len(seconds),
        median_s=q.median,
        p20_s=q.p20,
        p80_s=q.p80,
        bandwidth=row.floor_bytes / q.median,
        ceiling_fraction=work / q.median / row.ceiling_rate if row.ceiling_rate else None,
    )


def memory_of(case: Case, provider: Provider, server: MemoryServer | None) -> Memory | None:
    """Extra memory of one call, or None where it is not measured."""
    if case.device == "cuda":
        return measure_here(case, provider)
    return None if server is None else server.measure(case, provider.name)


def with_memory(row: Result, memory: Memory | None) -> Result:
    """The row with its memory columns."""
    if memory is None:
        return row
    return replace(
        row,
        extra_bytes=memory.extra_bytes,
        torch_extra_bytes=memory.torch_bytes,
        memory_method=memory.method,
    )


def _ratios(case: Case, ready: list[Timed], seconds: dict[str, list[float]]) -> list[Ratio]:
    subjects = [x.provider for x in ready if x.provider.kind in ("ours", "reference")]
    others = ("eager", "compile", "peer", "yardstick")
    peers = [x.provider for x in ready if x.provider.kind in others]
    ratios = []
    for subject in subjects:
        for peer in peers:
            pairs = zip(seconds[peer.name], seconds[subject.name], strict=True)
            q = timing.quantiles([theirs / ours for theirs, ours in pairs])
            names = (case.op.name, case.label, case.dtype_name, subject.name, peer.name)
            ratios.append(Ratio(*names, q.median, q.p20, q.p80))
    return ratios


def memory_sweep(
    cases: Sequence[Case], choose: Callable[[Case], Sequence[Provider]], options: Options
) -> list[Result]:
    """Rows of status "not timed" with memory alone, for the plot of memory against shape."""
    rows = []
    for case in cases:
        for provider in choose(case):
            if not provider.refusal(case) and provider.kind != "yardstick":
                memory = memory_of(case, provider, options.server)
                rows.append(with_memory(blank(case, provider, None), memory))
    return rows
