"""The mean Fisher of softmax outputs, D̄ − U Uᵀ, from hidden states and the weight of a head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from fisherkern import checks
from fisherkern.operators._mean import MeanFisher
from fisherkern.operators._tokens import Batch
from fisherkern.ops.head_fisher._common import Arguments, Head, check_head
from fisherkern.ops.head_fisher.classes import powers

_CONFIGURATION = ("weight", "bias", "softcap", "temperature", "reduction", "precision")


class HeadFisher(MeanFisher):
    """The :class:`fisherkern.SoftmaxFisher` of z = W h + b, whose logits are never stored.

    The same operator on [V], with the same products, solves and determinants. Logits are made some
    classes at a time, whenever U is needed, at the price of a product with W per pass: a Woodbury
    solve takes three, against 4 T V bytes of memory. Hidden states and W are kept, not copied.

    Args:
        hidden: h [..., d]; float32, bfloat16, float16 or float64 (float64: CPU and reference).
        weight: W [V, d] of the head, as of ``nn.Linear``, in the dtype of `hidden`.
        bias: b [V], the same dtype.
        softcap: c of z = c tanh((W h + b) / c), as Gemma has it; None: z = W h + b.
        mask: bool [...]; tokens that are False contribute exactly zero.
        weights: float [...] >= 0, instead of a mask.
        temperature: τ > 0; p = softmax(z / τ).
        reduction: "mean" divides by N = Σ w (zero where N = 0), "sum" does not.
        workspace: bytes for logits and parts of U; None: 64 MiB on the CPU, 512 MiB on a GPU.
        precision: of products with U, see :func:`fisherkern.covariance_update_`.
        memory: bytes that a solve may take, see :class:`fisherkern.SoftmaxFisher`.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: as :class:`fisherkern.SoftmaxFisher`.

    >>> import torch, fisherkern
    >>> h, W = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    >>> F, G = fisherkern.HeadFisher(h, W), fisherkern.SoftmaxFisher(h @ W.T)
    >>> y = torch.tensor([1.0, 2.0])
    >>> torch.allclose(F.solve(y, damping=0.1), G.solve(y, damping=0.1))
    True
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        softcap: float | None = None,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        temperature: float = 1.0,
        reduction: str = "mean",
        workspace: int | None = None,
        precision: str = "tf32x3",
        memory: int | None = None,
    ) -> None:
        given = check_head(hidden, weight, bias, softcap, temperature, mask, weights, workspace)
        self._weight, self._bias, self._softcap = given.weight, given.bias, given.softcap
        # logits of a tile, and what is made of it
        self._head_workspace, limit = given.workspace, given.workspace // 2
        V = given.weight.shape[0]
        super().__init__(given.hidden, V, temperature, reduction, limit, precision, memory)
        self._take(given)

    def update(
        self, hidden: Tensor, *, mask: Tensor | None = None, weights: Tensor | None = None
    ) -> None:
        """Add the tokens of another batch; see the constructor for the arguments.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value; the
                operator is as it was.
        """
        h, W = checks.activations("hidden", hidden, 1), self._weight
        checks.same_device_and_dtype("hidden", h, W, "the operator")
        if h.shape[-1] != W.shape[1]:
            raise ValueError(f"hidden has shape {list(h.shape)}; expected [..., {W.shape[1]}]")
        head = (W, self._bias, self._softcap, self._temperature)
        self._take(check_head(hidden, *head, mask, weights, self._head_workspace))

    def _take(self, given: Arguments) -> None:
        w = given.weights
        sums, reference, unit = powers(self._head(given.hidden, w), self._temperature)
        roots = torch.ones_like(unit) if w is None else w.sqrt().flatten()
        batch = Batch(given.hidden, w, None, reference, unit, roots)
        self._join([batch], self._count_of(given.hidden, w), sums)

    def _head(self, hidden: Tensor, weights: Tensor | None = None) -> Head:
        return Head(hidden, self._weight, self._bias, weights, self._softcap, self._head_workspace)

    def _all_hidden(self) -> Tensor:
        return torch.cat([batch.rows.reshape(-1, batch.rows.shape[-1]) for batch in self._batches])

    def _tiles(self) -> Iterator[tuple[int, int, list[Tensor]]]:
        head = self._head(self._all_hidden())
        for classes, z in head.tiles(head.budget // 2):
            yield classes.start, classes.stop, [z]

    def _token_blocks(self, count: int) -> Iterator[Tensor]:
        hidden = self._all_hidden()
        for part in hidden.split(count):
            yield from (z for z, _ in self._chunks(part, None))

    def _logits(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        for batch in self._batches:
            yield from self._chunks(batch.rows, batch.weights)

    def _chunks(
        self, hidden: Tensor, weights: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        chunks = self._head(hidden, weights).chunks(slopes=False)
        yield from ((part.z, part.weights) for part in chunks)

    def _logits_of(self, tokens: Tensor) -> Tensor:
        h = self._all_hidden()[tokens]
        out = torch.empty(len(tokens), self.shape[0], dtype=self.dtype, device=self.device)
        first = 0
        for z, _ in self._chunks(h, None):
            out[first : first + len(z)] = z
            first += len(z)
        return out

    def _is_like(self, shard: Self) -> bool:
        def same(a: Tensor | None, b: Tensor | None) -> bool:
            return a is b or (a is not None and b is not None and torch.equal(a, b))

        return (
            super()._is_like(shard)
            and self._softcap == shard._softcap
            and same(self._weight, shard._weight)
            and same(self._bias, shard._bias)
        )

    def state_dict(self) -> dict[str, Any]:
        """Hidden states and weights of all batches, the head and the configuration."""
        return {
            "hidden": [batch.rows for batch in self._batches],
            "weights": [batch.weights for batch in self._batches],
            **{name: getattr(self, f"_{name}") for name in _CONFIGURATION},
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], *, workspace: int | None = None, memory: int | None = None
    ) -> HeadFisher:
        """An operator of a state that `state_dict` gave, in the memory that this machine allows.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or does not fit.
        """
        missing = {"hidden", "weights", *_CONFIGURATION} - set(state)
        if missing:
            raise KeyError(f"state lacks {', '.join(sorted(missing))}")
        (h, *hidden), (w, *weights) = state["hidden"], state["weights"]
        how = {name: state[name] for name in _CONFIGURATION}
        made = cls(h, weights=w, workspace=workspace, memory=memory, **how)
        for h, w in zip(hidden, weights, strict=True):
            made.update(h, weights=w)
        return made
