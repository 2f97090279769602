"""What curvature needs to know of a layer: its rows, its parameters, and whether it is covered.

A layer sees tokens: rows x̃ of inputs and g of output gradients, [B, S, d] with B samples of S
positions, so that the gradient of its weight, as a matrix [d_out, d_in (+ 1)], is Σ g x̃ᵀ.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fisherkern.curvature._average import MovingAverage
from fisherkern.curvature.ema import EMACovariance
from fisherkern.ops.covariance import convolution_covariance_update_, embedding_counts


class Layer(ABC):
    """One module of a model."""

    parameters: dict[str, nn.Parameter]
    """Those that are covered: "weight" and "bias", as far as they are trained."""
    d_in: int
    """Columns of the matrix of the parameters, one for a bias not counted."""
    d_out: int
    by_token = False
    """Whether tokens are taken one by one, so that it does not matter which sample they are of."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.heads_first: bool | None = None
        """Of calls on [B, heads, S] or [B, S, heads], once one of them told."""
        self.parameters = {
            role: p
            for role, p in module.named_parameters(recurse=False)
            if role in ("weight", "bias") and p.requires_grad
        }

    @property
    def trained(self) -> bool:
        """Whether a parameter requires grad now."""
        return any(p.requires_grad for p in self.parameters.values())

    @property
    def bias(self) -> bool:
        """Whether rows have the homogeneous coordinate of a bias."""
        return "bias" in self.parameters

    @abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """Inputs [B, S, d_in]."""

    @abstractmethod
    def gradient_rows(self, g: Tensor) -> Tensor:
        """Output gradients [B, S, d_out]."""

    def token_mask(self, mask: Tensor | None, lead: torch.Size) -> Tensor | None:
        """The mask of the batch over the rows [B, S] of an output of leading shape `lead`.

        Raises:
            ValueError: the shapes do not match, or match in two ways that differ.
        """
        if mask is None:
            return None
        if shared_by_samples(lead, mask.shape):  # they count where they do for any sample
            shared = mask.any(0) if lead.numel() == mask[0].numel() else mask.any().expand(lead)
            return shared.reshape(samples(lead))
        over = over_tokens(mask, lead, self._has_heads_first(mask, lead))
        if over is None and len(mask) == 1 and bool(mask.all()):
            over = mask.new_ones(lead)  # of the one sample no token is left out, whatever they are
        if over is None:
            raise ValueError(
                f"mask has shape {list(mask.shape)}, but {self.name} was called on tokens of shape "
                f"{list(lead)}: they do not match. Leave the layer out with `layers`"
            )
        return over.reshape(samples(lead))

    def _has_heads_first(self, mask: Tensor, lead: torch.Size) -> bool:
        """Whether tokens are [B, heads, S], not [B, S, heads]: where both fit, as they were."""
        if mask.ndim != 2 or len(lead) != 3 or lead[0] != len(mask):
            return False
        first, last = (size == mask.shape[1] for size in lead[1:])
        if not (first or last):
            return False
        if not (first and last):
            self.heads_first = last
        elif self.heads_first is None and not bool(mask.all()):
            raise ValueError(
                f"mask has shape {list(mask.shape)}, but {self.name} was called on tokens of shape "
                f"{list(lead)}, of which it may be over the first two dimensions or over the first "
                f"and the last. Pad to another length, or leave the layer out with `layers`"
            )
        return bool(self.heads_first)

    def used(self, x: Callable[[], Tensor], mask: Tensor | None) -> Tensor | None:
        """Of the tokens that count, [B, S], those that reach the parameters."""
        return mask

    def by_sample(self, x: Tensor, batch: torch.Size) -> Tensor:
        """An input or output with the samples of a batch [B, *positions] first, [B, ..., d].

        Where the model flattened its tokens they are folded again. Tokens of which it cannot be
        told which sample they are of, such as windows of images, are put together as if they were
        of one: [1, N, d]. Layers that take them :attr:`by_token` have them as they are.
        """
        lead = self.lead(x)
        return x.reshape((*by_sample(lead, batch, self.by_token), *x.shape[len(lead) :]))

    def lead(self, x: Tensor) -> torch.Size:
        """The leading shape of an input or output: that of its tokens."""
        return x.shape[:-1]

    def matrix(self, values: Mapping[str, Tensor]) -> Tensor:
        """Gradients of the parameters as one matrix [d_out, d_in (+ 1)], where a copy is needed."""
        parts = []
        if "weight" in values:
            parts.append(values["weight"].reshape(self.d_out, self.d_in))
        if "bias" in values:
            parts.append(values["bias"].reshape(self.d_out, 1))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """The matrix taken apart again, in the shapes of the parameters."""
        values = {}
        if "weight" in self.parameters:
            weight = matrix[:, : self.d_in]
            values["weight"] = weight.reshape(self.parameters["weight"].shape)
        if "bias" in self.parameters:
            values["bias"] = matrix[:, -1].reshape(self.parameters["bias"].shape)
        return values

    def input_average(self, **options: Any) -> MovingAverage:
        """An empty average for A."""
        return EMACovariance(self.d_in, bias=self.bias, **options)

    def add_inputs(self, average: MovingAverage, x: Tensor, mask: Tensor | None) -> None:
        """Add Σ x̃ x̃ᵀ over the rows of a call, and their number."""
        assert isinstance(average, EMACovariance)
        average.update(self.rows(x), mask=mask, new_step=False)


class LinearLayer(Layer):
    """nn.Linear, and Conv1D of transformers, whose weight is transposed."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.transposed = not isinstance(module, nn.Linear)
        shape = self.parameters["weight"].shape
        self.d_out, self.d_in = shape[::-1] if self.transposed else shape

    def rows(self, x: Tensor) -> Tensor:
        """[B, S, d_in]; one position each for inputs [B, d_in]."""
        return x.reshape(*samples(x.shape[:-1]), x.shape[-1])

    def gradient_rows(self, g: Tensor) -> Tensor:
        """[B, S, d_out]."""
        return self.rows(g)

    def matrix(self, values: Mapping[str, Tensor]) -> Tensor:
        """As for every layer, of a transposed weight."""
        if self.transposed and "weight" in values:
            values = {**values, "weight": values["weight"].mT}
        return super().matrix(values)

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """As for every layer, of a transposed weight."""
        if not self.transposed or "weight" not in self.parameters:
            return super().split(matrix)
        values = super().split(matrix) if self.bias else {}
        values["weight"] = matrix[:, : self.d_in].mT.contiguous()
        return values


class ConvolutionLayer(Layer):
    """Conv1d and Conv2d: every position of the output is a token, its patch of the input a row."""

    def __init__(self, name: str, module: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(name, module)
        self.d_out = module.out_channels
        self.d_in = module.in_channels * math.prod(module.kernel_size)
        self.padding = _padding(module)
        self.options: dict[str, Any] = {
            "kernel_size": module.kernel_size,
            "stride": module.stride,
            "dilation": module.dilation,
        }

    def lead(self, x: Tensor) -> torch.Size:
        """[B, ..., *positions] of an output [B, ..., C, *positions]."""
        channels = x.ndim - 1 - len(self.padding)
        return torch.Size((*x.shape[:channels], *x.shape[channels + 1 :]))

    def by_sample(self, x: Tensor, batch: torch.Size) -> Tensor:
        """[B, ..., C, *spatial], B = 1 of what came without."""
        if x.ndim == 1 + len(self.padding):
            return x.unsqueeze(0)
        return x.reshape(*by_sample(x.shape[:1], batch, self.by_token), *x.shape[1:])

    def rows(self, x: Tensor) -> Tensor:
        """[B, S, C Π kernel_size]."""
        padding, images = self.padding, self._images(x)
        if len(padding) == 1:  # unfold knows images only
            images = images.unsqueeze(2)
            sizes = {name: (1, *value) for name, value in self.options.items()}
            patches = functional.unfold(images, **sizes, padding=(0, *padding)).mT
        else:
            patches = functional.unfold(images, **self.options, padding=padding).mT
        return self._of_samples(patches, x)

    def _images(self, x: Tensor) -> Tensor:
        """[N, C, *spatial] of [B, ..., C, *spatial]."""
        return x.flatten(0, x.ndim - 2 - len(self.padding))

    def _of_samples(self, rows: Tensor, x: Tensor) -> Tensor:
        """Rows [N, S, d] of images as those of samples [B, ..., d]."""
        each = math.prod(x.shape[1 : -1 - len(self.padding)])
        return rows.reshape(len(x), each * rows.shape[1], rows.shape[2])

    def gradient_rows(self, g: Tensor) -> Tensor:
        """[B, S, C]."""
        return self._of_samples(self._images(g).flatten(2).mT, g)

    def add_inputs(self, average: MovingAverage, x: Tensor, mask: Tensor | None) -> None:
        """As for every layer, without the unfolded input where the mask is one of images."""
        inputs = self._images(x)
        positions = math.prod(self._positions(x))
        images = None
        if mask is not None:
            over = mask.reshape(len(inputs), positions)
            if not bool((over == over[:, :1]).all()):
                super().add_inputs(average, x, mask)
                return
            images = over[:, 0]
        count = len(inputs) * positions if images is None else images.sum().double() * positions

        def write(total: Tensor, decay: float | None, scale: float) -> None:
            convolution_covariance_update_(
                total,
                inputs,
                **self.options,
                padding=self.padding,
                bias=self.bias,
                mask=images,
                ema_decay=decay,
                scale=scale,
                reduction="sum",
                mirror=False,
            )

        average.add(write, lambda: count)

    def _positions(self, x: Tensor) -> list[int]:
        sizes = zip(
            x.shape[-len(self.padding) :], *self.options.values(), self.padding, strict=True
        )
        return [(n + 2 * pad - d * (k - 1) - 1) // s + 1 for n, k, s, d, pad in sizes]


class EmbeddingLayer(Layer):
    """nn.Embedding: the rows are one-hot, so A is diagonal, the share of tokens of each index.

    The matrix is that of the weight transposed, [d, V].
    """

    def __init__(self, name: str, module: nn.Embedding) -> None:
        super().__init__(name, module)
        self.d_in, self.d_out = module.weight.shape
        self.padding_index = module.padding_idx

    def lead(self, x: Tensor) -> torch.Size:
        """Indices have no last dimension to leave out, outputs have."""
        return x.shape[:-1] if x.is_floating_point() else x.shape

    def used(self, x: Callable[[], Tensor], mask: Tensor | None) -> Tensor | None:
        """All but those of the padding index, whose row of the weight gets no gradient."""
        if self.padding_index is None:
            return mask
        kept = self.rows(x()) != self.padding_index
        return kept if mask is None else mask & kept

    def rows(self, x: Tensor) -> Tensor:
        """The indices [B, S]."""
        return x.reshape(samples(x.shape)).long()

    def gradient_rows(self, g: Tensor) -> Tensor:
        """[B, S, d]."""
        return g.reshape(*samples(g.shape[:-1]), g.shape[-1])

    def matrix(self, values: Mapping[str, Tensor]) -> Tensor:
        """[d, V]."""
        return values["weight"].mT

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """The weight [V, d]."""
        return {"weight": matrix.mT.contiguous()}

    def input_average(self, **options: Any) -> MovingAverage:
        """The diagonal of A, [V]."""
        return DiagonalAverage((self.d_in,), **options)

    def add_inputs(self, average: MovingAverage, x: Tensor, mask: Tensor | None) -> None:
        """Count each index."""
        indices = self.rows(x)

        def write(total: Tensor, decay: float | None, scale: float) -> None:
            counts = embedding_counts(indices, self.d_in, mask=mask, reduction="sum")
            if decay is not None:
                total.mul_(decay)
                scale *= 1.0 - decay
            total.add_(counts, alpha=scale)

        average.add(write, lambda: indices.numel() if mask is None else mask.sum().double())


class ScaledEmbeddingLayer(EmbeddingLayer):
    """The word embeddings of transformers that return `embed_scale` times a row of the weight."""

    @property
    def scale(self) -> float | Tensor:
        """A number, or a scalar in the dtype of the weight."""
        scale: Any = self.module.embed_scale
        return scale.to(self.parameters["weight"].dtype) if isinstance(scale, Tensor) else scale

    def gradient_rows(self, g: Tensor) -> Tensor:
        """[B, S, d] of the rows of the weight."""
        return super().gradient_rows(g) * self.scale


class NormLayer(Layer):
    """LayerNorm and RMSNorm: few parameters, of which the gradient per token is explicit.

    It is one vector [g ⊙ x̂, g] per token, x̂ the normalised input. A [2 d, 2 d] block of them (or
    [d, d]) is small enough to be kept in full.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, module)
        self.d_out = sum(p.numel() for p in self.parameters.values())
        self.d_in = 1
        parameter = next(iter(self.parameters.values()))
        self.shape = tuple(parameter.shape)
        # None: torch's own, that of the type it computes in, float32 of narrower ones
        self.eps: Any = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        self.centred = isinstance(module, nn.LayerNorm)

    def lead(self, x: Tensor) -> torch.Size:
        """All but the dimensions that are normalised."""
        return x.shape[: x.ndim - len(self.shape)]

    def rows(self, x: Tensor) -> Tensor:
        """x̂ [B, S, d], in float32 at least."""
        lead = self.lead(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if self.centred:
            normalised = functional.layer_norm(wide, self.shape, eps=self.eps)
        else:
            normalised = functional.rms_norm(wide, self.shape, eps=self.eps)
        return normalised.reshape(*samples(lead), math.prod(self.shape))

    def gradient_rows(self, g: Tensor) -> Tensor:
        """[B, S, d]."""
        return g.reshape(*samples(self.lead(g)), math.prod(self.shape))

    def scores(self, x: Tensor, g: Tensor) -> Tensor:
        """The gradient of the parameters per token, [B, S, P]."""
        gradients = self.gradient_rows(g)
        parts = []
        if "weight" in self.parameters:
            parts.append(gradients * self.rows(x))
        if "bias" in self.parameters:
            parts.append(gradients.to(parts[0].dtype) if parts else gradients)
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def matrix(self, values: Mapping[str, Tensor]) -> Tensor:
        """[P, 1]."""
        return torch.cat([values[role].reshape(-1, 1) for role in self.parameters])

    def split(self, matrix: Tensor) -> dict[str, Tensor]:
        """The parameters of [P, 1]."""
        sizes = [p.numel() for p in self.parameters.values()]
        parts = matrix.flatten().split(sizes)
        named = zip(self.parameters.items(), parts, strict=True)
        return {role: part.reshape(p.shape) for (role, p), part in named}


class DiagonalAverage(MovingAverage):
    """An average of a tensor that is added to as it is."""

    def __repr__(self) -> str:
        """Configuration, without values."""
        return (
            f"DiagonalAverage({list(self._sum.shape)}, ema_decay={self.ema_decay}, "
            f"dtype={self._sum.dtype}, device='{self._sum.device}')"
        )

    def _like(self) -> DiagonalAverage:
        return DiagonalAverage(
            self._sum.shape,
            ema_decay=self.ema_decay,
            dtype=self._sum.dtype,
            device=self._sum.device,
        )


def samples(lead: torch.Size) -> tuple[int, int]:
    """B and S of tokens of this leading shape: the first dimension and all others."""
    if not lead:
        return 1, 1
    return lead[0], lead[1:].numel()


def by_sample(lead: torch.Size, batch: torch.Size, by_token: bool) -> tuple[int, ...]:
    """The leading shape of tokens `lead` with the samples of a batch [B, *positions] first."""
    if not batch or lead[:1] == batch[:1] or not lead.numel() or _flat(lead, batch):
        return lead
    if len(batch) > 1:  # the model flattened its tokens
        for flat in ((batch.numel(),), (1, batch.numel())):
            if lead[: len(flat)] == flat:
                return (*batch, *lead[len(flat) :])
    if batch[0] == 1:
        return (1, *lead)
    return lead if by_token else (1, lead.numel())


def over_tokens(mask: Tensor, lead: torch.Size, heads_first: bool = False) -> Tensor | None:
    """The mask of a batch, [B] or [B, *positions], over tokens of another leading shape.

    After pooling there is one token per sample, which counts where any of its tokens does. None:
    the shapes do not match.
    """
    if heads_first:  # [B, heads, S]
        return mask.unsqueeze(1).expand(lead)
    if mask.shape == lead[: mask.ndim]:
        return mask.reshape(*mask.shape, *(1,) * (len(lead) - mask.ndim)).expand(lead)
    if lead[:1] == mask.shape[:1]:
        if lead.numel() == len(mask):
            return mask.flatten(1).any(1).reshape(lead)
        if lead.numel() == mask.numel():  # images as sequences
            return mask.reshape(lead)
    return None


def shared_by_samples(lead: torch.Size, batch: torch.Size) -> bool:
    """Whether tokens `lead` are those of all samples of a batch [B, *positions] at once.

    They do not begin with B and are not so many that each sample could have its own, or are
    [1, ...] or [*positions]. So are those that :func:`by_sample` put together.
    """
    if not batch or batch[0] < 2 or lead[:1] == batch[:1] or not lead.numel():
        return False
    if _flat(lead, batch):
        return False
    return lead == batch[1:] or lead[:1].numel() == 1 or lead.numel() % batch[0] != 0


def _flat(lead: torch.Size, batch: torch.Size) -> bool:
    """Whether a batch [N] is that of flattened logits, and tokens [B, S, ...] with N = B S."""
    return len(batch) == 1 and any(lead[:k].numel() == batch[0] for k in range(2, len(lead) + 1))


def _padding(module: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    """Zeros on either side; "same" is that of odd effective kernels."""
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    sizes = zip(module.kernel_size, module.dilation, strict=True)
    return tuple(d * (k - 1) // 2 for k, d in sizes)
