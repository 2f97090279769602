"""Row operands [..., V] as [B, S, V] views: what every kernel takes, without a copy where possible.

Two strides for the tokens are enough for the views language models make, such as the shifted
``logits[:, :-1]``, batch-expanded or time-major tensors.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def _unit_stride(x: Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def _view(x: Tensor, lead: int, cut: int) -> Tensor | None:
    """`x` with its first `lead` dimensions merged into two at `cut`, or None if that must copy."""
    shape = x.shape
    try:
        return x.view(shape[:cut].numel(), shape[cut:lead].numel(), *shape[lead:])
    except RuntimeError:
        return None


def _cut(tensors: Sequence[Tensor], lead: int) -> int:
    """The split of the leading dimensions that spares the most copies, the first such."""
    needs = [sum(_view(x, lead, cut) is None for x in tensors) for cut in range(lead + 1)]
    return needs.index(min(needs))


def token_rows(lead: int, *operands: Tensor) -> list[Tensor]:
    """Each operand [<lead dims>, ..., V] as [B, S, ..., V] with one split for all and unit stride.

    An operand is copied only if its last dimension is strided or its leading ones do not merge into
    two. A destination that had to be copied is recognised by its address: see :func:`write_back`.
    """
    ready = [x if _unit_stride(x) else x.contiguous() for x in operands]
    cut = _cut(ready, lead)
    views = (_view(x, lead, cut) for x in ready)
    return [
        x.reshape(x.shape[:cut].numel(), x.shape[cut:lead].numel(), *x.shape[lead:])
        if view is None
        else view
        for view, x in zip(views, ready, strict=True)
    ]


def flat(value: Tensor | None) -> Tensor | None:
    """A per-token tensor as the contiguous [T] that kernels take."""
    # a column of a mask stays strided; so do the statistics of a call, columns of one tensor
    return None if value is None else value.reshape(-1).contiguous()


def write_back(out: Tensor, rows: Tensor) -> None:
    """Finish a kernel that wrote `rows`: copy them to `out` where they are no view of it."""
    if rows.data_ptr() != out.data_ptr():
        out.copy_(rows.view(out.shape))
