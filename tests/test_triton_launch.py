"""Every op of the Triton back end reaches its launches, on an A100 and an H100 that are not here.

The interpreter runs kernels without compiling them, and test_triton_aot.py compiles them without
launching. Between the two Triton binds arguments, picks a specialisation, and compares the globals
that a kernel reads with those that it was compiled with. Nothing runs, so no result is looked at.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("nothing is launched under TRITON_INTERPRET=1", allow_module_level=True)

import triton_compile
import triton_launch
from covariance import cases as factors

import fisherkern as fk
from conftest import DEVICE
from softmax_fisher import cases as rows

if DEVICE != "cpu":
    pytest.skip(f"launches on {DEVICE} are real ones", allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16)
Call = Callable[[torch.dtype], object]


def _row_op(op: rows.Op, backward: bool = False) -> Call:
    def call(dtype: torch.dtype) -> None:
        z = rows.logits((3, 40), dtype).requires_grad_(backward)
        results = rows.tensors(op.call(z, *op.make(z.detach(), rows.generator(0))))
        if backward:
            torch.autograd.backward(results, [torch.ones_like(x) for x in results])

    return call


def _factor_op(op: factors.Op, weighted: bool = False) -> Call:
    def call(dtype: torch.dtype) -> None:
        weights = {"weights": factors.some_weights(op, dtype)} if weighted else {}
        op.new(*op.make(dtype), **weights)

    return call


def _product(weighted: bool) -> Call:
    """With U, and all operands or as few as there can be."""

    def call(dtype: torch.dtype) -> None:
        factor = (rows.logits((3, 40), dtype), torch.zeros(3), torch.ones(3))
        y, c, scale = torch.ones(40, 5), torch.ones(3, 5), torch.ones(40)
        options = {}
        if weighted:
            labels = torch.zeros(3, dtype=torch.int64)
            options = {"scale": scale, "labels": labels, "at_label": torch.zeros(3)}
        fk.softmax_fisher_project(*factor, y, ones=weighted, gram=weighted, **options)
        expanded = {"y": y, "y_scale": scale} if weighted else {}
        fk.softmax_fisher_expand(*factor, c, **expanded, **options)
        fk.softmax_fisher_panel(*factor, scale=scale if weighted else None, transposed=weighted)

    return call


def _over_the_logits(dtype: torch.dtype) -> None:
    z = rows.logits((3, 40), dtype)
    fk.softmax_fisher_gradient_(z, torch.zeros(3, dtype=torch.int64))
    fk.softmax_fisher_sample_(rows.logits((3, 40), dtype))


def _shared_out(dtype: torch.dtype) -> None:
    """Sums that several programs share."""
    x = torch.zeros(1024, 48, dtype=dtype)
    fk.covariance(x)
    fk.cross_covariance(x, x)
    fk.softmax_fisher_mean_probs(rows.logits((200, 40), dtype))
    fk.softmax_fisher_trace(rows.logits((2, 9000), dtype))
    fk.softmax_fisher_stats(rows.logits((2, 9000), dtype))


CALLS: dict[str, Call] = {
    **{op.id: _row_op(op) for op in rows.OPS},
    **{f"{op.id}-backward": _row_op(op, backward=True) for op in rows.OPS},
    **{op.id: _factor_op(op) for op in factors.OPS},
    **{f"{op.id}-weighted": _factor_op(op, weighted=True) for op in factors.OPS},
    "product": _product(weighted=False),
    "product-weighted": _product(weighted=True),
    "powers": lambda dtype: fk.SoftmaxFisher(rows.logits((3, 40), dtype)),
    "sample": lambda dtype: fk.softmax_fisher_sample(rows.logits((3, 40), dtype)),
    "over-the-logits": _over_the_logits,
    "shared-out": _shared_out,
}


def called_twice(name: str, architecture: str, cache: Path) -> Counter[str]:
    """The launches of a call in every dtype; the second one finds what the first compiled."""
    with triton_launch.gpu(architecture, cache) as launches:
        for dtype in DTYPES:
            for _ in range(2):
                before = launches.total()
                CALLS[name](dtype)
                assert launches.total() > before, f"{name} in {dtype} launched nothing"
    return launches


@pytest.mark.parametrize("architecture", triton_compile.TARGETS)
def test_every_op_and_every_kernel_is_launched(architecture: str, tmp_path: Path) -> None:
    launches: Counter[str] = Counter()
    for name in CALLS:
        try:
            launches += called_twice(name, architecture, tmp_path)
        except Exception as error:
            error.add_note(f"in {name}")
            raise
    listed = {
        kernel.__name__
        for module in triton_compile.kernel_modules()
        for kernel, _, _ in getattr(module, "AOT", ())
    }
    assert set(launches) == listed
