"""Capture: the curvature of a model's layers, from the passes forward and backward of training."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fisherkern import checks
from fisherkern.curvature import fisher_types
from fisherkern.curvature._ledger import Ledger
from fisherkern.curvature._receiver import Batch, Receiver
from fisherkern.curvature._tap import Tap, differentiate, furthest
from fisherkern.curvature.coverage import NO_PART, Chosen, cover
from fisherkern.curvature.head import WideCurvature
from fisherkern.curvature.kinds import STRUCTURES, Kinds
from fisherkern.curvature.layers import over_tokens
from fisherkern.curvature.recognition import FROZEN
from fisherkern.curvature.structures import KFAC_APPROXIMATIONS, LayerCurvature

# What captures must agree in to be averages of the same thing.
_OPTIONS = ("structure", "fisher_type", "kfac_approx")


class Capture:
    """Averages of the curvature of every layer that has a rule, kept up while the model runs.

    Hooks are on the model from :meth:`attach` (or ``with``) to :meth:`detach`, and do nothing but
    in a :meth:`batch`. A layer is met as often as it is called; of a weight that an embedding and
    the head share, that of the head is taken.

    Args:
        model: any module. Covered are Linear, transformers' Conv1D, Conv1d, Conv2d, Embedding,
            LayerNorm and RMSNorm modules with trainable weights; :meth:`uncovered` says what is
            not, and why.
        structure: "kfac", "ekfac", "diagonal", "block" (a whole [P, P] block per layer, of at most
            8192 parameters), or "low-rank" (a diagonal and `rank` directions). Norms get their
            block under "kfac" and "ekfac", or their diagonal where that has more than 2048 rows.
            Embeddings stay Kronecker under "ekfac".
        fisher_type: "mc": labels drawn from the model; "type-2": all classes, in V backward passes
            from logits or d from hidden states; both in :meth:`add`. "empirical": the
            gradients of the loss that is differentiated in the batch.
        kfac_approx: "expand": every position is a data point; "reduce": inputs are averaged and
            gradients summed over the positions of a sample first.
        ema_decay: β of the averages per step, in [0, 1); None averages all steps alike.
        mc_samples: labels per token.
        rank: of "low-rank".
        loss_reduction: of the loss of "empirical": "mean" or "sum" over its terms.
        layers: names of modules, or what tells by name and module, that are to be covered; None:
            all.
        widest: output widths beyond which G is not kept as a matrix but as the rows of some tokens,
            see `stride`: the head of a language model.
        stride: tokens that count in a sample, of which such a layer keeps one.
        exact_positions: of "type-2" with several terms per sample: pull back one position at a
            time, S times the passes, and exact. Otherwise products of different positions, which
            the Fisher does not have, cancel by signs: unbiased.
        generator: of the labels.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, or nothing to cover.

    >>> import torch
    >>> from fisherkern.curvature import capture
    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    >>> with capture(model, fisher_type="type-2") as fisher:
    ...     with fisher.batch():
    ...         fisher.add(model(torch.randn(5, 3)))
    >>> {name: tuple(f.shape for f in layer.factors()) for name, layer in fisher.layers.items()}
    {'0': (torch.Size([4, 4]), torch.Size([4, 4])), '2': (torch.Size([2, 2]), torch.Size([5, 5]))}
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        structure: str = "kfac",
        fisher_type: str = "mc",
        kfac_approx: str = "expand",
        ema_decay: float | None = None,
        mc_samples: int = 1,
        rank: int = 16,
        loss_reduction: str = "mean",
        layers: Chosen = None,
        widest: int = 16384,
        stride: int = 8,
        exact_positions: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        self.structure = checks.choice("structure", structure, STRUCTURES)
        self.fisher_type = checks.choice("fisher_type", fisher_type, fisher_types.FISHER_TYPES)
        self.kfac_approx = checks.choice("kfac_approx", kfac_approx, KFAC_APPROXIMATIONS)
        self.loss_reduction = checks.choice("loss_reduction", loss_reduction, ("mean", "sum"))
        sizes = {"mc_samples": mc_samples, "rank": rank, "widest": widest, "stride": stride}
        for name, value in sizes.items():
            if checks.integer(name, value) < 1:
                raise ValueError(f"{name} is {value}; allowed are ints >= 1")
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise TypeError(
                f"generator must be a torch.Generator or None, not {type(generator).__name__}"
            )
        if not isinstance(exact_positions, bool):
            raise TypeError(
                f"exact_positions has type {type(exact_positions).__name__}; expected a bool"
            )
        self.ema_decay, self.mc_samples = ema_decay, mc_samples
        self._generator = generator
        self._exact = exact_positions
        self._samples = 0  # seen so far: signs of "type-2" depend on the number of a sample
        self._shard = (0, 1)
        kinds = Kinds(structure, kfac_approx, ema_decay, rank, widest, stride)
        self._covered = cover(model, layers, kinds.curvature)
        self.layers: dict[str, LayerCurvature] = self._covered.layers
        """The curvature of each covered module, by its name in the model."""
        self._model = model
        self._taps: list[Tap] = []
        self._batch = Batch()
        self._loss_scale = 1.0
        self._batch_terms = 0.0
        self._ledger = Ledger(self.layers, several=fisher_type == "type-2")
        summed = fisher_type == "mc"
        self._receivers = {
            name: Receiver(name, curvature, self._batch, self._ledger, summed)
            for name, curvature in self.layers.items()
        }

    # ---- what is covered ------------------------------------------------------------------------

    def uncovered(self) -> dict[str, str]:
        """Names of parameters that no layer covers, and why.

        Once a batch was captured that includes those of modules that were never called, such as the
        projections that ``nn.MultiheadAttention`` multiplies with by itself.
        """
        called = self.called
        missing: dict[int, str | None] = {
            id(p): self._receivers[name].missing if called else None
            for name, curvature in self.layers.items()
            for p in curvature.layer.parameters.values()
        }
        left = {}
        for name, p in self._model.named_parameters():
            reason = missing.get(id(p), self._covered.reasons.get(name, NO_PART))
            if reason is not None:
                left[name] = reason if p.requires_grad else FROZEN
        return left

    @property
    def called(self) -> bool:
        """Whether any layer has curvature, of however few samples."""
        return any(receiver.missing is None for receiver in self._receivers.values())

    # ---- hooks ----------------------------------------------------------------------------------

    def attach(self) -> Self:
        """Put the hooks on the model."""
        if not self._taps:
            for module, name in self._covered.modules.items():
                self._taps.append(Tap(module, self._receivers[name]))
        return self

    def detach(self) -> None:
        """Take the hooks off; averages stay."""
        for tap in self._taps:
            tap.remove()
        self._taps = []

    def __enter__(self) -> Self:
        """Attach."""
        return self.attach()

    def __exit__(self, *_: object) -> None:
        """Detach."""
        self.detach()

    @property
    def _active(self) -> bool:
        return self._batch.active

    # ---- batches --------------------------------------------------------------------------------

    @contextmanager
    def batch(
        self,
        *,
        mask: Tensor | None = None,
        terms: float | Tensor | None = None,
        loss_scale: float = 1.0,
        new_step: bool = True,
    ) -> Iterator[Self]:
        """Follow the forward and backward passes of one batch.

        Under activation checkpointing all its backward passes have to be made in it: they call
        modules again, and expect what they met the first time.

        Args:
            mask: bool, of the leading shape of the inputs: [B], or [B, S] of tokens. It reaches
                every layer, and the terms of :meth:`add` that has none of its own.
            terms: of "empirical": N, the number of terms of the loss; None: of the mask.
            loss_scale: of "empirical": what the loss was multiplied by beside its reduction, such
                as the scale of a GradScaler, or one over the number of accumulated batches.
            new_step: False for a further micro-batch of the step before.

        Raises:
            TypeError, ValueError: an argument of the wrong type or value, or a batch in a batch.
        """
        if self._active:
            raise ValueError("batch was entered inside another batch of the same capture")
        if not self._taps:
            raise ValueError("batch was entered without hooks: use `with`, or attach() first")
        if mask is not None and checks.tensor("mask", mask).dtype != torch.bool:
            raise TypeError(f"mask has dtype {mask.dtype}; allowed is bool (True = token counts)")
        counted = None
        if self.fisher_type == "empirical":
            counted = self._terms(mask, terms)
            self._loss_scale = checks.positive("loss_scale", loss_scale)
        if new_step:
            for curvature in self.layers.values():
                curvature.begin_step()
        self._batch.open(mask)
        self._ledger.open()
        if counted is not None:
            self.set_terms(counted)
        try:
            yield self
            if counted is not None:
                self._ledger.close(self._batch_terms)
        except BaseException:
            if counted is not None:
                self._ledger.abandon(self._batch_terms)
            raise
        finally:
            self._batch.active, self._batch.mask, self._batch.scale = False, None, None
            for tap in self._taps:
                tap.forget()

    def set_terms(self, terms: float | Tensor) -> None:
        """Correct the `terms` of the batch, before its backward pass.

        Raises:
            TypeError, ValueError: terms of the wrong type or value, or no batch of "empirical".
        """
        if not self._active or self.fisher_type != "empirical":
            raise ValueError('terms was given outside of a batch of fisher_type "empirical"')
        self._batch_terms = self._terms(None, terms)
        self._batch.scale = self._loss_scale**-2
        if self.loss_reduction == "mean":
            self._batch.scale *= self._batch_terms**2

    def set_loss_scale(self, loss_scale: float) -> None:
        """Correct the `loss_scale` of the batch, before its gradients come to the layers.

        Raises:
            TypeError, ValueError: a scale of the wrong type or value, or no batch of "empirical".
        """
        if not self._active or self.fisher_type != "empirical":
            raise ValueError('loss_scale was given outside of a batch of fisher_type "empirical"')
        self._loss_scale = checks.positive("loss_scale", loss_scale)
        self.set_terms(self._batch_terms)

    def _terms(self, mask: Tensor | None, terms: float | Tensor | None) -> float:
        if terms is None and mask is None:
            raise ValueError(
                'terms is None; "empirical" needs the number of terms of the loss, or a mask'
            )
        counted = mask.sum() if terms is None else terms  # type: ignore[union-attr]
        if isinstance(counted, Tensor):
            if counted.numel() != 1:
                raise ValueError(f"terms has shape {list(counted.shape)}; expected a scalar")
            counted = counted.item()
        return checks.number("terms", counted, 0.0, math.inf)

    def add(self, logits: Tensor, *, mask: Tensor | None = None) -> None:
        """Add the Fisher of a batch by backward passes from its logits; the graph stays.

        No gradient of a parameter is computed or touched. Activation checkpointing has to be of the
        kind that is not reentrant.

        Args:
            logits: [B, V], or [B, ..., V], as the model gave them in this batch.
            mask: bool [B, ...] of the terms of the loss; None: that of the batch, if any.

        Raises:
            TypeError, ValueError: an argument of the wrong type, shape or value, or no batch.
        """
        z, over = self._outputs("logits", logits, mask)
        values = z.detach()
        if self.fisher_type == "mc":
            passes = fisher_types.sampled(values, over, self.mc_samples, self._generator)
        else:
            passes = fisher_types.columns(values, over, self._positions(len(z)))
        for curvature in self.layers.values():
            if isinstance(curvature, WideCurvature):
                curvature.add_logits(z, over)
        self._pull(z, passes, over)

    def add_loss(self, loss: Tensor) -> None:
        """Add the gradients of a loss, of "empirical", without computing those of parameters.

        Args:
            loss: a scalar, of which :meth:`batch` was told the number of terms; the graph is freed.

        Raises:
            TypeError, ValueError: no scalar that requires grad, or no batch of "empirical".
        """
        if not self._active or self.fisher_type != "empirical":
            raise ValueError('loss was given outside of a batch of fisher_type "empirical"')
        if checks.tensor("loss", loss).numel() != 1 or not loss.requires_grad:
            raise ValueError(
                f"loss has shape {list(loss.shape)} and requires_grad {loss.requires_grad}; "
                "expected a scalar that requires grad"
            )
        differentiate(loss, self._ends(loss), None, self._batch)

    def add_hidden(
        self,
        hidden: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None = None,
        softcap: float | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """:meth:`add` for logits that are never made: those of a head over hidden states.

        "type-2" takes d backward passes instead of V, and T d² of memory. The head itself was not
        called and gets nothing.

        Args:
            hidden: h [B, ..., d], as the model gave it in this batch.
            weight: W [V, d] of the head, see :func:`fisherkern.head_fisher_sample`.
            bias: b [V].
            softcap: c of z = c tanh((W h + b) / c).
            mask: as in :meth:`add`.

        Raises:
            TypeError, ValueError: as :meth:`add`.
        """
        h, over = self._outputs("hidden", hidden, mask)
        head = (h.detach(), weight.detach(), None if bias is None else bias.detach(), softcap, over)
        if self.fisher_type == "mc":
            passes = fisher_types.sampled_of_hidden(*head, self.mc_samples, self._generator)
        else:
            passes = fisher_types.columns_of_hidden(*head, self._positions(len(h)))
        self._pull(h, passes, over)

    def _outputs(
        self, name: str, outputs: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.fisher_type == "empirical":
            raise ValueError(
                f'{name} was given, but fisher_type is "empirical": differentiate the loss instead'
            )
        if not self._active:
            raise ValueError(f"{name} was given outside of a batch")
        z = checks.logits(outputs, name)
        if not z.requires_grad:
            raise ValueError(f"{name} does not require grad: there is nothing to differentiate")
        checks.generator(self._generator, z)
        over, given = mask, self._batch.mask
        if over is None and given is not None:
            over = over_tokens(given, z.shape[:-1])
            if over is None:
                raise ValueError(
                    f"{name} has shape {list(z.shape)}, which the mask of the batch, "
                    f"{list(given.shape)}, does not fit: pass the `mask` of its terms"
                )
        checks.mask_or_weights(over, None, z, name)
        return outputs, over

    def _positions(self, samples: int) -> fisher_types.Positions:
        """Numbers for the samples of a batch, across ranks the batch of rank 0 first."""
        rank, ranks = self._shard
        first = self._samples * ranks + rank * samples
        return fisher_types.Positions(first, self._exact)

    def number_samples(self, first: int = 0, *, rank: int = 0, ranks: int = 1) -> None:
        """Say which samples come next, which the signs of "type-2" depend on.

        Captures of parts of a data set are the capture of the whole with the numbers of the whole.

        Args:
            first: the number of the next sample.
            rank: of several that see batches of one size at a time.
            ranks: how many there are.

        Raises:
            TypeError, ValueError: an argument of the wrong type or value.
        """
        if checks.integer("first", first) < 0:
            raise ValueError(f"first is {first}; allowed are ints >= 0")
        if not 0 <= checks.integer("rank", rank) < checks.integer("ranks", ranks):
            raise ValueError(f"rank is {rank}; allowed are 0 to {ranks - 1}, below ranks")
        self._samples, self._shard = first, (rank, ranks)

    def _pull(self, outputs: Tensor, passes: Iterator[Tensor], mask: Tensor | None) -> None:
        sampled = self.fisher_type == "mc"
        terms = float(outputs.shape[:-1].numel() if mask is None else mask.sum())
        given = torch.Size() if self._batch.mask is None else self._batch.mask.shape
        self._batch.shape = max(given, outputs.shape[:-1], key=len)
        self._batch.scale = 1.0
        self._ledger.begin()
        ends = self._ends(outputs)
        try:
            for gradient in passes:
                differentiate(outputs, ends, gradient, self._batch)
                if sampled:
                    self._ledger.close(terms)
            if not sampled:
                self._ledger.close(terms)
                self._samples += len(outputs)
        except BaseException:
            self._ledger.abandon(terms)
            raise
        finally:
            self._batch.scale = None

    def _ends(self, outputs: Tensor) -> list[GradientEdge]:
        """Where backward passes end that meet all layers and compute no gradient of a weight."""
        return furthest(outputs.grad_fn, (o for tap in self._taps for o in tap.outputs))

    # ---- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Every average by layer, as tensors and plain values, for torch.save; copies."""
        return {
            "options": {option: getattr(self, option) for option in _OPTIONS},
            "samples": self._samples,
            "missing": {name: receiver.missing for name, receiver in self._receivers.items()},
            "heads_first": {name: kept.layer.heads_first for name, kept in self.layers.items()},
            "layers": {name: curvature.state_dict() for name, curvature in self.layers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the averages of a capture of the same model and options.

        Raises:
            KeyError, TypeError, ValueError: an option is another one, or a layer is missing,
                unknown or does not fit; nothing was changed.
        """
        self.check_state(state)
        for name, curvature in self.layers.items():
            curvature.load_state_dict(state["layers"][name])
            self._receivers[name].missing = state["missing"][name]
            curvature.layer.heads_first = state.get("heads_first", {}).get(name)
        self._samples = state["samples"]

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` would, and change nothing."""
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be a mapping, not {type(state).__name__}")
        lacking = [key for key in ("layers", "samples", "options", "missing") if key not in state]
        if lacking:
            raise KeyError(f"state lacks {', '.join(lacking)}")
        self._check_options("state", state["options"])
        checks.integer("samples", state["samples"])
        for name in state["layers"]:
            if name not in self.layers:
                raise ValueError(f"state holds layer {name}, which this capture does not cover")
        for name, curvature in self.layers.items():
            curvature.check_state(state["layers"].get(name, {}))
            if name not in state["missing"]:
                raise KeyError(f"state lacks missing of layer {name}")

    def _check_options(self, name: str, options: Mapping[str, Any]) -> None:
        for option in _OPTIONS:
            mine, theirs = getattr(self, option), options.get(option)
            if mine != theirs:
                raise ValueError(f"{name} has {option} {theirs!r}; expected {mine!r}")

    def merge_(self, other: Capture) -> Self:
        """Add the tokens that another capture of the same model saw in the same steps.

        Raises:
            TypeError: `other` is no capture.
            ValueError: captures of different layers or options; nothing was changed.
        """
        if not isinstance(other, Capture):
            raise TypeError(f"other must be a Capture, not {type(other).__name__}")
        self._check_options("other", vars(other))
        for name in sorted(set(self.layers) ^ set(other.layers)):
            raise ValueError(f"other covers different layers: {name} is in one of the two only")
        for name, curvature in self.layers.items():
            curvature.check_merge(other.layers[name])
        for name, curvature in self.layers.items():
            curvature.merge_(other.layers[name])
            if other._receivers[name].missing is None:
                self._receivers[name].missing = None
        return self


def capture(model: nn.Module, **options: Any) -> Capture:
    """A :class:`Capture`, for use in a ``with`` statement; see there for the options."""
    return Capture(model, **options)
