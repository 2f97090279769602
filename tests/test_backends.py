"""Which back end serves, what is refused and why, and what an import may touch."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import fisherkern as fk
from fisherkern import backends, info


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    import os

    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def test_first_that_can_serve() -> None:
    expected = "cpp" if backends.extension()[0] else "reference"
    assert backends.select("cpu", torch.float32) == expected
    assert fk.available("cpu")[-1] == "reference"


def test_context_nests_and_restores() -> None:
    with fk.backend("reference"):
        assert backends.requested() == "reference"
        with pytest.raises(KeyError), fk.backend("cpp"):
            raise KeyError
        assert backends.requested() == "reference"
    assert backends.requested() is None


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="backend is 'gpu'; allowed are 'triton', 'cuda', 'cpp'"):
        fk.backend("gpu").__enter__()


def test_requested_back_end_never_falls_back() -> None:
    with fk.backend("cuda"), pytest.raises(fk.BackendUnavailableError, match="cuda serves CUDA"):
        fk.softmax_fisher_trace(torch.zeros(2, 3))


def test_environment_variable() -> None:
    code = "import fisherkern.backends as b, torch; print(b.select('cpu', torch.float32))"
    assert python(code, FISHERKERN_BACKEND="reference").stdout.strip() == "reference"
    wrong = python(code, FISHERKERN_BACKEND="gpu")
    assert "FISHERKERN_BACKEND is 'gpu'; allowed are" in wrong.stderr


def test_gpu_order(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extension:
        @staticmethod
        def build_info() -> dict[str, list[str]]:
            return {"cuda_architectures": ["sm_90"]}

    monkeypatch.setattr(backends, "triton_kernels", lambda: (object(), ""))
    monkeypatch.setattr(backends, "extension", lambda: (Extension, ""))
    assert backends.available("cuda") == ["cuda", "triton", "reference"]
    assert backends.select("cuda", torch.float64) == "reference"
    monkeypatch.setattr(backends, "triton_kernels", lambda: (None, "triton is not installed"))
    assert backends.select("cuda", torch.bfloat16) == "cuda"


def test_reasons_tell_not_built_from_built_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol: aoti_torch_something")

    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    backends.extension.cache_clear()
    assert "is not built" in backends.extension()[1]
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backends.importlib, "import_module", broken)
    backends.extension.cache_clear()
    assert "built for another torch or Python: undefined symbol" in backends.extension()[1]
    monkeypatch.undo()
    backends.extension.cache_clear()


def test_report_names_every_back_end() -> None:
    report = info.describe()
    for name in backends.NAMES:
        assert f"  {name}: " in report


def test_import_is_light_and_leaves_cuda_alone() -> None:
    code = (
        "import sys, torch\n"
        "before = set(sys.modules)\n"
        "import fisherkern\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert not torch.cuda.is_initialized()\n"
        "assert not new & {'triton', 'transformers', 'matplotlib', 'numpy', 'scipy'}, new\n"
        "assert 'fisherkern._C' not in sys.modules\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_works_without_an_extension() -> None:
    code = (
        "import sys, importlib.util as u\n"
        "real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n in ('fisherkern._C', 'triton') else real(n, *a)\n"
        "import torch, fisherkern as fk\n"
        "assert fk.available() == ['reference']\n"
        "print(fk.softmax_fisher_trace(torch.zeros(1, 4)).item())\n"
    )
    assert python(code).stdout.strip() == "0.75"


def test_processor_capability_can_be_lowered() -> None:
    if backends.extension()[0] is None:
        pytest.skip("the C++ extension is not built here")
    code = (
        "import torch, fisherkern as fk, fisherkern.backends as b\n"
        "z = torch.linspace(-3, 3, 999).view(3, 333)\n"
        "t = fk.softmax_fisher_trace(z)\n"
        "print(b.extension()[0].cpu_capability(), f'{t.double().sum().item():.6f}')\n"
    )
    lines = [
        python(code, FISHERKERN_CPU_CAPABILITY=name).stdout.split()
        for name in ("baseline", "avx2", "avx512")
    ]
    assert lines[0][0] == "baseline"
    assert len({value for _, value in lines}) == 1
    wrong = python(code, FISHERKERN_CPU_CAPABILITY="sse9")
    assert "FISHERKERN_CPU_CAPABILITY is 'sse9'" in wrong.stderr


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512", "amx"])
def test_every_processor_capability_multiplies(name: str) -> None:
    """Those that this CPU has: a lower one is used where it lacks the one asked for."""
    if backends.extension()[0] is None:
        pytest.skip("the C++ extension is not built here")
    code = (
        "import torch, fisherkern as fk\n"
        "x = torch.randn(700, 131, generator=torch.Generator().manual_seed(0))\n"
        "for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        "    y = x.to(dtype)\n"
        "    truth = y.double().T @ y.double() / 700\n"
        "    print(((fk.covariance(y) - truth).norm() / truth.norm()).item())\n"
    )
    errors = [float(line) for line in python(code, FISHERKERN_CPU_CAPABILITY=name).stdout.split()]
    assert len(errors) == 3
    assert max(errors) < 1e-6


def test_ops_of_the_extension_are_those_of_the_convention() -> None:
    if backends.extension()[0] is None:
        pytest.skip("the C++ extension is not built here")
    import inspect

    from cuda_emulation.build import Emulated

    from fisherkern.ops import _reference_kernels

    functions = inspect.getmembers(_reference_kernels, inspect.isfunction)
    public = {name: f for name, f in functions if not name.startswith("_")}
    schemas = {
        schema.name.removeprefix("fisherkern_native::"): [a.name for a in schema.arguments]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fisherkern_native::")
    }
    # the parts of the covariance updates that CUDA puts together in Python
    for part in ("covariance_pack", "factor_update"):
        assert schemas.pop(part) == list(inspect.signature(getattr(Emulated, part)).parameters)[1:]
    assert schemas == {name: list(inspect.signature(f).parameters) for name, f in public.items()}


def test_products_prefer_triton_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extension:
        @staticmethod
        def build_info() -> dict[str, list[str]]:
            return {"cuda_architectures": ["sm_90"]}

    monkeypatch.setattr(backends, "triton_kernels", lambda: (object(), ""))
    monkeypatch.setattr(backends, "extension", lambda: (Extension, ""))

    def chosen(products: bool, device: str = "cuda") -> str:
        return backends.select(device, torch.bfloat16, products)

    assert (chosen(False), chosen(True)) == ("cuda", "triton")
    assert chosen(True, "cpu") == chosen(False, "cpu") == "cpp"
    with fk.backend("cuda"):
        assert chosen(True) == "cuda"
    monkeypatch.setattr(backends, "triton_kernels", lambda: (None, "not installed"))
    assert chosen(True) == "cuda"
    monkeypatch.setattr(backends, "extension", lambda: (None, "not built"))
    assert chosen(False) == "reference"


def test_products_say_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    select = backends.select
    monkeypatch.setattr(
        backends,
        "select",
        lambda device, dtype, products=False: (
            asked.append(products) or select(device, dtype, products)
        ),
    )
    x = torch.ones(2, 3)
    fk.covariance_update_(torch.zeros(3, 3), x, ema_decay=0.0, mirror=False)
    fk.cross_covariance(x, x)
    assert asked == [True, True]
    fk.softmax_fisher_trace(x)
    assert asked[2:] == [False]
