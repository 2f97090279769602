"""KFACPreconditioner: gradients made natural in place, before any optimizer takes its step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fisherkern import checks
from fisherkern.curvature import Capture, EigenCurvature, LayerCurvature
from fisherkern.curvature._finite import all_finite
from fisherkern.curvature._models import Arguments, inside
from fisherkern.curvature._receiver import WITHOUT_GRADIENTS
from fisherkern.curvature.recognition import FROZEN
from fisherkern.optim._follow import Follower
from fisherkern.optim._inverse import INVERSES
from fisherkern.optim._layers import (
    DAMPING_MODES,
    Damping,
    Eigenbases,
    Solver,
    check_saved,
    restored,
    saved,
    solver,
)
from fisherkern.optim._ranks import Ranks

_NOTHING = (
    "nothing was captured. What is followed are calls of the model itself, not of its parts, in "
    "training mode and with gradients enabled; code that was compiled before has no hooks"
)


class KFACPreconditioner:
    """Replaces p.grad by (F + λ)⁻¹ p.grad, with F captured while the model trains.

    Every forward pass in training mode is followed by hooks, which find the padding mask, the
    labels and the logits as transformers' models have them; for others say where they are. With
    "mc" and "type-2" the logits are differentiated once more on their way to the loss; with
    "empirical" the backward pass of the loss serves both. Then, before the optimizer's step:

        preconditioner.step()

    Args:
        model: to train; the module inside a DistributedDataParallel.
        damping: λ > 0, in the units of the Fisher of the mean loss.
        damping_mode: "pi": √λ / π for G and π √λ for A, which share it out by their traces;
            "per-factor": λ for each; "exact": λ for their product, by eigendecompositions, of which
            a wide layer has none: it is damped as by "pi". "ekfac" is always damped exactly.
        ema_decay: β of the averages, the weight of the old value.
        factor_update_period: steps per capture; before the first of them is over there is one at
            every power of two as well, for averages of few steps change fast.
        inverse_update_period: steps per refresh of the inverses, which begins likewise.
        inverse: "cholesky", "eigh", or "inverse-free" (Newton–Schulz from the last inverse).
        kl_clip: κ: the update is scaled down to lr² Σ ⟨natural gradient, gradient⟩ <= κ; None:
            never.
        fisher_type: see :class:`fisherkern.curvature.Capture`; as also `kfac_approx`, `structure`,
            `mc_samples`, `layers`, `widest`, `stride` and `generator`.
        mask_of: (args, kwargs) of the model to the bool mask of its tokens; None: the
            ``attention_mask``.
        logits_of: what the model returned to its logits; None: ``logits``, or the tensor itself.
        terms_of: (kwargs, logits) to the bool mask of the terms of the loss; None: where
            ``labels`` are not −100, shifted by one for a causal model.
        loss_scale: of "empirical": gives what the loss is multiplied by, such as
            ``scaler.get_scale``. Of a loss that the model itself returns, as transformers' do, it
            is known, whatever this says.
        group: process group of data parallelism; None: the default one, if there is one.
        options: of :class:`fisherkern.curvature.Capture`.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, parameters sharded over ranks
            (FSDP), or nothing to cover.

    Source: Martens and Grosse 2015, sections 5 and 6; Ba, Grosse and Martens 2017 (kl_clip).

    >>> import torch
    >>> from fisherkern.optim import KFACPreconditioner
    >>> model = torch.nn.Linear(3, 2)
    >>> preconditioner = KFACPreconditioner(model, damping=1e-2)
    >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
    >>> torch.nn.functional.cross_entropy(model(x), y).backward()
    >>> before = model.weight.grad.clone()
    >>> replaced = preconditioner.step()
    >>> torch.equal(before, model.weight.grad)
    False
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        damping: float = 1e-3,
        damping_mode: str = "pi",
        ema_decay: float | None = 0.95,
        factor_update_period: int = 1,
        inverse_update_period: int = 10,
        inverse: str = "cholesky",
        kl_clip: float | None = 1e-3,
        fisher_type: str = "mc",
        mask_of: Callable[[tuple[Any, ...], Arguments], Tensor | None] | None = None,
        logits_of: Callable[[Any], Tensor] | None = None,
        terms_of: Callable[[Arguments, Tensor], Tensor | None] | None = None,
        loss_scale: Callable[[], float] = lambda: 1.0,
        group: Any = None,
        **options: Any,
    ) -> None:
        self.damping = checks.damping(damping)
        self.damping_mode = checks.choice("damping_mode", damping_mode, DAMPING_MODES)
        self.inverse = checks.choice("inverse", inverse, INVERSES)
        self.kl_clip = None if kl_clip is None else checks.positive("kl_clip", kl_clip)
        periods = {
            "factor_update_period": factor_update_period,
            "inverse_update_period": inverse_update_period,
        }
        for name, period in periods.items():
            if checks.integer(name, period) < 1:
                raise ValueError(f"{name} is {period}; allowed are ints >= 1")
        given = {"mask_of": mask_of, "logits_of": logits_of, "terms_of": terms_of}
        for name, function in given.items():
            if not (function is None or callable(function)):
                raise TypeError(f"{name} must be a function or None, not {type(function).__name__}")
        if not callable(loss_scale):
            raise TypeError(
                "loss_scale must be a function that gives a number, not "
                f"{type(loss_scale).__name__}"
            )
        self.factor_update_period = factor_update_period
        self.inverse_update_period = inverse_update_period
        self._ranks = Ranks(group)
        self.model = inner = unwrapped(model)
        self.capture = Capture(inner, fisher_type=fisher_type, ema_decay=ema_decay, **options)
        self.steps = 0
        self._solvers: dict[str, Solver] = {}
        self._warned: set[str] = set()
        self._told = False  # what was not captured
        self._inverse_damping = self.damping  # of the last refresh
        self.capture.attach()
        readers = (mask_of, logits_of, terms_of)
        self._follower = Follower(self.capture, inner, self._ranks, *readers, loss_scale)

    def detach(self) -> None:
        """Take the hooks off the model."""
        self._follower.remove()
        self.capture.detach()

    # ---- steps ----------------------------------------------------------------------------------

    def step(
        self,
        lr: float | Callable[[nn.Parameter], float] = 1.0,
        params: Iterable[nn.Parameter] | None = None,
    ) -> set[int]:
        """Replace the gradients of the covered layers, where they all are finite.

        A layer of whose curvature there is nothing yet keeps its gradient. One whose inverse cannot
        be made keeps the last one, with a warning that names it, said once; another one tells where
        no curvature was captured at all, or none of layers that were called without gradients.

        Args:
            lr: of each parameter, for `kl_clip`.
            params: that a step is to be taken along; None: all. A layer that they hold a part of
                keeps its gradient: the natural one is of steps of all its parameters together.

        Returns:
            The id() of every parameter whose gradient was replaced.
        """
        self._follower.end_step()
        if _due(self.steps, self.inverse_update_period) or not self._solvers:
            self.refresh()
        elif self._follower.due:
            self._reestimate()
        owned = None if params is None else {id(p) for p in params}
        with self._no_autocast():
            replaced = self._replace(lr if callable(lr) else lambda _: lr, owned)
        self.steps += 1
        self._follower.due = _due(self.steps, self.factor_update_period)
        self._tell()
        return replaced

    def _tell(self) -> None:
        """Say what users would not know of the first step."""
        if self._told or not self._follower.trains:
            return
        self._told, said = True, ""
        if not self.capture.called:
            said = f"no gradient was made natural: {_NOTHING}"
        else:
            reasons = self.capture.uncovered()
            left = [name for name, reason in reasons.items() if reason == WITHOUT_GRADIENTS]
            if left:
                said = f"{len(left)} gradients stay, of {left[0]} first: {WITHOUT_GRADIENTS}"
        if said:
            warnings.warn(f"{said} (said once)", RuntimeWarning, stacklevel=4)

    def refresh(self) -> None:
        """Make the inverses from the curvature as it is now."""
        with self._no_autocast():
            self._refresh()

    def _refresh(self) -> None:
        damping = Damping(self.damping, self.damping_mode, self.inverse)
        layers, owners = self.capture.layers, self._ranks.owners(self.capture.layers)
        self._inverse_damping = self.damping

        def make(name: str, joint: LayerCurvature) -> Solver | None:
            return solver(joint, damping, self._solvers.get(name))

        for name, made in self._ranks.solvers(layers, owners, make):
            if isinstance(made, Exception):
                self._warn(name, made, self._solvers.get(name))
            elif made is not None:
                self._solvers[name] = made
                curvature = layers[name]
                if isinstance(curvature, EigenCurvature) and isinstance(made, Eigenbases):
                    assert made.Q_A is not None
                    eigenvalues = made.denominators - self.damping
                    curvature.rebase((made.Q_G, made.Q_A), eigenvalues)

    def _reestimate(self) -> None:
        """Take the second moments that were averaged since into the bases of EKFAC."""
        for name, curvature in self.capture.layers.items():
            made = self._solvers.get(name)
            if isinstance(curvature, EigenCurvature) and isinstance(made, Eigenbases):
                moments = self._ranks.mean(curvature.moments)
                if all_finite([moments]):
                    made.denominators = moments + self._inverse_damping

    def _warn(self, name: str, error: Exception, before: Solver | None) -> None:
        if name in self._warned:
            return
        self._warned.add(name)
        kept = "its gradient stays as it is" if before is None else "its last inverse is kept"
        warnings.warn(f"{name}: {error}; {kept} (said once)", RuntimeWarning, stacklevel=4)

    @torch.no_grad()
    def _replace(self, lr: Callable[[nn.Parameter], float], owned: set[int] | None) -> set[int]:
        natural: list[tuple[nn.Parameter, Tensor]] = []
        sizes: list[Tensor] = []
        for name, made in self._solvers.items():
            curvature = self.capture.layers[name]
            if owned is not None and not _whole(curvature, owned):
                continue
            given = _gradients(curvature)
            if given is None:
                continue
            solved = curvature.layer.split(made.solve(curvature.layer.matrix(given)))
            if not all_finite(solved.values()):
                self._warn(name, ArithmeticError("its natural gradient is not finite"), None)
                continue
            for role, value in solved.items():
                p = curvature.layer.parameters[role]
                if p.grad is None:
                    continue
                natural.append((p, value))
                if self.kl_clip is not None:
                    sizes.append((value * given[role]).sum() * lr(p) ** 2)
        scale = self._scale(sizes)
        for p, value in natural:
            assert p.grad is not None
            torch.mul(value, scale, out=p.grad)
        return {id(p) for p, _ in natural}

    def _scale(self, sizes: list[Tensor]) -> float:
        """What keeps lr² Σ ⟨natural gradient, gradient⟩ below its bound, given the terms."""
        if self.kl_clip is None or not sizes:
            return 1.0
        size = float(torch.stack([s.to(sizes[0].device, torch.float64) for s in sizes]).sum())
        return math.sqrt(self.kl_clip / size) if size > self.kl_clip else 1.0

    def skip(self) -> None:
        """End a step whose gradients are of no use, without one."""
        self._follower.end_step()

    def quadratic(self, changes: Mapping[nn.Parameter, Tensor]) -> float:
        """Σ over layers of δᵀ (F + λ) δ, for changes δ of the covered parameters.

        F is that of all ranks, on every one of which this has to be called.
        """
        with self._no_autocast():
            return self._quadratic(changes)

    def _quadratic(self, changes: Mapping[nn.Parameter, Tensor]) -> float:
        total = 0.0
        for curvature in self.capture.layers.values():
            layer = curvature.layer
            mine = {
                role: changes[p].to(curvature.dtype)
                for role, p in layer.parameters.items()
                if p in changes
            }
            if len(mine) == len(layer.parameters):
                x = layer.matrix(mine)
                product = self._ranks.joint(curvature).product(x)
                total += float((x * (product + self.damping * x)).sum())
        return total

    def average(self, value: float) -> float:
        """The mean of a number over the ranks, on every one of which this has to be called."""
        return self._ranks.average(value, self._device)

    @property
    def _device(self) -> torch.device:
        return next(iter(self.capture.layers.values())).device

    def _no_autocast(self) -> AbstractContextManager[Any]:
        # the optimizers of torch take no notice of it either
        return torch.autocast(self._device.type, enabled=False)

    # ---- what is known --------------------------------------------------------------------------

    def uncovered(self, params: Iterable[nn.Parameter] | None = None) -> dict[str, str]:
        """Names of parameters whose gradients stay as they are, and why.

        Args:
            params: as of :meth:`step`; what is not among them is left out.
        """
        left = self.capture.uncovered()
        owned = {id(p) for p in (self.model.parameters() if params is None else params)}
        parts = {
            id(p)
            for curvature in self.capture.layers.values()
            for p in curvature.layer.parameters.values()
            if not _whole(curvature, owned)
        }
        nothing = self.steps > 0 and not self.capture.called
        for name, p in self.model.named_parameters():
            if id(p) in parts:
                left.setdefault(name, "other parameters of its layer are in no group")
            elif nothing:
                left.setdefault(name, _NOTHING if p.requires_grad else FROZEN)
        return {
            name: left[name]
            for name, p in self.model.named_parameters()
            if name in left and id(p) in owned
        }

    def state_dict(self) -> dict[str, Any]:
        """Curvature, inverses and the number of steps, for torch.save; copies.

        Gradients that came since the last step belong to the curvature from now on.
        """
        self._follower.close()
        return {
            "steps": self.steps,
            "damping": self.damping,
            "inverse_damping": self._inverse_damping,
            "new_step": self._follower.new_step,
            "capture": self.capture.state_dict(),
            "solvers": {name: saved(made) for name, made in self._solvers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a preconditioner of the same model and options.

        Raises:
            KeyError, ValueError: an entry is missing or does not fit; nothing was changed.
        """
        self.check_state(state)
        solvers = {
            name: restored(part, self.capture.layers[name].device)
            for name, part in state["solvers"].items()
        }
        self.capture.load_state_dict(state["capture"])
        self._solvers = solvers
        self.steps, self.damping = state["steps"], state["damping"]
        self._inverse_damping = state.get("inverse_damping", self.damping)
        self._follower.new_step = state.get("new_step", True)
        self._follower.due = _due(self.steps, self.factor_update_period)

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise what :meth:`load_state_dict` would, and change nothing."""
        missing = {"steps", "damping", "capture", "solvers"} - set(state)
        if missing:
            raise KeyError(f"state lacks {', '.join(sorted(missing))}")
        unknown = set(state["solvers"]) - set(self.capture.layers)
        if unknown:
            raise ValueError(f"state has an inverse of {min(unknown)}, which is not covered here")
        for name, part in state["solvers"].items():
            check_saved(name, part)
        self.capture.check_state(state["capture"])


def _whole(curvature: LayerCurvature, owned: set[int]) -> bool:
    """Whether all parameters of a layer are among these."""
    return all(id(p) in owned for p in curvature.layer.parameters.values())


def _due(step: int, period: int) -> bool:
    """Every `period` steps, and at first at powers of two: averages of few steps change fast."""
    return step % period == 0 or (step < period and step & (step - 1) == 0)


def _gradients(curvature: LayerCurvature) -> dict[str, Tensor] | None:
    """Those of a layer in the dtype of its curvature, zero where one lacks; None where all do."""
    parameters = curvature.layer.parameters
    if all(p.grad is None for p in parameters.values()):
        return None
    dtype = curvature.dtype
    return {
        role: torch.zeros_like(p, dtype=dtype) if p.grad is None else dense(p.grad).to(dtype)
        for role, p in parameters.items()
    }


def dense(gradient: Tensor | None) -> Tensor:
    """The gradient itself, which must not be sparse."""
    assert gradient is not None
    if gradient.layout != torch.strided:
        raise TypeError(
            f"a gradient has layout {gradient.layout}; only dense (torch.strided) is supported: "
            "make embeddings with sparse=False"
        )
    return gradient


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside what compiles it or makes it data-parallel, its parameters whole."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    inner = inside(model)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in inner.modules()):
        raise TypeError(
            "model has a FullyShardedDataParallel inside: gradients that are sharded over ranks "
            "cannot be preconditioned; use data parallelism"
        )
    for name, p in inner.named_parameters():
        if hasattr(p, "device_mesh"):
            raise TypeError(
                f"model has the parameter {name} as a {type(p).__name__}: gradients that are "
                "sharded over ranks cannot be preconditioned; use data parallelism"
            )
    return inner
