"""The mean Fisher of softmax outputs, D̄ − U Uᵀ, from logits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from fisherkern.operators._mean import MeanFisher
from fisherkern.operators._tokens import LogitsOperator


class SoftmaxFisher(MeanFisher, LogitsOperator):
    """The Fisher of the logits, averaged over tokens: F̄ = (1 / N) Σ w_t (diag p_t − p_t p_tᵀ) / τ².

    An operator on [V] that is never formed: a diagonal D̄ / τ² less U Uᵀ of one column per token,
    with U made from the logits, some classes at a time, whenever it is needed. Logits are kept, not
    copied: they must not be written to while the operator is in use.

    Args:
        logits: z [..., V]; float32, bfloat16, float16 or float64 (float64: CPU and reference).
        mask: bool [...]; tokens that are False contribute exactly zero.
        weights: float [...] >= 0, instead of a mask.
        temperature: τ > 0; p = softmax(z / τ).
        logsumexp: logsumexp(z / τ) [...], if at hand.
        reduction: "mean" divides by N = Σ w (zero where N = 0), "sum" does not.
        workspace: bytes for parts of U; None: 64 MiB on the CPU, 512 MiB on a GPU.
        precision: of products with U, see :func:`fisherkern.covariance_update_`.
        memory: bytes that a solve may take beside inputs, result and workspace; None: 2 GiB on the
            CPU, 8 GiB on a GPU. The Woodbury identity takes 20 T²; where that is more, conjugate
            gradients solve, as :attr:`path` says.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value.

    Source: the Woodbury identity for a diagonal less a low-rank matrix; :doc:`operators` has the
    form of it that stays accurate for peaked rows and low damping.

    >>> import torch, fisherkern
    >>> F = fisherkern.SoftmaxFisher(torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 9.0]]))
    >>> F @ torch.ones(3)
    tensor([0., 0., 0.])
    >>> x = F.solve(torch.tensor([1.0, 0.0, 0.0]), damping=0.1)
    >>> torch.allclose(F @ x + 0.1 * x, torch.tensor([1.0, 0.0, 0.0]), atol=1e-6)
    True
    """

    def __init__(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        temperature: float = 1.0,
        logsumexp: Tensor | None = None,
        reduction: str = "mean",
        workspace: int | None = None,
        precision: str = "tf32x3",
        memory: int | None = None,
    ) -> None:
        super().__init__(logits, temperature, reduction, workspace, precision, memory)
        self.update(logits, mask=mask, weights=weights, logsumexp=logsumexp)

    def update(
        self,
        logits: Tensor,
        *,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        logsumexp: Tensor | None = None,
    ) -> None:
        """Add the tokens of another batch; see the constructor for the arguments.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape, dtype, device or value; the
                operator is as it was.
        """
        z, w, lse = self._checked(logits, mask, weights, logsumexp)
        batch, sums = self._batch(z, w, lse, None)
        self._join([batch], self._count_of(z, w), sums)

    def _logits(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        yield from ((batch.rows, batch.weights) for batch in self._batches)

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], *, workspace: int | None = None, memory: int | None = None
    ) -> SoftmaxFisher:
        """An operator of a state that `state_dict` gave, in the memory that this machine allows.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or does not fit.
        """
        configuration = ("temperature", "reduction", "precision")
        missing = {"logits", "weights", *configuration} - set(state)
        if missing:
            raise KeyError(f"state lacks {', '.join(sorted(missing))}")
        (z, *logits), (w, *weights) = state["logits"], state["weights"]
        how = {name: state[name] for name in configuration}
        made = cls(z, weights=w, workspace=workspace, memory=memory, **how)
        for z, w in zip(logits, weights, strict=True):
            made.update(z, weights=w)
        return made
