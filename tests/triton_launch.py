"""Launch Triton kernels on a GPU that is not here: all that a launch does on the host.

Inside `gpu(...)` tensors of the CPU pass for those of a GPU. Triton binds and specialises the
arguments, translates the kernel for that specialisation, looks for changed globals and calls its
launcher, which here takes a note and returns. Results are what memory held. Compilation ends at
Triton's own representation: the rest, 9 of 10 parts of the time, is for triton_compile.py. Needs a
process without TRITON_INTERPRET.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import triton_compile
from triton import JITFunction
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from fisherkern import backends


class _Utils:
    """What Triton asks of the driver before the first launch of a kernel."""

    def __init__(self, shared: int) -> None:
        self._shared = shared

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._shared}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple:
        """Module, function, registers, spills, most threads of a block.

        No module: Triton would unload it later, when another driver may be active.
        """
        return None, None, 0, 0, 1024


class _Driver:
    """One device of an architecture. Its number, 80 or 90, is that of no other device."""

    def __init__(self, architecture: str, launches: Counter[str]) -> None:
        self._target = triton_compile.TARGETS[architecture]
        self._launches = launches
        self.utils = _Utils(triton_compile.SHARED_LIMIT[architecture])

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        def launch(x: int, y: int, z: int, *arguments: Any) -> None:
            # a launch of an empty grid is none
            if x * y * z > 0:
                self._launches[source.fn.__name__] += 1

        return launch


def _no_binary(module: Any, metadata: dict[str, Any]) -> bytes:
    metadata |= {"name": "", "shared": 0}
    return b""


def _front_end(add_stages: Callable) -> Callable:
    def add(self: Any, stages: dict[str, Callable], *how: Any) -> None:
        add_stages(self, stages, *how)
        first = stages["ttir"]
        stages.clear()
        stages.update(ttir=first, cubin=_no_binary)

    return add


@contextmanager
def gpu(architecture: str, cache: Path) -> Iterator[Counter[str]]:
    """Tensors of the CPU are on a GPU of this architecture; counts launches by name of the kernel.

    `cache` is a folder for what Triton compiles here, which is of use nowhere else.
    """
    launches: Counter[str] = Counter()
    device = _Driver(architecture, launches)
    modules = triton_compile.kernel_modules()
    reason_against = backends.reason_against

    def reason(name: str, kind: str, dtype: Any) -> str:
        return reason_against(name, "cuda" if name == "triton" else kind, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache))
        patch.setattr(driver, "_active", device)
        patch.setattr(CUDABackend, "add_stages", _front_end(CUDABackend.add_stages))
        patch.setattr(backends, "reason_against", reason)
        for module in modules:
            if hasattr(module, "architecture"):
                patch.setattr(module, "architecture", lambda device: architecture)
        try:
            with backends.backend("triton"):
                yield launches
        finally:
            for module in modules:
                for value in vars(module).values():
                    if isinstance(value, JITFunction):
                        value.device_caches.pop(device.get_current_device(), None)
