"""What happens to the weights of a role between turns, and at the end of a round.

However many Alices, there is one live copy of the weights, and two more where a mean is made: where the round started,
and the running sum. Only `Personal` and `optimizer_state: keep` hold something for each Alice.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from splitlearn.averaging import WeightedMean
from splitlearn.layout import Party
from splitlearn.live import SERVER, Live, copied, write

POLICIES, WEIGHTINGS = ("carry", "reset", "keep"), ("samples", "uniform")


class Sharing:
    """Does nothing at any of these moments."""

    defers = False
    """Whether the optimizer waits for the end of the round."""
    way = ""
    """How an Alice's weights cross, `{}` being their bytes; nothing where they do not."""

    def take(self, live: Live, alice: Party) -> None:
        """Make `live` what `alice` begins her turn with."""

    def give(self, live: Live, alice: Party, num_rows: int) -> None:
        """Her turn, of `num_rows` rows, is over."""

    def end_round(self, live: Live) -> None:
        """All turns of the round are over."""

    def show(self, live: Live) -> None:
        """Until `hide`, make `live` what all agree on, for evaluation in the middle of a round."""

    def hide(self, live: Live) -> None:
        """Go on training."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(eq=False)
class Shared(Sharing):
    """One party plays the role all the time, or nobody else ever has the weights."""


@dataclass(eq=False)
class Handoff(Sharing):
    """Alice hands a copy of her trained bottom to the next (Gupta & Raskar 2018, arXiv 1810.06060, section 3.2).

    Arguments:
        optimizer_state: `carry` (it travels with the weights and is counted), `reset` (the next Alice starts
            without any) or `keep` (each Alice goes on with her own).
        handoff: `peer` to peer, or by way of the `server`, which takes two transfers.
    """

    optimizer_state: str = "carry"
    handoff: str = "peer"
    holder: Party | None = field(default=None, init=False, repr=False)
    kept: dict[Party, dict[int, dict[str, Any]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check("handoff", self.handoff, ("peer", "server"))
        _check("optimizer_state", self.optimizer_state, POLICIES)

    @property
    def way(self) -> str:  # type: ignore[override]
        peer = "each alice -> the next: weights, {} bytes a turn"
        return peer if self.handoff == "peer" else peer.replace("the next", "server -> the next") + ", twice"

    def take(self, live: Live, alice: Party) -> None:
        giver, self.holder = self.holder, alice
        if giver in (None, alice):  # nobody gives the first Alice her first weights
            return
        way = [giver, alice] if self.handoff == "peer" else [giver, SERVER, alice]
        for src, dst in pairwise(way):
            live.load(live.carry(live.weights, src, dst, "weights"))
            if self.optimizer_state == "carry":
                live.load_state(live.carry(live.state, src, dst, "optimizer_state"))
        if self.optimizer_state == "keep":
            self.kept[giver] = live.own_state()
        if self.optimizer_state != "carry":
            live.set_state(self.kept.pop(alice, {}))

    def state_dict(self) -> dict[str, Any]:
        return {"holder": self.holder, "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.holder, self.kept = state["holder"], state["kept"]


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
    aside: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        _check("weighting", self.weighting, WEIGHTINGS)
        _check("optimizer_state", self.optimizer_state, POLICIES)

    def take(self, live: Live, alice: Party) -> None:
        self.start = self.start or copied(live.weights)
        live.load(live.carry(self.start, SERVER, alice, "weights"))
        live.set_state(self.kept.pop(alice, {}))
        live.load_state(live.carry(self.start_state, SERVER, alice, "optimizer_state"))

    def give(self, live: Live, alice: Party, num_rows: int) -> None:
        weight = num_rows if self.weighting == "samples" else 1
        self.mean.add(live.carry(live.weights, alice, SERVER, "weights"), weight)
        if self.optimizer_state == "carry":
            self.mean_state.add(live.carry(live.state, alice, SERVER, "optimizer_state"), weight)
        elif self.optimizer_state == "keep":
            self.kept[alice] = live.own_state()

    def end_round(self, live: Live) -> None:
        self.mean.write(self.start)
        live.load(self.start)
        self.start = {}
        if self.optimizer_state == "carry":
            self.start_state = copied(live.state)
            self.mean_state.write(self.start_state)

    def show(self, live: Live) -> None:
        if self.start:
            self.aside = copied(live.weights)
            live.load(self.start)

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

    def __post_init__(self) -> None:
        _check("weighting", self.weighting, WEIGHTINGS)

    def take(self, live: Live, alice: Party) -> None:
        if self.givers:
            live.load(self.start)
        else:
            self.start = copied(live.buffers)

    def give(self, live: Live, alice: Party, num_rows: int) -> None:
        gradients = live.carry(live.gradients, alice, SERVER, "weight_gradient")
        buffers = live.carry(live.buffers, alice, SERVER, "weights")
        self.mean.add({**gradients, **buffers}, num_rows if self.weighting == "samples" else 1)
        self.givers.append(alice)

    def end_round(self, live: Live) -> None:
        means = {**live.gradients, **live.buffers}
        self.mean.write(means)
        for alice in self.givers:
            write(means, live.carry(live.gradients, SERVER, alice, "weight_gradient"))
            write(means, live.carry(live.buffers, SERVER, alice, "weights"))
        self.givers, self.start = [], {}


@dataclass(eq=False)
class Personal(Sharing):
    """Each Alice has weights and an optimizer state of her own, which nobody else sees. All begin alike.

    SplitFed V3's bottoms (Gawali et al. 2020, arXiv 2012.12591). These do cost memory: a copy each.
    """

    first: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    own: dict[Party, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)
    holder: Party | None = field(default=None, init=False, repr=False)
    before: Party | None = field(default=None, init=False, repr=False)

    def take(self, live: Live, alice: Party) -> None:
        self.first = self.first or copied(live.weights)
        if alice == self.holder:
            return
        if self.holder is not None:
            self.own[self.holder] = {"weights": copied(live.weights), "state": live.own_state()}
        mine = self.own.pop(alice, {"weights": self.first, "state": {}})
        live.load(mine["weights"])
        live.set_state(mine["state"])
        self.holder = alice

    def show(self, live: Live) -> None:
        self.before = self.holder

    def hide(self, live: Live) -> None:
        if self.before is not None:
            self.take(live, self.before)

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "own": self.own, "holder": self.holder}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.own, self.holder = state["first"], state["own"], state["holder"]


def _check(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` (={value}) must be one of {', '.join(choices)}")
