"""Builds csrc/cuda for the host and offers its ops: :func:`load` and :class:`Emulated`.

    kernels, reason = load()          # reason is "" or why there is none
    kernels.softmax_fisher_trace(logits, mask, logsumexp, temperature, out)

Objects are kept under build/cuda_emulation, named by a hash of everything that goes into them.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "csrc" / "cuda"
CACHE = ROOT / "build" / "cuda_emulation"
# What emulation.h begins with: rows of a few hundred classes are cut into slices.
SLICE_BYTES = 1024
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


@cache
def cuda_include() -> Path | None:
    """The folder of cuda_runtime.h: CUDA_HOME's, or the one that nvcc, maybe a wrapper, uses."""
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [Path(home) / "include" for home in homes if home]
    nvcc = shutil.which("nvcc")
    if nvcc:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "empty.cu"
            source.write_text("")
            command = [nvcc, "--dryrun", "-c", str(source), "-o", str(source.with_suffix(".o"))]
            said = subprocess.run(command, capture_output=True, text=True, check=False)
        # lines such as: #$ INCLUDES="-I/opt/cuda/bin/../targets/x86_64-linux/include"
        candidates += [Path(found) for found in re.findall(r'"-I([^"]+)"', said.stderr)]
        candidates.append(Path(nvcc).resolve().parents[1] / "include")
    return next((path for path in candidates if (path / "cuda_runtime.h").exists()), None)


def missing() -> str:
    """Why nothing can be built here, or ""."""
    if shutil.which("g++") is None:
        return "the emulation needs g++"
    if cuda_include() is None:
        return "the emulation needs the CUDA headers: no nvcc on PATH, no CUDA_HOME"
    return ""


def _flags(sanitize: bool) -> list[str]:
    flags = ["-std=c++17", "-O1", "-g1", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas"]
    flags += ["-DFISHERKERN_HOST_EMULATION", f"-I{HERE}", f"-I{SOURCES}"]
    flags += ["-isystem", str(cuda_include())]
    return flags + (["-fsanitize=address"] if sanitize else [])


def build(sources: list[Path], name: str, *, sanitize: bool = False) -> Path:
    """One shared library from `sources`, each compiled as C++; what is up to date is kept."""
    flags = _flags(sanitize)
    headers = sorted([*SOURCES.glob("*.*h"), *SOURCES.parent.glob("*.h"), *HERE.glob("*.h")])
    common = hashlib.sha256(" ".join(flags).encode())
    for header in headers:
        common.update(header.read_bytes())

    def compiled(source: Path) -> Path:
        digest = common.copy()
        digest.update(source.read_bytes())
        target = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.o")
            command = ["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.rename(target)
        return target

    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock, ThreadPoolExecutor(os.cpu_count()) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes, one build
        objects = list(pool.map(compiled, sources))
        digest = hashlib.sha256(" ".join(map(str, objects)).encode()).hexdigest()[:16]
        library = CACHE / f"{name}-{digest}.so"
        if not library.exists():
            partial = library.with_suffix(f".{os.getpid()}.so")
            extra = ["-fsanitize=address"] if sanitize else []
            command = ["g++", "-shared", *extra, *map(str, objects), "-o", str(partial)]
            subprocess.run(command, check=True)
            partial.rename(library)
    return library


class _Rows(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
    )


class _Problem(ctypes.Structure):
    """SoftmaxFisher of csrc/softmax_fisher.h."""

    _fields_ = (
        ("batches", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("classes", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("temperature", ctypes.c_double),
        ("logits", _Rows),
        ("weights", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("logsumexp", ctypes.c_void_p),
    )


def _structure(name: str, **fields: Any) -> type[ctypes.Structure]:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_INT, _POINTER, _BOOL = ctypes.c_int64, ctypes.c_void_p, ctypes.c_bool
_Activations = _structure(
    "Activations",
    data=_POINTER,
    dtype=ctypes.c_int32,
    tokens=_INT,
    heads=_INT,
    columns=_INT,
    batch_stride=_INT,
    token_stride=_INT,
    head_stride=_INT,
    bias=_BOOL,
    squares=_BOOL,
)
_TokenWeights = _structure(
    "TokenWeights",
    weights=_POINTER,
    mask=_POINTER,
    head_stride=_INT,
    batch_stride=_INT,
    token_stride=_INT,
)
_Panel = _structure(
    "Panel",
    data=_POINTER,
    dtype=ctypes.c_int32,
    first_token=_INT,
    tokens=_INT,
    row=_INT,
)
_FactorUpdate = _structure(
    "FactorUpdate",
    tile=_POINTER,
    heads=_INT,
    rows=_INT,
    columns=_INT,
    tile_head=_INT,
    tile_row=_INT,
    factor=_POINTER,
    dtype=ctypes.c_int32,
    factor_head=_INT,
    factor_row=_INT,
    first_row=_INT,
    first_column=_INT,
    alpha=_POINTER,
    beta=ctypes.c_double,
    lower=_BOOL,
    squares=_BOOL,
)
_Matrices = _structure(
    "Matrices",
    data=_POINTER,
    dtype=ctypes.c_int32,
    heads=_INT,
    width=_INT,
    head_stride=_INT,
    row_stride=_INT,
    column_stride=_INT,
)


def _rows(x: Tensor) -> _Rows:
    return _Rows(x.data_ptr(), x.stride(0), x.stride(1))


def _pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


class Emulated:
    """The kernels of csrc/cuda on CPU tensors: the ops that csrc/ops.cpp declares for CUDA."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.emulation_error.restype = ctypes.c_char_p

    def seed(self, value: int) -> None:
        """Choose the schedule of warps and blocks."""
        self._library.emulation_seed(ctypes.c_uint32(value))

    def slice_bytes(self, size: int) -> None:
        """How much of a row a block of a cluster keeps; 0: as on devices without clusters."""
        self._library.emulation_slice_bytes(ctypes.c_uint64(size))

    def _run(self, name: str, logits: Tensor, temperature: float, *operands: object, **per_token):
        problem = _Problem(
            *logits.shape,
            DTYPES[logits.dtype],
            temperature,
            _rows(logits),
            *(_pointer(per_token.get(key)) for key in ("weights", "mask", "logsumexp")),
        )
        size = 0
        if hasattr(self._library, f"{name}_workspace"):
            function = getattr(self._library, f"{name}_workspace")
            function.restype = ctypes.c_int64
            size = function(ctypes.byref(problem))
        workspace = torch.full((size,), 255, dtype=torch.uint8)  # NaN where nothing was written
        status = getattr(self._library, name)(
            ctypes.byref(problem), *operands, _pointer(workspace if size else None)
        )
        if status:
            said = self._library.emulation_error().decode() or "refused"
            raise RuntimeError(f"{name}: {said} (cudaError {status})")

    def softmax_fisher_matvec(self, logits, v, weights, logsumexp, temperature, out) -> None:
        self._row_op("softmax_fisher_matvec", logits, v, weights, logsumexp, temperature, out)

    def softmax_fisher_sqrt_matvec(self, logits, v, weights, logsumexp, temperature, out) -> None:
        self._row_op("softmax_fisher_sqrt_matvec", logits, v, weights, logsumexp, temperature, out)

    def softmax_fisher_sqrt_rmatvec(self, logits, v, weights, logsumexp, temperature, out) -> None:
        self._row_op("softmax_fisher_sqrt_rmatvec", logits, v, weights, logsumexp, temperature, out)

    def _row_op(self, name, logits, v, weights, logsumexp, temperature, out) -> None:
        per_token = {"weights": weights, "logsumexp": logsumexp}
        self._run(name, logits, temperature, _rows(v), _rows(out), **per_token)

    def softmax_fisher_matvec_backward(
        self, logits, v, grad, weights, logsumexp, temperature, out
    ) -> None:
        self._run(
            "softmax_fisher_matvec_backward",
            logits,
            temperature,
            _rows(v),
            _rows(grad),
            _rows(out),
            weights=weights,
            logsumexp=logsumexp,
        )

    def softmax_fisher_quadratic(self, logits, v, mask, logsumexp, temperature, out) -> None:
        directions = _Rows(v.data_ptr(), v.stride(0), v.stride(1))
        stride, count = ctypes.c_int64(v.stride(2)), ctypes.c_int64(v.shape[2])
        self._run(
            "softmax_fisher_quadratic",
            logits,
            temperature,
            directions,
            stride,
            count,
            _pointer(out),
            mask=mask,
            logsumexp=logsumexp,
        )

    def softmax_fisher_diagonal(self, logits, weights, logsumexp, temperature, out) -> None:
        per_token = {"weights": weights, "logsumexp": logsumexp}
        self._run("softmax_fisher_diagonal", logits, temperature, _rows(out), **per_token)

    def softmax_fisher_diagonal_sum(self, logits, weights, logsumexp, temperature, out) -> None:
        per_token = {"weights": weights, "logsumexp": logsumexp}
        self._run("softmax_fisher_diagonal_sum", logits, temperature, _pointer(out), **per_token)

    def softmax_fisher_mean_probs(self, logits, weights, logsumexp, temperature, out) -> None:
        self.softmax_fisher_powers(logits, weights, logsumexp, temperature, out, None, None)

    def softmax_fisher_powers(
        self, logits, weights, logsumexp, temperature, sums, reference, unit
    ) -> None:
        operands = (_pointer(sums), _pointer(reference), _pointer(unit))
        per_token = {"weights": weights, "logsumexp": logsumexp}
        self._run("softmax_fisher_powers", logits, temperature, *operands, **per_token)

    def softmax_fisher_trace(self, logits, mask, logsumexp, temperature, out) -> None:
        per_token = {"mask": mask, "logsumexp": logsumexp}
        self._run("softmax_fisher_trace", logits, temperature, _pointer(out), **per_token)

    def softmax_fisher_stats(self, logits, mask, logsumexp, temperature, out) -> None:
        per_token = {"mask": mask, "logsumexp": logsumexp}
        self._run("softmax_fisher_stats", logits, temperature, _pointer(out), **per_token)

    def softmax_fisher_stats_backward(self, logits, stats, grad, mask, temperature, out) -> None:
        operands = (_pointer(stats), _pointer(grad), _rows(out))
        self._run("softmax_fisher_stats_backward", logits, temperature, *operands, mask=mask)

    def softmax_fisher_gradient(self, logits, labels, weights, logsumexp, temperature, out) -> None:
        per_token = {"weights": weights, "logsumexp": logsumexp}
        operands = (_pointer(labels), _rows(out))
        self._run("softmax_fisher_gradient", logits, temperature, *operands, **per_token)

    def softmax_fisher_sample(
        self, logits, seed, weights, logsumexp, temperature, labels, out
    ) -> None:
        per_token = {"weights": weights, "logsumexp": logsumexp}
        operands = (_pointer(seed), _pointer(labels), _rows(out))
        self._run("softmax_fisher_sample", logits, temperature, *operands, **per_token)

    def softmax_fisher_panel(
        self, logits, reference, unit, scale, temperature, transposed, out
    ) -> None:
        operands = (
            _pointer(reference),
            _pointer(scale),
            _pointer(out),
            ctypes.c_int64(out.stride(0)),
            ctypes.c_bool(transposed),
        )
        self._run("softmax_fisher_panel", logits, temperature, *operands, weights=unit)

    def _launch(self, name: str, *structures: ctypes.Structure) -> None:
        status = getattr(self._library, name)(*map(ctypes.byref, structures))
        if status:
            said = self._library.emulation_error().decode() or "refused"
            raise RuntimeError(f"{name}: {said} (cudaError {status})")

    def covariance_pack(self, x, mask, weights, bias, squares, first_token, panel) -> None:
        heads, _, length, columns = x.shape
        assert panel.is_contiguous()
        assert len(panel) == heads
        assert columns <= 1 or x.stride(3) == 1
        head_stride, batch_stride, token_stride, _ = x.stride()
        given = mask if weights is None else weights
        strides = (0, 0, 0) if given is None else given.stride()
        self._launch(
            "covariance_pack",
            _Activations(
                x.data_ptr(),
                DTYPES[x.dtype],
                length,
                heads,
                columns,
                batch_stride,
                token_stride,
                head_stride,
                bias,
                squares,
            ),
            _TokenWeights(_pointer(weights), _pointer(mask), *strides),
            _Panel(
                panel.data_ptr(),
                DTYPES[panel.dtype],
                first_token,
                *panel.shape[1:],
            ),
        )

    def factor_update(
        self, tile, alpha, beta, first_row, first_column, lower, squares, factor
    ) -> None:
        assert tile.dtype == torch.float32
        assert alpha.dtype == factor.dtype
        assert first_row + tile.shape[1] <= factor.shape[1]
        assert first_column + tile.shape[2] <= factor.shape[2]
        assert len(factor) == (1 if squares else len(tile))
        self._launch(
            "factor_update",
            _FactorUpdate(
                tile.data_ptr(),
                *tile.shape,
                *tile.stride()[:2],
                factor.data_ptr(),
                DTYPES[factor.dtype],
                *factor.stride()[:2],
                first_row,
                first_column,
                alpha.data_ptr(),
                beta,
                lower,
                squares,
            ),
        )

    def mirror(self, factor) -> None:
        heads, width, _ = factor.shape
        matrices = _Matrices(
            factor.data_ptr(), DTYPES[factor.dtype], heads, width, *factor.stride()
        )
        self._launch("mirror", matrices)


def load(*, sanitize: bool = False) -> tuple[Emulated | None, str]:
    """The emulated ops and "", or None and why there are none.

    With `sanitize` the process needs libasan preloaded, which `g++ -print-file-name=libasan.so`
    finds, and ASAN_OPTIONS=detect_leaks=0.
    """
    reason = missing()
    if reason:
        return None, reason
    sources = [*sorted(SOURCES.glob("*.cu")), HERE / "bindings.cpp"]
    name = "fisherkern_sanitized" if sanitize else "fisherkern"
    return Emulated(build(sources, name, sanitize=sanitize)), ""
