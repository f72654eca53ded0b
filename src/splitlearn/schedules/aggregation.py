"""Sharings that make a mean: of weights, or of their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from splitlearn.layout import Party
from splitlearn.schedules.sharing import POLICIES, Sharing, check_choice
from splitlearn.schedules.weighted_mean import WeightedMean
from splitlearn.schedules.weights import RoleWeights, copied
from splitlearn.wire import SERVER

WEIGHTINGS = ("samples", "uniform")


@dataclass(eq=False)
class Average(Sharing):
    """Everybody starts from the same weights; behind the round these become the mean of what all have made of them.

    McMahan et al. 2017 (arXiv 1602.05629) for whole networks; Thapa et al. 2022 (SplitFed, arXiv 2004.12088) for the
    bottoms, and in its first version for the server's copies of the top.

    Arguments:
        optimizer_state: at the start of a turn: `reset` (none), `keep` (her own of the last round) or `carry` (the mean
            of all of the last round; it travels with the weights and is counted).
        weighting: of each Alice in the mean: by the `samples` she trained on, or `uniform`.
    """

    way = "server -> each alice -> server: weights, {} bytes each way a turn"
    at_server = True
    optimizer_state: str = "reset"
    weighting: str = "samples"
    start: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    start_state: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    mean: WeightedMean = field(default_factory=WeightedMean, init=False, repr=False)
    mean_state: WeightedMean = field(default_factory=WeightedMean, init=False, repr=False)
    kept: dict[Party, dict[int, dict[str, Any]]] = field(default_factory=dict, init=False, repr=False)
    given: list[tuple[Party, float]] = field(default_factory=list, init=False, repr=False)  # and not yet received
    aside: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("optimizer_state", self.optimizer_state, POLICIES)

    def begin_turn(self, weights: RoleWeights, alice: Party) -> None:
        if weights.at(SERVER):
            self.start = self.start or copied(weights.tensors)
        weights.load(weights.carry(self.start or weights.tensors, SERVER, alice, "weights"))
        if weights.at(alice):
            weights.set_state(self.kept.pop(alice, {}))
        if self.optimizer_state == "carry":
            weights.load_state(weights.carry(self.start_state, SERVER, alice, "optimizer_state"))

    def end_turn(self, weights: RoleWeights, alice: Party, num_rows: int) -> None:
        self.given.append((alice, num_rows if self.weighting == "samples" else 1))
        if self.optimizer_state == "keep" and weights.at(alice):
            self.kept[alice] = weights.own_state()
        if weights.at(alice):  # a server elsewhere serves the next Alice first, and receives when it makes the mean
            self.receive_pending(weights)

    def receive_pending(self, weights: RoleWeights) -> None:
        for alice, weight in self.given:
            self.mean.add(weights.carry(weights.tensors, alice, SERVER, "weights"), weight)
            if self.optimizer_state == "carry":
                self.mean_state.add(weights.carry(weights.state, alice, SERVER, "optimizer_state"), weight)
        self.given = []

    def end_round(self, weights: RoleWeights) -> None:
        self.receive_pending(weights)
        if weights.at(SERVER) and self.mean.total:
            self.mean.write(self.start)
            weights.load(self.start)
            self.start_state = self.mean_state.take()
        self.start = {}

    def begin_evaluation(self, weights: RoleWeights, alice: Party) -> None:
        agreed = weights.carry(self.start or weights.tensors, SERVER, alice, "weights")
        if weights.at(alice):
            self.aside = copied(weights.tensors) if self.start or not weights.at(SERVER) else {}
            weights.load(agreed)

    def end_evaluation(self, weights: RoleWeights) -> None:
        weights.load(self.aside)
        self.aside = {}

    def agreed(self, tensors: Mapping[str, Tensor], party: Party) -> Mapping[str, Tensor]:
        return self.start or tensors

    def way_to(self, party: Party) -> list[Party]:
        return [SERVER] if party == SERVER else [SERVER, party]

    def state_dict(self) -> dict[str, Any]:
        means = {"mean": self.mean.state_dict(), "mean_state": self.mean_state.state_dict()}
        return {"start": self.start, "start_state": self.start_state, "kept": self.kept, **means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start, self.start_state, self.kept = state["start"], state["start_state"], state["kept"]
        self.mean.load_state_dict(state["mean"])
        self.mean_state.load_state_dict(state["mean_state"])


@dataclass(eq=False)
class MeanGradient(Sharing):
    """All have the same weights and step, once a round, by the mean of everybody's gradient. A round is one step.

    Large-batch synchronous SGD (Chen et al. 2016, arXiv 1604.00981), and parallel split learning's top. The buffers of
    batch norm are averaged as well.

    Arguments:
        weighting: of each Alice in the mean: by the `samples` of her mini-batch, or `uniform`.
    """

    defers = True
    at_server = True
    way = "each alice -> server -> each alice: weight gradients, {} bytes each way a step"
    weighting: str = "samples"
    start: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    mean: WeightedMean = field(default_factory=WeightedMean, init=False, repr=False)
    givers: list[Party] = field(default_factory=list, init=False, repr=False)
    abreast: set[Party] | None = field(default=None, init=False, repr=False)  # with the last step; None before any

    def __post_init__(self) -> None:
        check_choice("weighting", self.weighting, WEIGHTINGS)

    def begin_turn(self, weights: RoleWeights, alice: Party) -> None:
        if self.givers:
            weights.load(self.start)
        else:
            self.start = copied(weights.buffers)
        self._catch_up(weights, alice)

    def begin_evaluation(self, weights: RoleWeights, alice: Party) -> None:
        self._catch_up(weights, alice)

    def way_to(self, party: Party) -> list[Party]:
        missed = self.abreast is not None and party not in (SERVER, *self.abreast)
        return [SERVER, party] if missed else [party]

    def _catch_up(self, weights: RoleWeights, alice: Party) -> None:
        if self.abreast is not None and alice not in self.abreast:  # she has missed a step
            weights.load(weights.carry(weights.tensors, SERVER, alice, "weights"))
            weights.load_state(weights.carry(weights.state, SERVER, alice, "optimizer_state"))
            self.abreast.add(alice)

    def end_turn(self, weights: RoleWeights, alice: Party, num_rows: int) -> None:
        gradients = weights.carry(weights.gradients, alice, SERVER, "weight_gradient")
        buffers = weights.carry(weights.buffers, alice, SERVER, "weights")
        self.mean.add({**gradients, **buffers}, num_rows if self.weighting == "samples" else 1)
        self.givers.append(alice)

    def end_round(self, weights: RoleWeights) -> None:
        if weights.at(SERVER) and self.mean.total:
            means = self.mean.take()
            weights.load({name: means[name] for name in weights.buffers})
            weights.load_gradients({name: mean for name, mean in means.items() if name in weights.trained})
        for alice in self.givers:
            weights.load_gradients(weights.carry(weights.gradients, SERVER, alice, "weight_gradient"))
            weights.load(weights.carry(weights.buffers, SERVER, alice, "weights"))
        self.abreast = {*self.givers} if self.givers else self.abreast
        self.givers, self.start = [], {}

    def state_dict(self) -> dict[str, Any]:
        return {"abreast": None if self.abreast is None else sorted(self.abreast)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.abreast = None if state["abreast"] is None else {*state["abreast"]}
