"""One optimizer per role, stepped by hand as Lightning would."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning import callbacks as lightning
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from splitlearn.errors import InputError
from splitlearn.layout import Role
from splitlearn.network import SplitNetwork
from splitlearn.schedules.weights import RoleWeights
from splitlearn.training.checks import check_mode

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]
MakeScheduler = Callable[[Optimizer], Any]
# What takes the optimization into its own hands, which is the schedule's here; by name, since some are younger.
INSTEAD = {
    "GradientAccumulationScheduler": "take trainer.accumulate_grad_batches",
    "LearningRateFinder": "sweep over it, e.g. -m optimizer.lr=0.01,0.1",
    "BatchSizeFinder": "sweep over it, e.g. -m data.batch_size=32,64",
    "StochasticWeightAveraging": "leave it out",
    "WeightAveraging": "leave it out",
    "BackboneFinetuning": "freeze blocks in the model, or take a BaseFinetuning that names them",
}
HOOKS = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")


class Stepper:
    """Erases, scales, clips and steps for every role, with gradient scaling and hooks as the trainer has them.

    Lightning's own optimizer wrapper costs more than a small network's step, and under 16-mixed updates the gradient
    scale after each optimizer, so that the second unscales by the wrong one. This updates it once per mini-batch.

    Arguments:
        learner: attached to a trainer whose optimizers are set up, in the order of `roles`.
        clip: keyword arguments of `LightningModule.clip_gradients`; each role is clipped by itself.
        monitor: the metric that ReduceLROnPlateau follows. Lightning ignores a scheduler's own in manual optimization.
        accumulate: mini-batches whose gradients add up before a step.

    `waiting` are the mini-batches whose gradients no optimizer has taken yet.
    """

    def __init__(
        self,
        learner: pl.LightningModule,
        roles: Iterable[Role],
        clip: Mapping[str, Any],
        monitor: str = "val/loss",
        accumulate: int = 1,
    ) -> None:
        trainer = learner.trainer
        self.learner, self.clip, self.monitor = learner, clip, monitor
        self.accumulate, self.waiting = accumulate, 0
        self.optimizers: dict[Role, Optimizer] = dict(zip(roles, trainer.optimizers, strict=True))
        self.scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
        self.autocasts = isinstance(trainer.precision_plugin, MixedPrecision)
        self.schedulers = {i: [c for c in trainer.lr_scheduler_configs if c.interval == i] for i in ("epoch", "step")}
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                check_mode(monitor, config.scheduler.mode, "`scheduler.scheduler.mode`")
        self.listeners = {hook: _listeners(learner, hook) for hook in HOOKS}

    def zero_grad(self) -> None:
        """Erase the gradients of the last step; those that wait for the next one stay."""
        if self.waiting:
            return
        for optimizer in self.optimizers.values():
            self._tell("on_before_zero_grad", optimizer)
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def before_backward(self, loss: Tensor) -> Tensor:
        """Return the loss to go backward from: its share of an accumulated gradient, scaled under 16-mixed.

        The scale is a power of two and crosses the cut with the gradient: it keeps small half-precision gradients
        from vanishing on the way.
        """
        loss = loss if self.accumulate == 1 else loss / self.accumulate  # as Lightning, short remainders too
        loss = loss if self.scaler is None else self.scaler.scale(loss)
        self._tell("on_before_backward", loss)
        return loss

    def step(self, roles: Sequence[Role]) -> None:
        """Let the optimizers of these roles change their weights; one without gradients is passed over."""
        self.waiting = 0
        ready = [optimizer for role in roles if (optimizer := self.optimizers.get(role)) and _has_gradients(optimizer)]
        for optimizer in ready:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            self._tell("on_before_optimizer_step", optimizer)
            if self.clip["gradient_clip_val"]:
                self.learner.clip_gradients(optimizer, **self.clip)
            if self.scaler is None:
                _step(optimizer)
            else:
                self.scaler.step(optimizer)
        if self.scaler is not None and ready:
            self.scaler.update()
        if self.autocasts:
            # Autocast keeps its half-precision copies of the weights, and these have just changed.
            torch.clear_autocast_cache()

    def after_backward(self) -> None:
        self._tell("on_after_backward")

    def step_schedulers(self, interval: str) -> None:
        """Step the learning-rate schedulers of this interval, as Lightning does in automatic optimization."""
        for config in self.schedulers[interval]:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                config.scheduler.step(self._monitored(self.monitor))
            else:
                config.scheduler.step()

    def _monitored(self, name: str) -> Tensor:
        metrics = self.learner.trainer.callback_metrics
        if name not in metrics:
            measured = ", ".join(sorted(metrics))
            raise InputError(f"`scheduler.monitor` (={name}) is not measured: choose one of {measured}")
        return metrics[name]

    def _tell(self, hook: str, *args: Any) -> None:
        for listener in self.listeners[hook]:
            listener(*args)


def _has_gradients(optimizer: Optimizer) -> bool:
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])


def _step(optimizer: Optimizer) -> None:
    """`optimizer.step()`, without torch's wrapper for profilers and hooks where there are none.

    The wrapper takes some 40 us, and two parties' optimizers make that a twentieth of a small network's step.
    """
    step = type(optimizer).step
    wanted = (
        not getattr(step, "hooked", False)  # not wrapped
        or "step" in vars(optimizer)  # wrapped once more, by a learning-rate scheduler
        or optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or torch.autograd.profiler._is_profiler_enabled
    )
    if wanted:
        optimizer.step()
    else:
        step.__wrapped__(optimizer)  # type: ignore[attr-defined]


def check_callbacks(callbacks: Iterable[object]) -> None:
    """Raises InputError for one that relies on Lightning's automatic optimization."""
    for callback in callbacks:
        for name, cure in INSTEAD.items():
            kind = getattr(lightning, name, None)
            if kind is not None and isinstance(callback, kind):
                raise InputError(
                    f"`callbacks` ({type(callback).__name__}) needs one optimizer that Lightning steps, and here every "
                    f"role has its own: {cure}"
                )


def check_held(weights: Mapping[Role, RoleWeights], by_gradient: bool = False) -> None:
    """Raises InputError for parameters that want a gradient, or have one by now, and that no optimizer would change."""
    for role, mine in weights.items():
        if mine.thawed:
            raise InputError(
                f"`{mine.thawed[0]}` of {role} is in a block that `freeze` names, and a callback has unfrozen it: "
                "leave out one of both"
            )
        names = [name for name, parameter in mine.unheld.items() if parameter.grad is not None or not by_gradient]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise InputError(
                f"`{names[0]}`{more} of {role} would be trained, but no optimizer has it: do not freeze it before the "
                "run, or let a BaseFinetuning callback unfreeze it and add it to the optimizer"
            )


def by_role(
    network: SplitNetwork,
    default: MakeOptimizer,
    overrides: Mapping[Role, MakeOptimizer],
    scheduler: MakeScheduler | None = None,
) -> dict[Role, MakeOptimizer]:
    """Return the optimizer of each role that has something to train.

    Each is tried out once, with a scheduler on it, so that a wrong option shows now.
    """
    for role in overrides:
        if role not in network.layout.roles:
            raise ValueError(f"`optimizers.{role}` names no role of the layout: {', '.join(network.layout.roles)}")
    makers = {role: overrides.get(role, default) for role in network.layout.roles if network.parameters_of(role)}
    if not any(p.requires_grad for _, segment in network.program for p in segment.parameters()):
        raise ValueError("the model has no parameters that require a gradient: there is nothing to train")
    for role, make in makers.items():
        try:
            optimizer = make(network.parameters_of(role))
        except (TypeError, ValueError) as error:
            raise ValueError(f"the optimizer of {role} cannot be made: {error}; change `optimizer`") from error
        _try_a_step(role, make, network.parameters_of(role))
        try:
            _ = scheduler and scheduler(optimizer)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the scheduler of {role} cannot be made: {error}; change `scheduler`") from error
    return makers


def _try_a_step(role: Role, make: MakeOptimizer, parameters: Sequence[nn.Parameter]) -> None:
    """Raises ValueError for an optimizer that wants more than gradients, e.g. a closure (LBFGS) or sparse ones.

    Tried on the smallest parameter of each number of dimensions, which costs nothing.
    """
    smallest = {p.ndim: p for p in sorted(parameters, key=nn.Parameter.numel, reverse=True)}
    stand_ins = [nn.Parameter(p.detach().clone()) for p in smallest.values()]
    for parameter in stand_ins:
        parameter.grad = torch.zeros_like(parameter)
    with torch.random.fork_rng(devices=[]):
        optimizer = make(stand_ins)
        try:
            optimizer.step()
        except Exception as error:  # what it raises is up to whoever wrote it
            why = " ".join(str(error).split())
            raise ValueError(
                f"the optimizer of {role} ({type(optimizer).__name__}) cannot step on dense gradients alone ({why}): "
                "take one whose step() needs no closure, e.g. optimizer=sgd or optimizer=adam"
            ) from error


def _listeners(learner: pl.LightningModule, hook: str) -> list[Callable[..., None]]:
    trainer = learner.trainer
    heard: list[Callable[..., None]] = [
        partial(getattr(callback, hook), trainer, learner)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if is_overridden(hook, callback, Callback)
    ]
    return [*heard, getattr(learner, hook)] if is_overridden(hook, learner, pl.LightningModule) else heard


def options_of(optimizers: Mapping[Role, Optimizer]) -> dict[str, str]:
    """The classes and options of the roles' optimizers; where they are not all alike, role by role."""
    by_name: dict[str, dict[Role, str]] = {}
    for role, optimizer in optimizers.items():
        options = {f"optimizer.{name}": value for name, value in optimizer.defaults.items()}
        groups = [_own_options(group, optimizer.defaults) for group in optimizer.param_groups]
        options["optimizer.param_groups"] = groups if len(groups) > 1 or any(groups) else "one"
        for name, value in {"optimizer": type(optimizer).__name__, **options}.items():
            by_name.setdefault(name, {})[role] = str(value)
    return {
        name: " and ".join({f"{value} of {role}": None for role, value in values.items()})
        if len({*values.values()}) > 1 or len(values) < len(optimizers)
        else next(iter(values.values()))
        for name, values in by_name.items()
    }


def _own_options(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """What a group of parameters has besides the optimizer's defaults, and how many parameters."""
    own = {name: value for name, value in group.items() if name != "params" and value != defaults.get(name)}
    return {**own, "params": len(group["params"])} if own else {}
