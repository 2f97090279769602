"""KFAC: a torch optimizer that steps along the natural gradient of the layers that it covers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from fisherkern import checks
from fisherkern.curvature._finite import all_finite
from fisherkern.optim.preconditioner import KFACPreconditioner, dense

# Levenberg–Marquardt: how the damping changes with the reduction ratio, per step.
_RATIO_LOW, _RATIO_HIGH, _CHANGE = 0.25, 0.75, 19 / 20


class KFAC(Optimizer):
    """SGD with momentum along (F + λ)⁻¹ ∇, and AdamW for parameters that have no factor.

    Groups of parameters, schedulers and GradScaler work as with every optimizer. Weight decay is
    decoupled: p ← p (1 − lr · weight_decay) before the step. A step with a gradient of NaN or
    infinity anywhere is left out, with a warning said once: no parameter, momentum or inverse
    changes, while the curvature that was captured on the way counts as that of a step of its own.
    Where :meth:`step` is not called, as GradScaler has it, it counts with the step that follows.

    It follows its model by hooks, until it is gone or ``detach()`` is called. Of a copy it would
    not know the model: it can be neither copied nor pickled, but for its :meth:`state_dict`.

    Args:
        model: to train, see :class:`KFACPreconditioner`.
        params: parameters of the model, or groups of them, whose keys are `lr`, `momentum`,
            `weight_decay`, `adam_lr`, `adam_betas` and `adam_eps`; None: all that require grad. A
            layer of which some parameters are in no group is stepped by AdamW.
        lr: of the natural gradient. For `kl_clip` the one given here counts, or what a schedule
            makes of it where that is larger: a schedule scales steps that are clipped too.
        momentum: μ in [0, 1) of the natural gradient; the new one has weight 1.
        weight_decay: of both kinds of parameters.
        adam_lr: learning rate of the parameters without a factor; a scheduler scales it with `lr`.
            Where `lr` was 0 at first it holds as it is, once `lr` is not.
        adam_betas: of the same.
        adam_eps: of the same.
        damping_period: steps per prediction for :meth:`adapt_damping`; None: λ stays.
        options: of :class:`KFACPreconditioner`: `damping`, periods, `fisher_type` and so on.

    Raises:
        TypeError, ValueError: an argument of the wrong type or value, or parameters that are not
            the model's.

    Source: Martens and Grosse 2015; Loshchilov and Hutter 2019 (decoupled weight decay).

    >>> import torch
    >>> from fisherkern.optim import KFAC
    >>> model = torch.nn.Linear(3, 2)
    >>> optimizer = KFAC(model, lr=0.1, damping=1e-2)
    >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
    >>> for _ in range(2):
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.cross_entropy(model(x), y).backward()
    ...     optimizer.step()
    >>> optimizer.fallback()
    {}
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[Any] | None = None,
        *,
        lr: float = 1e-2,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        adam_lr: float = 1e-3,
        adam_betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
        damping_period: int | None = None,
        **options: Any,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "adam_lr": adam_lr,
            "adam_betas": adam_betas,
            "adam_eps": adam_eps,
        }
        _check(defaults)
        if damping_period is not None and checks.integer("damping_period", damping_period) < 1:
            raise ValueError(f"damping_period is {damping_period}; allowed are ints >= 1, or None")
        self.preconditioner = KFACPreconditioner(model, **options)
        try:
            super().__init__(self._given(params), defaults)
        except Exception:
            self.preconditioner.detach()
            raise
        self.damping_period = damping_period
        self._warned = False
        self._predicted: float | None = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As of every optimizer; its `lr` is the one that a scheduler scales `adam_lr` from.

        Raises:
            TypeError, ValueError: a value that the constructor would refuse, or parameters that are
                not the model's.
        """
        if not (isinstance(param_group, dict) and "params" in param_group):
            raise TypeError(f"params holds {param_group!r}; expected groups with an entry 'params'")
        members = param_group["params"]
        members = [members] if isinstance(members, Tensor) else list(members)
        own = {id(p) for p in self.preconditioner.model.parameters()}
        for p in members:
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"params holds a {type(p).__name__}; expected parameters of the model, or "
                    "groups of them"
                )
            if id(p) not in own:
                raise ValueError(
                    f"params holds a tensor of shape {list(p.shape)}, which is no parameter of the "
                    "model"
                )
        _check({**self.defaults, **param_group})
        super().add_param_group({**param_group, "params": members})
        added = self.param_groups[-1]
        added.setdefault("base_lr", added["lr"])

    def _given(self, params: Iterable[Any] | None) -> list[Any]:
        if params is None:  # of groups that are given a frozen parameter may be thawed later
            return [p for p in self.preconditioner.model.parameters() if p.requires_grad]
        given = list(params)
        if not given:
            raise ValueError("params is empty; expected parameters of the model, or groups of them")
        return given

    def fallback(self) -> dict[str, str]:
        """Names of the parameters in groups that AdamW steps, and why they have no factor."""
        return self.preconditioner.uncovered(self._parameters())

    def _parameters(self) -> list[nn.Parameter]:
        return [p for g in self.param_groups for p in g["params"]]

    def detach(self) -> None:
        """Take the hooks off the model: nothing is captured from now on."""
        self.preconditioner.detach()

    def __getstate__(self) -> Any:
        """Refused, for a copy would be without a model to follow."""
        raise TypeError(
            "KFAC follows its model and can be neither copied nor pickled: save its state_dict(), "
            "and load that into one that is made of the copy of the model"
        )

    @property
    def damping(self) -> float:
        """λ, which may be set; it holds from the next refresh of the inverses."""
        return self.preconditioner.damping

    @damping.setter
    def damping(self, value: float) -> None:
        self.preconditioner.damping = checks.damping(value)

    # ---- steps ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluates the model again and returns the loss, as of every torch optimizer.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [dense(p.grad) for p in self._stepped()]
        if not gradients:
            return loss
        if not all_finite(gradients):
            self.preconditioner.skip()
            self._predicted = None
            if not self._warned:
                self._warned = True
                warnings.warn(
                    "a gradient holds NaN or infinity; the step is left out (said once)",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return loss
        period, before = self.damping_period, []
        if period is not None and self.preconditioner.steps % period == 0:
            before = [(p, p.detach().clone(), dense(p.grad).clone()) for p in self._stepped()]
        # of the rate that a schedule scales: a step that is clipped follows the schedule too
        rates = {
            id(p): max(float(g["lr"]), float(g["base_lr"]))
            for g in self.param_groups
            for p in g["params"]
        }
        natural = self.preconditioner.step(lambda p: rates[id(p)], self._parameters())
        for group in self.param_groups:
            mine = [p for p in group["params"] if p.grad is not None]
            if group["weight_decay"]:
                for p in mine:
                    p.mul_(1 - _rate(group, id(p) in natural) * group["weight_decay"])
            self._natural_step([p for p in mine if id(p) in natural], group)
            self._adam_step([p for p in mine if id(p) not in natural], group)
        self._predict(before)
        return loss

    def _stepped(self) -> list[nn.Parameter]:
        """The parameters that have a gradient."""
        return [p for p in self._parameters() if p.grad is not None]

    def _natural_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, [p.grad for p in params if p.grad is not None])
        torch._foreach_add_(params, buffers, alpha=-float(group["lr"]))

    def _adam_step(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        for p in params:
            if "exp_avg" not in self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), dtype=torch.float32),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
        states = [self.state[p] for p in params]
        beta1, beta2 = group["adam_betas"]
        adamw(
            list(params),
            [p.grad for p in params if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=_rate(group, False),
            weight_decay=0.0,  # of every parameter alike, before the step
            eps=group["adam_eps"],
            maximize=False,
        )

    # ---- damping --------------------------------------------------------------------------------

    def _predict(self, before: list[tuple[nn.Parameter, Tensor, Tensor]]) -> None:
        """The change of the loss; of parameters without a factor the model is linear."""
        self._predicted = None
        if before:
            changes = {p: p - old for p, old, _ in before}
            slope = sum(float((changes[p] * g).sum()) for p, _, g in before)
            self._predicted = slope + self.preconditioner.quadratic(changes) / 2

    @property
    def wants_loss(self) -> bool:
        """Whether :meth:`adapt_damping` can judge the step that was just taken."""
        return self._predicted is not None

    def adapt_damping(self, before: float, after: float) -> float:
        """Change λ by how well the quadratic model predicted the change of the loss.

        With ρ the change over the predicted one, λ ← ω λ where ρ > 3/4 and λ ← λ / ω where ρ < 1/4,
        ω = (19/20)^`damping_period`. With several ranks each calls this, with the losses of its own
        part of the batch.

        Args:
            before: the loss of the batch of the step, as it was differentiated.
            after: the loss of the same batch after the step.

        Returns:
            ρ.

        Raises:
            ValueError: the step was not one in `damping_period`, see :attr:`wants_loss`.

        Source: Martens and Grosse 2015, section 6.5.
        """
        if self._predicted is None or self.damping_period is None:
            raise ValueError(
                "damping_period is "
                f"{self.damping_period}: the change of the last step was not predicted"
            )
        change = self.preconditioner.average(float(after) - float(before))
        ratio = change / self._predicted if self._predicted < 0 else -math.inf
        omega = _CHANGE**self.damping_period
        if ratio > _RATIO_HIGH:
            self.damping *= omega
        elif not ratio >= _RATIO_LOW:  # a loss of NaN too
            self.damping /= omega
        self._predicted = None
        return ratio

    # ---- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """As of every optimizer, with the preconditioner's under "kfac"."""
        return {**super().state_dict(), "kfac": self.preconditioner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state; training goes on with the same bits.

        Raises:
            KeyError, ValueError: an entry is missing or does not fit.
        """
        if "kfac" not in state_dict:
            raise KeyError("state_dict lacks kfac: it is not one of this optimizer")
        self.preconditioner.check_state(state_dict["kfac"])
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "kfac"})
        self.preconditioner.load_state_dict(state_dict["kfac"])


def _rate(group: dict[str, Any], natural: bool) -> float:
    if natural:
        return float(group["lr"])
    base = group["base_lr"]
    if base:
        return float(group["adam_lr"] * group["lr"] / base)
    return float(group["adam_lr"]) if group["lr"] else 0.0  # nothing to scale it from


def _check(group: dict[str, Any]) -> None:
    """Raise TypeError or ValueError where a value of a group is not allowed."""
    for name in ("lr", "adam_lr", "weight_decay"):
        checks.number(name, group[name], 0.0, math.inf)
    betas = group["adam_betas"]
    if not (isinstance(betas, (tuple, list)) and len(betas) == 2):
        raise ValueError(f"adam_betas is {betas!r}; expected two numbers in [0, 1)")
    first, second = betas
    averages = {"momentum": group["momentum"], "adam_betas[0]": first, "adam_betas[1]": second}
    for name, value in averages.items():
        if checks.number(name, value, 0.0, 1.0) == 1:
            raise ValueError(f"{name} is 1; allowed are numbers in [0, 1)")
    checks.positive("adam_eps", group["adam_eps"])
