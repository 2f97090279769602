"""Every Triton kernel compiles for sm_80 and sm_90 in every configuration, without spills.

It also loads aligned rows 16 bytes at a time, and products of matrices are those of the tensor
cores, fed through shared memory.
"""

from __future__ import annotations

import os

import pytest

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels cannot be compiled under TRITON_INTERPRET=1", allow_module_level=True)

import triton_compile
from triton import JITFunction

CASES = list(triton_compile.cases())


def _groups() -> dict[str, list[triton_compile.Case]]:
    """Cases by kernel and architecture: few enough tests for a table each, enough to share out."""
    groups: dict[str, list[triton_compile.Case]] = {}
    for case in CASES:
        groups.setdefault(f"{case.kernel.__name__}-{case.target}", []).append(case)
    return groups


GROUPS = _groups()


@pytest.mark.parametrize("group", GROUPS)
def test_kernel_fits_its_architecture(group: str) -> None:
    reports = [(case, triton_compile.compiled(case)) for case in GROUPS[group]]
    table = "\n".join(f"{case}: {report}" for case, report in reports)
    print(table)
    for case, report in reports:
        assert report.spills == 0, table
        assert report.shared <= triton_compile.SHARED_LIMIT[case.target], table
        rows = "z_ptr" in case.kernel.arg_names
        wide = report.wide or report.asynchronous
        assert wide or not (rows and case.operands.aligned), table
        if "ARITHMETIC" in case.constants:
            _check_matrix_product(case, report, table)


def _check_matrix_product(
    case: triton_compile.Case, report: triton_compile.Report, table: str
) -> None:
    """The instructions are those that the configuration was chosen for."""
    arithmetic = case.constants["ARITHMETIC"]
    kinds = {"bf16": "bf16", "fp16": "f16"}
    if arithmetic == "ieee":
        assert not report.matrix, table
    elif arithmetic == "half":
        instruction = "wgmma" if case.target == "sm_90" else "mma"
        assert report.matrix == (f"{instruction}.{kinds[case.operands.dtype]}",), table
        if case.operands.aligned:
            # a masked row is a predicated copy; both operands wait in shared memory
            buffers = 2 * (case.stages - 1) * case.constants["BLOCK"] * case.constants["TOKENS"]
            assert report.asynchronous, table
            assert report.shared >= 2 * buffers, table
    else:
        kind = "bf16" if arithmetic.startswith("bf16") else "tf32"
        assert report.matrix in ((f"wgmma.{kind}",), (f"mma.{kind}",)), table


@pytest.mark.parametrize("module", triton_compile.kernel_modules(), ids=lambda m: m.__name__)
def test_every_launched_kernel_is_compiled(module) -> None:
    """A kernel that a host function launches is in the list that the test above compiles."""
    listed = {kernel.__name__ for kernel, _, _ in getattr(module, "AOT", ())}
    assert triton_compile.launched_kernels(module) == listed


def test_every_kernel_is_launched() -> None:
    """By convention a function that is launched is named `*_kernel`; none is left over."""
    functions = {
        name
        for module in triton_compile.kernel_modules()
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert functions == {case.kernel.__name__ for case in CASES}
