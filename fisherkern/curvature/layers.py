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
    uses_input_once = True
    """Whether one node of the autograd graph takes the input, not several."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module
        self.parameters = {
            role: p
            for role, p in module.named_parameters(recurse=False)
            if role in ("weight", "bias") and p.requires_grad
        }

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
        """The mask of the batch over the rows [B, S] of an output of leading shape `lead`."""
        if mask is None:
            return None
        over = over_tokens(mask, lead)
        if over is None:
            raise ValueError(
                f"mask has shape {list(mask.shape)}, but {self.name} was called on tokens of shape "
                f"{list(lead)}: they do not match. Leave the layer out with `layers`"
            )
        return over.reshape(samples(lead))

    def used(self, x: Callable[[], Tensor], mask: Tensor | None) -> Tensor | None:
        """Of the tokens that count, [B, S], those that reach the parameters."""
        return mask

    def by_sample(self, x: Tensor, batch: torch.Size) -> Tensor:
        """An input or output whose tokens a model flattened, [B S], as those of a batch [B, S]."""
        lead = self.lead(x)
        if len(batch) < 2 or lead == batch[:1] or lead != (batch.numel(),):
            return x
        return x.reshape(*batch, *x.shape[1:])

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
        self.transposed = _is_conv1d(module)
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
        """[B, *positions] of an output [B, C, *positions]."""
        return torch.Size((x.shape[0], *x.shape[2:]))

    def by_sample(self, x: Tensor, batch: torch.Size) -> Tensor:
        """[B, C, *spatial], B = 1 of what came without."""
        return x.unsqueeze(0) if x.ndim == 1 + len(self.padding) else x

    def rows(self, x: Tensor) -> Tensor:
        """[B, S, C Π kernel_size]."""
        padding = self.padding
        if x.ndim == 3:  # unfold knows images only
            x = x.unsqueeze(2)
            sizes = {name: (1, *value) for name, value in self.options.items()}
            return functional.unfold(x, **sizes, padding=(0, *padding)).mT
        return functional.unfold(x, **self.options, padding=padding).mT

    def gradient_rows(self, g: Tensor) -> Tensor:
        """[B, S, C]."""
        return g.flatten(2).mT

    def add_inputs(self, average: MovingAverage, x: Tensor, mask: Tensor | None) -> None:
        """As for every layer, without the unfolded input where the mask is one of images."""
        if mask is not None and not bool((mask == mask[:, :1]).all()):
            super().add_inputs(average, x, mask)
            return
        images = None if mask is None else mask[:, 0]
        positions = math.prod(self._positions(x))
        count = len(x) * positions if images is None else images.sum().double() * positions

        def write(total: Tensor, decay: float | None, scale: float) -> None:
            convolution_covariance_update_(
                total,
                x,
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
        sizes = zip(x.shape[2:], *self.options.values(), self.padding, strict=True)
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
        eps: Any = getattr(module, "eps", getattr(module, "variance_epsilon", None))
        self.eps = torch.finfo(parameter.dtype).eps if eps is None else float(eps)
        self.centred = isinstance(module, nn.LayerNorm)
        self.uses_input_once = self.centred

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


def over_tokens(mask: Tensor, lead: torch.Size) -> Tensor | None:
    """The mask of a batch, [B] or [B, *positions], over tokens of another leading shape.

    After pooling there is one token per sample, which counts where any of its tokens does; so it is
    with what all samples share, such as embeddings of positions. None: the shapes do not match.
    """
    if mask.shape == lead[: mask.ndim]:
        return mask.reshape(*mask.shape, *(1,) * (len(lead) - mask.ndim)).expand(lead)
    if lead[:1] == mask.shape[:1]:
        if lead.numel() == len(mask):
            return mask.flatten(1).any(1).reshape(lead)
        if lead.numel() == mask.numel():  # images as sequences
            return mask.reshape(lead)
        if lead[2:] == mask.shape[1:]:  # [B, heads, S]
            return mask.unsqueeze(1).expand(lead)
    if shared_by_samples(lead, mask.shape):
        return (mask.any(0) if lead.numel() == mask[0].numel() else mask.any()).expand(lead)
    return None


def shared_by_samples(lead: torch.Size, batch: torch.Size) -> bool:
    """Whether tokens `lead` are those of all samples of a batch [B, *positions] at once."""
    if not batch or batch[0] < 2 or lead[:1] == batch[:1] or lead.numel() == batch.numel():
        return False
    return lead == batch[1:] or lead[:1].numel() == 1


def _is_conv1d(module: nn.Module) -> bool:
    # transformers need not be installed to tell its class by what it has
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _padding(module: nn.Conv1d | nn.Conv2d) -> tuple[int, ...]:
    """Zeros on either side; "same" is that of odd effective kernels."""
    if not isinstance(module.padding, str):
        return tuple(module.padding)
    if module.padding == "valid":
        return (0,) * len(module.kernel_size)
    sizes = zip(module.kernel_size, module.dilation, strict=True)
    return tuple(d * (k - 1) // 2 for k, d in sizes)


def _refused_convolution(module: nn.Conv1d | nn.Conv2d) -> str | None:
    if module.groups != 1:
        return f"a convolution of {module.groups} groups"
    if module.padding_mode != "zeros":
        return f"a convolution with padding_mode {module.padding_mode!r}"
    spans = [d * (k - 1) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
    if module.padding == "same" and any(span % 2 for span in spans):
        return "a convolution with padding 'same' that is not symmetric"
    return None


def _is_rms_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.RMSNorm):
        return True
    weight = getattr(module, "weight", None)
    return (
        type(module).__name__.endswith("RMSNorm")
        and isinstance(weight, nn.Parameter)
        and weight.ndim == 1
        and (hasattr(module, "eps") or hasattr(module, "variance_epsilon"))
    )


def layer_of(name: str, module: nn.Module) -> Layer | str | None:
    """The layer that a module is, why it is none, or None where it has no parameters of its own."""
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return None
    if not any(p.requires_grad for p in own.values()):
        return "frozen"
    is_norm = isinstance(module, nn.LayerNorm) or _is_rms_norm(module)
    is_linear = isinstance(module, nn.Linear) or _is_conv1d(module)
    if not (is_norm or is_linear or isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Embedding))):
        return f"no rule for modules of type {type(module).__name__}"
    if not is_norm and not ("weight" in own and own["weight"].requires_grad):
        return "its weight is frozen or computed from other parameters"
    if is_linear:
        return LinearLayer(name, module)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return _refused_convolution(module) or ConvolutionLayer(name, module)
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None or module.scale_grad_by_freq:
            return "an embedding with max_norm or scale_grad_by_freq"
        return EmbeddingLayer(name, module)
    if "weight" not in own:
        return "a norm without weight"
    return NormLayer(name, module)
