"""Cases of the covariance factors: the public op, what others write in its place, and the floor.

Layout: rows x [T, d] and g [T, d] in the dtype of the case, a mask [T] that leaves out a tenth of
them, and a factor [D, D] float32, D = d (d + 1 with a bias), that is updated in place. Per sample
the tokens are [B, 128, d]. The formulas are those of kfac-pytorch, kronfluence and curvlinops with
the moving average behind them: each masks, casts and divides where its package does.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fisherkern
from fisherkern import reference
from fisherkern.bench import accuracy
from fisherkern.bench.registry import Allowance, Bar, Case, Family, Op, Tensors, register

DECAY = 0.95
_NEW = 1 - DECAY
SAMPLE = 128

# ---- inputs -----------------------------------------------------------------------------------


def _masked(tokens: int) -> int:
    return tokens // 10


def _mask(case: Case, generator: torch.Generator) -> Tensor:
    tokens = case.shape[0]
    mask = torch.ones(tokens, dtype=torch.bool, device=case.device)
    order = torch.randperm(tokens, device=case.device, generator=generator)
    mask[order[: _masked(tokens)]] = False
    return mask


def _rows(case: Case, generator: torch.Generator, mask: Tensor) -> Tensor:
    x = torch.empty(case.shape, device=case.device).normal_(generator=generator)
    # padding that is counted by mistake shows
    x[~mask] *= 100
    return x.to(case.dtype)


def _symmetric(case: Case, generator: torch.Generator, bias: bool) -> Tensor:
    # as large as the new term of the average: an error in either shows
    tokens, width = case.shape[0], case.shape[1] + bias
    a = torch.empty(width, width, device=case.device).normal_(generator=generator)
    a = (a + a.T).mul_(_NEW / math.sqrt(2 * tokens))
    a.diagonal().add_(_NEW)
    return a


def _activations(bias: bool) -> Callable[[Case, torch.Generator], Tensors]:
    def inputs(case: Case, generator: torch.Generator) -> Tensors:
        mask = _mask(case, generator)
        return _symmetric(case, generator, bias), _rows(case, generator, mask), mask

    return inputs


def _with_gradients(case: Case, generator: torch.Generator) -> Tensors:
    mask = _mask(case, generator)
    x, g = (_rows(case, generator, mask) for _ in range(2))
    width = case.shape[1]
    d = torch.empty(width, width, device=case.device).uniform_(generator=generator)
    return d.mul_(_NEW), x, g, mask


def _samples(case: Case, generator: torch.Generator) -> Tensors:
    tokens, width = case.shape
    length = min(tokens, SAMPLE)
    if tokens % length:
        raise ValueError(f"T is {tokens}; {case.op.name} needs a multiple of {SAMPLE}")
    d, x, g, mask = _with_gradients(case, generator)
    x, g = (t.view(-1, length, width) for t in (x, g))
    return d.mul_(length), x, g, mask.view(-1, length)


# ---- fused ------------------------------------------------------------------------------------


def _update(bias: bool) -> Callable[..., Tensor]:
    def call(factor: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return fisherkern.covariance_update_(
            factor, x, ema_decay=DECAY, mask=mask, bias=bias, mirror=True
        )

    return call


def _squares(per_sample: bool) -> Callable[..., Tensor]:
    def call(factor: Tensor, x: Tensor, g: Tensor, mask: Tensor) -> Tensor:
        return fisherkern.squared_gradient_update_(
            factor, x, g, ema_decay=DECAY, mask=mask, per_sample=per_sample
        )

    return call


# ---- PyTorch ----------------------------------------------------------------------------------


def kfac_pytorch(factor: Tensor, x: Tensor, mask: Tensor, bias: bool = False) -> Tensor:
    """Copy the rows that count, append ones, multiply, symmetrise, average: a new factor."""
    a = x[mask]
    if bias:
        a = torch.cat([a, a.new_ones(a.shape[0], 1)], -1)
    cov = a.t() @ (a / a.shape[0])
    cov = (cov + cov.t()) / 2
    return DECAY * factor + _NEW * cov


def kronfluence(factor: Tensor, x: Tensor, mask: Tensor, bias: bool = False) -> Tensor:
    """Copy in the dtype of the factor, multiply by the mask, accumulate; then the average."""
    rows = x.to(factor.dtype, copy=True).mul_(mask[:, None])
    if bias:
        rows = torch.cat([rows, mask[:, None].to(rows.dtype)], -1)
    total = torch.zeros_like(factor).addmm_(rows.t(), rows)
    return factor.mul_(DECAY).add_(total.mul_(_NEW / mask.sum()))


def curvlinops(factor: Tensor, x: Tensor, mask: Tensor, bias: bool = False) -> Tensor:
    """Copy the rows that count, einsum; then the average."""
    rows = x[mask]
    if bias:
        rows = torch.cat([rows, rows.new_ones(rows.shape[0], 1)], -1)
    cov = torch.einsum("ti,tj->ij", rows, rows).div_(rows.shape[0])
    return factor.mul_(DECAY).add_(cov, alpha=_NEW)


def cublas(factor: Tensor, x: Tensor, mask: Tensor, bias: bool = False) -> Tensor:
    """A masked copy, a whole product into float32; then the average. Nothing waits for the GPU."""
    rows = x * mask[:, None]
    if bias:
        rows = torch.cat([rows, mask[:, None].to(rows.dtype)], -1)
    if x.dtype == torch.float32:
        cov = torch.mm(rows.t(), rows)
    else:
        cov = torch.mm(rows.t(), rows, out_dtype=torch.float32)
    return factor.mul_(DECAY).addcmul_(cov, _NEW / mask.sum())


def _with_bias(formula: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(factor: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return formula(factor, x, mask, bias=True)

    return call


def plain_squared_gradient(factor: Tensor, x: Tensor, g: Tensor, mask: Tensor) -> Tensor:
    """Square what counts, one product; then the average."""
    x, g = x[mask], g[mask]
    new = g.square().t() @ x.square()
    # add_(new, alpha=...) right behind a product loses its alpha when compiled (pytorch#167313)
    return factor.mul_(DECAY).add_(new.mul_(_NEW / x.shape[0]))


def plain_squared_gradient_per_sample(factor: Tensor, x: Tensor, g: Tensor, mask: Tensor) -> Tensor:
    """The gradient of every sample [B, d, d], squared; then the average."""
    gradients = torch.einsum("bso,bsi->boi", g * mask[..., None], x)
    return factor.mul_(DECAY).add_(gradients.square_().mean(0), alpha=_NEW)


# ---- errors -----------------------------------------------------------------------------------


def _exact_update(bias: bool) -> Callable[..., Tensor]:
    def truth(factor: Tensor, x: Tensor, mask: Tensor) -> Tensor:
        return reference.covariance_update(
            factor.double(), x.double(), ema_decay=DECAY, mask=mask, bias=bias
        )

    return truth


def _exact_squares(per_sample: bool) -> Callable[..., Tensor]:
    def truth(factor: Tensor, x: Tensor, g: Tensor, mask: Tensor) -> Tensor:
        new = reference.squared_gradient(x.double(), g.double(), mask=mask, per_sample=per_sample)
        return DECAY * factor.double() + _NEW * new

    return truth


# ---- ops --------------------------------------------------------------------------------------


def _floor(operands: int, bias: bool = False) -> Callable[[Case], int]:
    """Bytes: [T, d] operands in the dtype of the case, the mask, the factor in and out."""

    def floor(case: Case) -> int:
        tokens, width = case.shape
        rows = operands * tokens * width * case.dtype.itemsize
        return rows + tokens + 2 * 4 * (width + bias) ** 2

    return floor


def _flops(symmetric: bool, bias: bool = False) -> Callable[[Case], float]:
    """Multiplications and additions of the tokens that count."""

    def flops(case: Case) -> float:
        tokens, width = case.shape[0] - _masked(case.shape[0]), case.shape[1] + bias
        return float(tokens * width * (width + 1 if symmetric else 2 * width))

    return flops


def _average(name: str, bias: bool) -> Op:
    def formula(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return _with_bias(call) if bias else call

    return Op(
        name,
        _activations(bias),
        formula(kfac_pytorch),
        accuracy.matrix(_exact_update(bias)),
        _floor(1, bias),
        _flops(True, bias),
        fused=_update(bias),
        in_place=True,
        plain_name="kfac-pytorch",
        formulas={"kronfluence": formula(kronfluence), "curvlinops": formula(curvlinops)},
        peers={"cublas": lambda: formula(cublas)},
        plain_synchronizes=True,
        ceiling="gemm",
    )


def _squared(name: str, inputs: Any, plain: Any, per_sample: bool, **rest: Any) -> Op:
    return Op(
        name,
        inputs,
        plain,
        accuracy.matrix(_exact_squares(per_sample)),
        _floor(2),
        _flops(False),
        fused=_squares(per_sample),
        in_place=True,
        ceiling="gemm",
        **rest,
    )


OPS = (
    _average("update", bias=False),
    _average("update_bias", bias=True),
    _squared(
        "squared_gradient", _with_gradients, plain_squared_gradient, False, plain_synchronizes=True
    ),
    _squared(
        "squared_gradient_per_sample",
        _samples,
        plain_squared_gradient_per_sample,
        True,
        # the peers store B matrices of d × d
        shapes={"cpu": ((2048, 512), (4096, 1024)), "cuda": ((8192, 1024), (8192, 2048))},
    ),
)

FAMILY = register(
    Family(
        name="covariance",
        dimensions=("T", "d"),
        ops=OPS,
        headline=("update",),
        shapes={
            "cpu": ((4096, 1024), (2048, 3072), (4096, 4096)),
            "cuda": ((8192, 1024), (8192, 4096), (16384, 4096), (8192, 8192)),
        },
        smoke=(256, 33),
        bars=(
            Bar("kfac-pytorch", "least", 1.5, ops=("update",), dtypes=("float32",)),
            Bar("kfac-pytorch", "geometric mean", 1.7, ops=("update",), dtypes=("float32",)),
            Bar("kfac-pytorch", "least", 10.0, ops=("update",), dtypes=("bfloat16",)),
            Bar(
                "cublas",
                "least",
                1.3,
                ops=("update",),
                dtypes=("bfloat16",),
                device="cuda",
                from_size=("d", 4096),
            ),
            Bar("cublas", "least", 0.98, ops=("update",), device="cuda"),
        ),
        memory=Allowance("64 MiB", lambda shape, threads: 64 << 20),
        warm_up=lambda shape: (256, 256),
        sweeps=((512, 1024), (4096, 1024), (16384, 1024), (4096, 256), (4096, 2048)),
        # in float64, as the truth: slower than everybody else together
        reference=False,
        automatic=True,
        budget=30.0,
        patience=8.0,
    )
)
