"""The forms in which the curvature of a layer is kept: Kronecker factors, EKFAC, diagonal, block.

Each averages over loss terms: with N of them, F = (1 / N) Σ E[∇ ∇ᵀ] is the Fisher of the mean loss,
and what :meth:`LayerCurvature.operator` approximates.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from fisherkern.curvature._average import MovingAverage
from fisherkern.curvature.ema import EMACovariance
from fisherkern.curvature.layers import (
    ConvolutionLayer,
    DiagonalAverage,
    EmbeddingLayer,
    Layer,
    LinearLayer,
    NormLayer,
)
from fisherkern.operators import DiagonalPlusLowRank, Kronecker
from fisherkern.ops.covariance import squared_gradient_update_

KFAC_APPROXIMATIONS = ("expand", "reduce")


class LayerCurvature(ABC):
    """The averages of one layer.

    Args:
        layer: of the model.
        kfac_approx: "expand" or "reduce".
        options: `ema_decay`, `dtype` and `device` of the averages.
    """

    def __init__(self, layer: Layer, kfac_approx: str, options: dict[str, Any]) -> None:
        self.layer, self.kfac_approx = layer, kfac_approx
        self.dtype: torch.dtype = options["dtype"]
        self.device = torch.device(options["device"])

    @property
    def averages(self) -> dict[str, MovingAverage]:
        """Everything that is kept, by name."""
        return {name: v for name, v in vars(self).items() if isinstance(v, MovingAverage)}

    @property
    def _per_term(self) -> list[MovingAverage]:
        """The averages that are ones over loss terms."""
        return []

    def begin_step(self) -> None:
        """A new step: what is there decays with the next part."""
        for average in self.averages.values():
            average.begin_step()

    def add_inputs(self, x: Tensor, mask: Tensor | None) -> None:  # noqa: B027
        """Add the inputs of a call; of forms that average them apart from gradients."""

    @abstractmethod
    def add_gradients(
        self, x: Callable[[], Tensor], g: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        """Add `scale` times the squares of the gradients of a call."""

    def add_terms(self, count: Tensor | float) -> None:
        """Count the loss terms whose gradients were added."""
        for average in self._per_term:
            average.add_count(count)

    @abstractmethod
    def diagonal(self) -> dict[str, Tensor]:
        """The diagonal of the Fisher, in the shapes of the parameters."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """F x for x a matrix [d_out, D] of the parameters, and so is the result."""

    def extra_state(self) -> dict[str, Any]:
        """What is kept beside averages, as tensors and plain values; copies."""
        return {}

    def check_extra_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Raise KeyError or ValueError where :meth:`load_extra_state` cannot."""

    def load_extra_state(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take over what :meth:`extra_state` gave."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that is kept, as tensors and plain values; copies."""
        averages = {name: average.state_dict() for name, average in self.averages.items()}
        return {**averages, "extra": self.extra_state()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise KeyError or ValueError where :meth:`load_state_dict` cannot."""
        for key in (*self.averages, "extra"):
            if key not in state:
                raise KeyError(f"state lacks {key} of layer {self.layer.name}")
        for key, average in self.averages.items():
            average.check_state(state[key])
        self.check_extra_state(state["extra"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave."""
        for key, average in self.averages.items():
            average.load_state_dict(state[key])
        self.load_extra_state(state["extra"])

    def check_merge(self, other: LayerCurvature) -> None:
        """Raise ValueError where :meth:`merge_` cannot."""
        mine, theirs = self.averages, other.averages
        if set(mine) != set(theirs) or any(repr(mine[k]) != repr(theirs[k]) for k in mine):
            raise ValueError(f"other does not keep layer {self.layer.name} as this capture does")

    def merge_(self, other: Self) -> None:
        """Add the tokens that a curvature alike saw in the same steps."""
        theirs = other.averages
        for name, average in self.averages.items():
            average.merge_(theirs[name])


class KroneckerCurvature(LayerCurvature):
    """F ≈ G ⊗ A. G is summed over positions and averaged over loss terms, A over rows.

    Source: Martens and Grosse 2015; Grosse and Martens 2016 (convolutions); Eschenhagen et al.
    2023, "Kronecker-factored approximate curvature for modern neural network architectures"
    (expand, reduce).
    """

    A: MovingAverage
    G: EMACovariance

    def __init__(self, layer: Layer, kfac_approx: str, options: dict[str, Any]) -> None:
        super().__init__(layer, kfac_approx, options)
        # the mean of one-hot rows is not one-hot, and their factor would be dense in V
        self.reduce = kfac_approx == "reduce" and not isinstance(layer, EmbeddingLayer)
        layer.by_token = not self.reduce and isinstance(layer, (LinearLayer, ConvolutionLayer))
        self.A = layer.input_average(**options)
        self.G = EMACovariance(layer.d_out, **options)

    @property
    def _per_term(self) -> list[MovingAverage]:
        return [self.G]

    def add_inputs(self, x: Tensor, mask: Tensor | None) -> None:
        """A over the rows, or over the means of each sample."""
        if not self.reduce:
            self.layer.add_inputs(self.A, x, mask)
            return
        assert isinstance(self.A, EMACovariance)
        means, counts = position_sums(self.layer.rows(x), mask)
        means = means / counts.clamp_min(1).unsqueeze(-1)
        self.A.update(means, mask=counts > 0, new_step=False)

    def add_gradients(
        self, x: Callable[[], Tensor], g: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        """G over the rows, or over the sums of each sample."""
        rows = self.layer.gradient_rows(g)
        if self.reduce:
            rows, counts = position_sums(rows, mask)
            mask = counts > 0
        self.G.update(rows, mask=mask, scale=scale, count=0.0, new_step=False)

    def factors(self) -> tuple[Tensor, Tensor]:
        """G [d_out, d_out] and A [D, D], or the diagonal [V] of an embedding's A."""
        A = self.A.factor() if isinstance(self.A, EMACovariance) else self.A.mean()
        return self.G.factor(), A

    def operator(self) -> Kronecker:
        """G ⊗ A on matrices [d_out, D]."""
        G, A = self.factors()
        if A.ndim == 1:  # no matrix of the size of a vocabulary
            return Kronecker(G, DiagonalPlusLowRank(A, A.new_zeros(len(A), 0)))
        return Kronecker(G, A)

    def product(self, x: Tensor) -> Tensor:
        """G x A."""
        G, A = self.factors()
        half = G @ x
        return half * A if A.ndim == 1 else half @ A

    def diagonal(self) -> dict[str, Tensor]:
        """The outer product of the diagonals of G and A."""
        G, A = self.factors()
        inputs = A if A.ndim == 1 else A.diagonal()
        return self.layer.split(torch.outer(G.diagonal(), inputs))


class EigenCurvature(KroneckerCurvature):
    """F ≈ (Q_G ⊗ Q_A) diag Λ (Q_G ⊗ Q_A)ᵀ, Λ the second moments of gradients in that basis.

    Until :meth:`refresh` was called there is no basis, and only A and G are averaged. Afterwards Λ
    is averaged too, from zero after each refresh, for moments in an old basis mean nothing.

    Source: George et al. 2018, "Fast approximate natural gradient descent in a Kronecker-factored
    eigenbasis", equation 9.
    """

    def __init__(self, layer: Layer, kfac_approx: str, options: dict[str, Any]) -> None:
        super().__init__(layer, kfac_approx, options)
        layer.by_token = False  # Λ is of samples
        self.bases: tuple[Tensor, Tensor] | None = None
        width = layer.d_in + layer.bias
        self.moments = DiagonalAverage((layer.d_out, width), **options)

    def refresh(self) -> None:
        """Take the eigenbases of G and A as they are now, and start Λ anew."""
        G, A = self.factors()
        if A.ndim == 1:
            raise ValueError(f"{self.layer.name}: an embedding has no eigenbasis of inputs")
        self.rebase((torch.linalg.eigh(G)[1], torch.linalg.eigh(A)[1]))

    def rebase(self, bases: tuple[Tensor, Tensor], eigenvalues: Tensor | None = None) -> None:
        """Take these bases; start Λ from zero, or from eigenvalues with the weight of a step."""
        self.bases = bases
        self.moments = self.moments._like()
        if eigenvalues is not None:
            self.G.settle()
            # of the steps that G averages over, one: what comes is to tell soon
            beta = self.G.ema_decay
            weight = self.G._count if beta is None else self.G._count * (1 - beta)
            self.moments._count.copy_(weight)
            self.moments._sum.copy_(eigenvalues * weight)

    def add_gradients(
        self, x: Callable[[], Tensor], g: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        """G, and Λ where there is a basis."""
        super().add_gradients(x, g, mask, scale)
        if self.bases is None:
            return
        Q_G, Q_A = self.bases
        rows = self.layer.rows(x()).to(Q_A.dtype)
        inputs = rows @ Q_A[: self.layer.d_in]
        if self.layer.bias:
            inputs += Q_A[-1]
        gradients = self.layer.gradient_rows(g).to(Q_G.dtype) @ Q_G
        _add_squares(self.moments, inputs, gradients, mask, scale, bias=False)

    @property
    def _per_term(self) -> list[MovingAverage]:
        return [self.G] if self.bases is None else [self.G, self.moments]

    def extra_state(self) -> dict[str, Any]:
        """The bases."""
        return {"bases": self.bases and tuple(Q.clone() for Q in self.bases)}

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        """The bases have to be those of G and A."""
        if "bases" not in state:
            raise KeyError(f"state lacks bases of layer {self.layer.name}")
        shapes = [list(Q.shape) for Q in state["bases"] or ()]
        expected = [list(average._sum.shape) for average in (self.G, self.A)]
        if shapes and shapes != expected:
            raise ValueError(
                f"state has bases of shapes {shapes} of layer {self.layer.name}; expected "
                f"{expected}"
            )

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over the bases."""
        bases = state["bases"]
        like = self.G._sum
        self.bases = bases and tuple(Q.to(like.device, like.dtype, copy=True) for Q in bases)

    def check_merge(self, other: LayerCurvature) -> None:
        """Λ can be merged where the bases are the same."""
        super().check_merge(other)
        assert isinstance(other, EigenCurvature)
        mine, theirs = self.bases or (), other.bases or ()
        same = len(mine) == len(theirs) and all(map(torch.equal, mine, theirs))
        if not same:
            raise ValueError(f"other has another eigenbasis of layer {self.layer.name}")

    def eigenvalues(self) -> Tensor:
        """Λ [d_out, D]; that of K-FAC while no moments were averaged."""
        if self.bases is not None and self.moments.count > 0:
            return self.moments.mean()
        G, A = self.factors()
        return torch.outer(torch.linalg.eigvalsh(G), torch.linalg.eigvalsh(A))

    def product(self, x: Tensor) -> Tensor:
        """Q_G (Λ ⊙ (Q_Gᵀ x Q_A)) Q_Aᵀ."""
        if self.bases is None:
            return super().product(x)
        Q_G, Q_A = self.bases
        return Q_G @ (self.eigenvalues() * (Q_G.mT @ x @ Q_A)) @ Q_A.mT

    def diagonal(self) -> dict[str, Tensor]:
        """Of Λ in the basis of the parameters."""
        if self.bases is None:
            return super().diagonal()
        Q_G, Q_A = (Q.square() for Q in self.bases)
        return self.layer.split(Q_G @ self.eigenvalues() @ Q_A.mT)


class DiagonalCurvature(LayerCurvature):
    """diag F: the squares of the gradient of each sample, averaged over loss terms."""

    def __init__(self, layer: Layer, kfac_approx: str, options: dict[str, Any]) -> None:
        super().__init__(layer, kfac_approx, options)
        self.squares = DiagonalAverage((layer.d_out, layer.d_in + bias_columns(layer)), **options)

    @property
    def _per_term(self) -> list[MovingAverage]:
        return [self.squares]

    def add_gradients(
        self, x: Callable[[], Tensor], g: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        """The squares, positions of a sample summed first."""
        layer = self.layer
        if isinstance(layer, NormLayer):
            sums = sample_gradients(layer, x(), g, mask)
            add_term(self.squares, sums.square().sum(0).unsqueeze(1), scale)
        elif isinstance(layer, EmbeddingLayer):
            term = _embedding_squares(layer, layer.rows(x()), layer.gradient_rows(g), mask)
            add_term(self.squares, term, scale)
        else:
            rows, gradients = layer.rows(x()), layer.gradient_rows(g)
            _add_squares(self.squares, rows, gradients, mask, scale, layer.bias)

    def product(self, x: Tensor) -> Tensor:
        """Elementwise."""
        return self.squares.mean() * x

    def diagonal(self) -> dict[str, Tensor]:
        """In the shapes of the parameters."""
        return self.layer.split(self.squares.mean())


class BlockCurvature(LayerCurvature):
    """The whole block of a layer of few parameters, from the gradient of each sample.

    Of norms under `kfac_approx` "expand" from that of each token.
    """

    def __init__(self, layer: Layer, kfac_approx: str, options: dict[str, Any]) -> None:
        super().__init__(layer, kfac_approx, options)
        self.block = EMACovariance(block_size(layer), **options)

    @property
    def _per_term(self) -> list[MovingAverage]:
        return [self.block]

    def add_gradients(
        self, x: Callable[[], Tensor], g: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        """The outer products of the gradients."""
        layer = self.layer
        if isinstance(layer, NormLayer):
            gradients, kept = layer.scores(x(), g), mask
            if self.kfac_approx == "reduce":
                gradients, counts = position_sums(gradients, mask)
                kept = counts > 0
        else:
            gradients, kept = sample_gradients(layer, x(), g, mask), None
        self.block.update(gradients, mask=kept, scale=scale, count=0.0, new_step=False)

    def matrix(self) -> Tensor:
        """F [P, P], parameters in the order of the matrix of the layer, row by row."""
        return self.block.factor()

    def product(self, x: Tensor) -> Tensor:
        """The block times x, row by row."""
        return (self.matrix() @ x.reshape(-1)).reshape(x.shape)

    def diagonal(self) -> dict[str, Tensor]:
        """In the shapes of the parameters."""
        width = self.layer.d_in + bias_columns(self.layer)
        return self.layer.split(self.matrix().diagonal().reshape(self.layer.d_out, width))


def block_size(layer: Layer) -> int:
    """P, the number of parameters of a layer."""
    return layer.d_out * (layer.d_in + bias_columns(layer))


def bias_columns(layer: Layer) -> int:
    """Columns for a bias; a norm has its bias among its rows."""
    return 0 if isinstance(layer, NormLayer) else int(layer.bias)


def position_sums(rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Σ over the positions of each sample [B, d], and how many there were [B]; float32 at least."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if mask is None:
        counts = torch.full(rows.shape[:1], rows.shape[1], device=rows.device)
        return wide.sum(1), counts
    return torch.where(mask.unsqueeze(-1), wide, 0.0).sum(1), mask.sum(1)


def add_term(average: MovingAverage, term: Tensor, scale: float) -> None:
    """Add a term to an average of tensors, without counting any."""

    def write(total: Tensor, decay: float | None, factor: float) -> None:
        if decay is not None:
            total.mul_(decay)
            factor *= 1.0 - decay
        total.add_(term, alpha=factor)

    average.add(write, lambda: 0.0, scale)


def _add_squares(
    average: MovingAverage,
    x: Tensor,
    g: Tensor,
    mask: Tensor | None,
    scale: float,
    bias: bool,
) -> None:
    if x.dtype != g.dtype:  # under autocast
        x, g = (t.to(torch.promote_types(x.dtype, g.dtype)) for t in (x, g))

    def write(total: Tensor, decay: float | None, factor: float) -> None:
        squared_gradient_update_(
            total,
            x,
            g,
            ema_decay=decay,
            scale=factor,
            mask=mask,
            bias=bias,
            per_sample=True,
            reduction="sum",
        )

    average.add(write, lambda: 0.0, scale)


def _embedding_squares(
    layer: EmbeddingLayer, indices: Tensor, g: Tensor, mask: Tensor | None
) -> Tensor:
    """Σ_b (Σ_s g e_indexᵀ)² [d, V]: tokens of one index in a sample are summed first."""
    used = torch.ones_like(indices, dtype=torch.bool) if mask is None else mask
    sample = torch.arange(len(indices), device=indices.device).unsqueeze(1).expand_as(indices)
    keys, inverse = torch.unique(sample[used] * layer.d_in + indices[used], return_inverse=True)
    wide = g[used].to(torch.promote_types(g.dtype, torch.float32))
    sums = wide.new_zeros(len(keys), layer.d_out).index_add_(0, inverse, wide)
    term = wide.new_zeros(layer.d_in, layer.d_out)
    return term.index_add_(0, keys % layer.d_in, sums.square()).mT


def sample_gradients(layer: Layer, x: Tensor, g: Tensor, mask: Tensor | None) -> Tensor:
    """The gradient of each sample as a row [B, P]."""
    if isinstance(layer, NormLayer):
        return position_sums(layer.scores(x, g), mask)[0]
    gradients = layer.gradient_rows(g)
    if isinstance(layer, EmbeddingLayer):
        kind = torch.promote_types(g.dtype, torch.float32)
        rows = torch.nn.functional.one_hot(layer.rows(x), layer.d_in).to(kind)
    else:
        rows = layer.rows(x)
    kind = torch.promote_types(torch.promote_types(rows.dtype, g.dtype), torch.float32)
    rows, gradients = rows.to(kind), gradients.to(kind)
    if layer.bias:
        rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], -1)
    if mask is not None:
        rows, gradients = (torch.where(mask.unsqueeze(-1), t, 0.0) for t in (rows, gradients))
    return torch.einsum("bso,bsi->boi", gradients, rows).flatten(1)
