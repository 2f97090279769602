"""One suite for every back end: which of them a run covers is the environment's choice.

FISHERKERN_TEST_BACKENDS  comma-separated: cpp, reference, triton (CPU: with TRITON_INTERPRET=1),
                          cuda, emulated (the CUDA sources on the host). Default: what serves the
                          device, best first.
FISHERKERN_TEST_DEVICE    cpu (default) or cuda.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

if os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter  # noqa: F401  before any kernel is defined

import fisherkern
from fisherkern import backends
from fisherkern.ops import _cuda_kernels

DEVICE = os.environ.get("FISHERKERN_TEST_DEVICE", "cpu")
_ASKED = os.environ.get("FISHERKERN_TEST_BACKENDS", "")
BACKENDS = _ASKED.split(",") if _ASKED else fisherkern.available(DEVICE)
# worker processes that each start a thread per core wait for each other
torch.set_num_threads(
    max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
)
# where a case costs milliseconds per program, the grids of sizes are thinned
SLOW = bool({"triton", "emulated"} & set(BACKENDS)) and DEVICE == "cpu"


def pytest_report_header() -> str:
    return f"fisherkern back ends under test: {', '.join(BACKENDS)} on {DEVICE}; slow: {SLOW}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", BACKENDS, indirect=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A run for one back end leaves what does not depend on back ends to the main run."""
    if not _ASKED:
        return
    kept, left = [], []
    for item in items:
        (kept if "backend" in getattr(item, "fixturenames", ()) else left).append(item)
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(autouse=True, scope="session")
def _poison_uninitialised_memory() -> Iterator[None]:
    # fills torch.empty and its kin with NaN, in C++ too: an element that is never written shows
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@contextmanager
def serving(name: str) -> Iterator[None]:
    """Serve ops by this back end, the emulated CUDA one included."""
    if name != "emulated":
        with fisherkern.backend(name):
            yield
        return
    from cuda_emulation import build

    emulated, reason = build.load()
    if emulated is None:
        pytest.skip(f"the CUDA sources cannot be emulated here: {reason}")
    patch = pytest.MonkeyPatch()
    patch.setattr(backends, "select", lambda *_: "emulated")
    patch.setattr(backends, "load", lambda name: _cuda_kernels.Kernels(emulated))
    try:
        yield
    finally:
        patch.undo()


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with serving(request.param):
        yield request.param


@pytest.fixture
def device() -> str:
    return DEVICE
