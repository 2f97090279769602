"""Peak memory of a call beyond its inputs and outputs.

CUDA: the allocator's peak. CPU: the kernel's high-water mark of resident memory (VmHWM, reset
through /proc/self/clear_refs), which sees torch and C++ scratch alike, including scratch that a
library keeps for its next call: the first call at full size is measured, in a process of its own,
after a small call has started threads and loaded code. It resolves about 0.5 MiB (pages, thread
stacks). As a cross-check torch.profiler counts what the allocator of torch hands out, exactly;
that sees no C++ scratch. The larger of the two is reported.

``python -m fisherkern.bench.memory`` is the server behind :class:`MemoryServer`: it imports once,
starts no threads, and forks a child per request (a line of JSON each way).
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fisherkern.bench import providers, registry
from fisherkern.bench.registry import Case, Provider
from fisherkern.bench.timing import Buffers, Timed

_TIMEOUT = 300


@dataclass(frozen=True)
class Memory:
    """Bytes beyond inputs and outputs; `torch_bytes` counts the allocator of torch alone."""

    extra_bytes: int
    torch_bytes: int
    method: str


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith("VmHWM")) * 1024


def _reset_resident_peak() -> bool:
    """Start a new high-water mark from the memory in use, without what malloc keeps for later."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def profiled_peak(call: Callable[[], Any]) -> int:
    """Peak of the bytes that torch allocated on the CPU during a call."""
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], profile_memory=True) as profile:
        result = call()
    del result
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    changes = [(e["ts"], e["args"]["Bytes"]) for e in events if e.get("name") == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda x: x[0]):
        held += change
        peak = max(peak, held)
    return peak


def _output_bytes(case: Case, result: Any, out: torch.Tensor | None) -> int:
    if case.op.in_place:
        return 0
    storages = (x.untyped_storage() for x in registry.as_tuple(result))
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    if out is not None:
        sizes.pop(out.untyped_storage().data_ptr(), None)
    return sum(sizes.values())


def _prepared(case: Case, provider: Provider) -> tuple[Callable[[], Any], torch.Tensor | None]:
    inputs = case.make_inputs()
    out = case.op.out(inputs) if provider.uses_out and case.op.out is not None else None
    if out is not None:
        out.zero_()
    timed = Timed(provider, provider.prepare(case, inputs, out))
    return lambda: timed(Buffers(inputs, out)), out


def measure_here(case: Case, provider: Provider) -> Memory:
    """Memory of one call in this process; on the CPU meant for a fresh one."""
    with provider.context(), torch.no_grad():
        if case.device == "cuda":
            call, out = _prepared(case, provider)
            call()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            result = call()
            torch.cuda.synchronize()
            extra = torch.cuda.max_memory_allocated() - before - _output_bytes(case, result, out)
            return Memory(max(extra, 0), max(extra, 0), "cuda allocator")
        if provider.kind != "compile":  # which runs once while it compiles
            small = case.family.warm_up(case.shape)
            warm, _ = _prepared(Case(case.family, case.op, small, case.dtype), provider)
            warm()
            del warm
        call, out = _prepared(case, provider)
        seen = _reset_resident_peak()
        before = _resident_peak() if seen else 0
        result = call()
        size = _output_bytes(case, result, out)
        resident = _resident_peak() - before - size if seen else 0
        del result
        counted = max(profiled_peak(call) - size, 0)
        method = "resident peak" if seen else "torch.profiler"
        return Memory(max(resident, counted), counted, method)


class MemoryServer:
    """A process that measures CPU cases; a context manager."""

    def __init__(self) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        environment = {**os.environ, "PYTHONPATH": paths, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fisherkern.bench.memory"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def __enter__(self) -> MemoryServer:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def measure(self, case: Case, provider: str) -> Memory | None:
        """Memory of one call of a registered case, or None if that did not work."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        request = {
            "family": case.family.name,
            "op": case.op.name,
            "shape": case.shape,
            "dtype": case.dtype_name,
            "provider": provider,
            "threads": torch.get_num_threads(),
        }
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        except OSError:
            return None
        return Memory(**json.loads(answer)) if answer.strip() else None


def _serve_one(request: dict[str, Any]) -> Memory:
    torch.set_num_threads(request["threads"])
    family = registry.families()[request["family"]]
    dtype = registry.DTYPES[request["dtype"]]
    case = Case(family, family.op(request["op"]), tuple(request["shape"]), dtype)
    found = {p.name: p for p in providers.providers(family, "cpu", dtype)}
    return measure_here(case, found[request["provider"]])


def serve() -> None:
    """Answer requests on stdin until it ends; an empty line where a child failed."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing but answers may reach the other side
    registry.families()
    for line in sys.stdin:
        receive, send = os.pipe()
        child = os.fork()
        if child == 0:
            signal.alarm(_TIMEOUT)
            with contextlib.suppress(Exception):
                memory = _serve_one(json.loads(line))
                os.write(send, json.dumps(memory.__dict__).encode())
            os._exit(0)
        os.close(send)
        with os.fdopen(receive) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        answers.write(answer.strip() + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
