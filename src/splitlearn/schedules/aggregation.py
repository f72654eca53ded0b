"""Sharings that make a mean: of weights, or of their gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from splitlearn.layout import Party
from splitlearn.schedules.sharing import POLICIES, Sharing, check_choice
from splitlearn.schedules.weighted_mean import WeightedMean
from splitlearn.schedules.weights import Live, copied
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

    def take(self, live: Live, alice: Party) -> None:
        if live.at(SERVER):
            self.start = self.start or copied(live.weights)
        live.load(live.carry(self.start or live.weights, SERVER, alice, "weights"))
        if live.at(alice):
            live.set_state(self.kept.pop(alice, {}))
        if self.optimizer_state == "carry":
            live.load_state(live.carry(self.start_state, SERVER, alice, "optimizer_state"))

    def give(self, live: Live, alice: Party, num_rows: int) -> None:
        self.given.append((alice, num_rows if self.weighting == "samples" else 1))
        if self.optimizer_state == "keep" and live.at(alice):
            self.kept[alice] = live.own_state()
        if live.at(alice):  # a server elsewhere serves the next Alice first, and receives when it makes the mean
            self.settle(live)

    def settle(self, live: Live) -> None:
        for alice, weight in self.given:
            self.mean.add(live.carry(live.weights, alice, SERVER, "weights"), weight)
            if self.optimizer_state == "carry":
                self.mean_state.add(live.carry(live.state, alice, SERVER, "optimizer_state"), weight)
        self.given = []

    def end_round(self, live: Live) -> None:
        self.settle(live)
        if live.at(SERVER) and self.mean.total:
            self.mean.write(self.start)
            live.load(self.start)
            self.start_state = self.mean_state.take()
        self.start = {}

    def show(self, live: Live, alice: Party) -> None:
        agreed = live.carry(self.start or live.weights, SERVER, alice, "weights")
        if live.at(alice):
            self.aside = copied(live.weights) if self.start or not live.at(SERVER) else {}
            live.load(agreed)

    def hide(self, live: Live) -> None:
        live.load(self.aside)
        self.aside = {}

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
    way = "each alice -> server -> each alice: weight gradients, {} bytes each way a step"
    weighting: str = "samples"
    start: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    mean: WeightedMean = field(default_factory=WeightedMean, init=False, repr=False)
    givers: list[Party] = field(default_factory=list, init=False, repr=False)
    abreast: set[Party] | None = field(default=None, init=False, repr=False)  # with the last step; None before any

    def __post_init__(self) -> None:
        check_choice("weighting", self.weighting, WEIGHTINGS)

    def take(self, live: Live, alice: Party) -> None:
        if self.givers:
            live.load(self.start)
        else:
            self.start = copied(live.buffers)
        self._catch_up(live, alice)

    def show(self, live: Live, alice: Party) -> None:
        self._catch_up(live, alice)

    def _catch_up(self, live: Live, alice: Party) -> None:
        if self.abreast is not None and alice not in self.abreast:  # she has missed a step
            live.load(live.carry(live.weights, SERVER, alice, "weights"))
            live.load_state(live.carry(live.state, SERVER, alice, "optimizer_state"))
            self.abreast.add(alice)

    def give(self, live: Live, alice: Party, num_rows: int) -> None:
        gradients = live.carry(live.gradients, alice, SERVER, "weight_gradient")
        buffers = live.carry(live.buffers, alice, SERVER, "weights")
        self.mean.add({**gradients, **buffers}, num_rows if self.weighting == "samples" else 1)
        self.givers.append(alice)

    def end_round(self, live: Live) -> None:
        if live.at(SERVER) and self.mean.total:
            means = self.mean.take()
            live.load({name: means[name] for name in live.buffers})
            live.load_gradients({name: mean for name, mean in means.items() if name in live.trained})
        for alice in self.givers:
            live.load_gradients(live.carry(live.gradients, SERVER, alice, "weight_gradient"))
            live.load(live.carry(live.buffers, SERVER, alice, "weights"))
        self.abreast = {*self.givers} if self.givers else self.abreast
        self.givers, self.start = [], {}

    def state_dict(self) -> dict[str, Any]:
        return {"abreast": None if self.abreast is None else sorted(self.abreast)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.abreast = None if state["abreast"] is None else {*state["abreast"]}
