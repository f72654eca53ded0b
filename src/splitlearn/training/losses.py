"""What the mean of a loss is over: the rows, the weights of their classes, or nothing, where it is a sum."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from splitlearn.errors import InputError
from splitlearn.layout import Layout, Party
from splitlearn.network import Batch
from splitlearn.schedules.aggregation import MeanGradient
from splitlearn.schedules.schedule import Schedule
from splitlearn.schedules.sharing import Sharing
from splitlearn.seeds import derive, seed_draws

Weight = int | Tensor


class Loss(NamedTuple):
    """The loss of some rows without a graph, and what it adds to the `total` and `weight` of a mean over more rows."""

    value: Tensor
    total: Tensor
    weight: Weight


class MeanLoss:
    """A loss module, and how its values go together: of micro-batches, of Alices, of an epoch, of a validation.

    torch's cross-entropy and NLL divide by the class weights of the labels that are not `ignore_index` (a class: data
    refuse labels below 0), its other losses by the rows. With `reduction=sum` values add up, and for a mean are divided
    by the rows. A loss with a forward of one's own, derived from torch's or not, says what it divides by in a method
    `weight_of(labels)`; without, nothing is known of it, and means that are only logged are taken over rows.

    Arguments:
        module: (output, labels) to a scalar.
        schedule, layout: whose gradients are averaged, and who knows the labels.
        micro_batches: parts of a mini-batch.
        seed: of what the module draws, as `Segment` has it for blocks; None where it draws nothing.

    Raises ValueError where gradients would be put together by weights that nobody knows, or where one multiple of the
    loss would have to serve a role that takes their mean by samples and one that does not.
    """

    def __init__(
        self, module: nn.Module, schedule: Schedule, layout: Layout, micro_batches: int = 1, seed: int | None = None
    ) -> None:
        self.module, self.seed = module, seed
        self.adds_up = getattr(module, "reduction", "mean") == "sum"
        self.ignore_index: int | None = getattr(module, "ignore_index", None)
        self.sharings: dict[str, Sharing] = {"alice": schedule.alice, "bob": schedule.bob}
        if {*layout.roles} == {"alice"}:
            del self.sharings["bob"]
        self.by_samples = [role for role, sharing in self.sharings.items() if _by_samples(sharing)]
        self.joins = len(schedule.takers) > 1 and bool(self.by_samples)
        self.one_sided = self.joins and len(self.by_samples) < len(self.sharings)
        self._check(layout, micro_batches)

    def of(self, output: Tensor, labels: Tensor, number: tuple[int, ...]) -> Tensor:
        """The module's value for `output` [B, ...] and `labels` [B] of the mini-batch `number`."""
        if self.seed is not None:
            seed_draws(derive(self.seed, "draw", "loss", *number), output.device)
        return self.module(output, labels)

    def weight_of(self, labels: Tensor) -> Weight:
        """What the loss of these rows divides by; where it adds up, and where nothing is known, their number."""
        if hasattr(self.module, "weight_of"):
            return self.module.weight_of(labels)  # type: ignore[operator]
        if not self._weighs or labels.is_floating_point():
            return len(labels)
        module: Any = self.module
        known = labels != module.ignore_index
        if module.weight is None:
            return known.sum()
        return torch.where(known, module.weight[torch.where(known, labels, 0)], 0.0).sum()

    def part(self, value: Tensor, weight: Weight, weights: Sequence[Weight]) -> Tensor:
        """What the loss of a micro-batch contributes to that of the mini-batch, whose parts have these `weights`."""
        if len(weights) == 1 or self.adds_up:
            return value
        if isinstance(weight, Tensor):  # the mean over labels that are all ignored is NaN, its gradients are zeros
            return torch.where(weight > 0, value * (weight / sum(weights)), 0.0)
        return value * (weight / sum(weights))

    def join(self, parts: Sequence[Tensor], weights: Sequence[Weight]) -> Loss:
        """The loss of rows whose `parts` have been made ready by `part`."""
        value, weight = sum(parts[1:], parts[0]), sum(weights[1:], weights[0])
        if self.adds_up:
            return Loss(value, value, weight)
        if isinstance(weight, Tensor):
            if (
                self._weighs and self.module.weight is None
            ):  # where all labels are ignored, torch's mean is NaN and its gradients zeros
                value = torch.where(weight > 0, value, 0.0)
            return Loss(value, value * weight, weight)
        return Loss(value, value * weight, weight)

    def share(self, alice: Party, step: Mapping[Party, Batch]) -> float | Tensor:
        """By what her loss is multiplied, so that the mean of gradients by samples is the gradient of the whole step.

        `step` are the mini-batches of all who take part in it.

        Raises InputError where a loss of one's own, of which only its `weight_of` knows, cannot be shared out so.
        """
        if not self.joins or len(step) == 1 or not (self.adds_up or self._weighs or hasattr(self.module, "weight_of")):
            return 1
        rows = {party: len(batch.ids) for party, batch in step.items()}
        mean_rows = sum(rows.values()) / rows[alice]
        if self.adds_up:
            return mean_rows
        weights = {party: self.weight_of(batch.fields["y"]) for party, batch in step.items()}
        share = mean_rows * weights[alice] / sum(weights.values())
        if self.one_sided and not math.isclose(share, 1, rel_tol=1e-5):
            raise InputError(self._one_sided())
        return share

    @property
    def _weighs(self) -> bool:
        """Whether torch's own loss weighs labels, rather than rows alike."""
        module: Any = self.module
        if self.adds_up or _is_own(module) or not isinstance(module, nn.CrossEntropyLoss | nn.NLLLoss):
            return False
        return module.weight is not None or module.ignore_index >= 0

    def _check(self, layout: Layout, micro_batches: int) -> None:
        name, owner, holder = type(self.module).__name__, layout.owners["y"], layout.stages[-1].role
        if getattr(self.module, "reduction", "mean") == "none":
            raise ValueError(f"`loss` (={name}) must be one number: take reduction=mean or sum, not none")
        own = _is_own(self.module)
        parts = "`micro_batches`" if micro_batches > 1 else "`schedule`, a mean of gradients" if self.joins else None
        if own and parts and not hasattr(self.module, "weight_of"):
            raise ValueError(
                f"`loss` (={name}) must say what it divides by, since {parts} puts parts of it together: give it a "
                "method weight_of(labels), len(labels) if it is a mean over rows"
            )
        if self.joins and (own or self._weighs) and (owner == "alice" or holder != owner):
            raise ValueError(
                f"`loss` (={name}) weighs labels that only each Alice knows, and the schedule takes the mean of their "
                "gradients: take a layout in which bob has the labels, or weighting=uniform"
            )
        if self.one_sided and (self.adds_up or self._weighs):
            raise ValueError(self._one_sided())

    def _one_sided(self) -> str:
        does = "adds up" if self.adds_up else "weighs labels"
        told = " and ".join(f"`schedule.{role}` (={sharing})" for role, sharing in self.sharings.items())
        return (
            f"`loss` (={type(self.module).__name__}) {does}, so that all roles must take the mean of gradients by "
            f"samples or none, not {told}: take a loss that is a mean over rows, or "
            f"schedule.{self.by_samples[0]}.weighting=uniform"
        )


def _by_samples(sharing: Sharing) -> bool:
    return isinstance(sharing, MeanGradient) and sharing.weighting == "samples"


def _is_own(module: nn.Module) -> bool:
    """Whether what the loss computes is not torch's: what it divides by is then anybody's guess."""
    return not type(module).forward.__module__.startswith("torch.")
