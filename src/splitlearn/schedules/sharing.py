"""What happens to the weights of a role between turns, and at the end of a round.

However many Alices, there is one live copy of the weights, and two more where a mean is made: where the round started,
and the running sum. Only `Personal` and `optimizer_state: keep` hold something for each Alice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from torch import Tensor

from splitlearn.layout import Party
from splitlearn.schedules.weights import RoleWeights, copied
from splitlearn.wire import SERVER

POLICIES = ("carry", "reset", "keep")


class Sharing:
    """Does nothing at any of these moments."""

    defers = False
    """Whether the optimizer waits for the end of the round."""
    way = ""
    """How an Alice's weights cross, `{}` being their bytes; nothing where they do not."""
    at_server = False
    """Whether the server has what all Alices agree on."""

    def begin_turn(self, weights: RoleWeights, alice: Party) -> None:
        """Make `weights` what `alice` begins her turn with."""

    def end_turn(self, weights: RoleWeights, alice: Party, num_rows: int) -> None:
        """Her turn, of `num_rows` rows, is over."""

    def end_round(self, weights: RoleWeights) -> None:
        """All turns of the round are over."""

    def receive_pending(self, weights: RoleWeights) -> None:
        """Receive what is under way, so that nothing is lost when all save their state."""

    def begin_evaluation(self, weights: RoleWeights, alice: Party) -> None:
        """Until `end_evaluation`, load what all agree on, for `alice` to evaluate, be it in the middle of a round."""

    def end_evaluation(self, weights: RoleWeights) -> None:
        """Go on training."""

    def agreed(self, tensors: Mapping[str, Tensor], party: Party) -> Mapping[str, Tensor]:
        """Return what of the live weights, `tensors`, `party` is left with at the end, if she is not behind."""
        return tensors

    def way_to(self, party: Party) -> list[Party]:
        """On which the trained weights come to `party` at the end: from who has them, be it `party` herself."""
        return [party]

    def restore(self, alice: Party | None) -> None:
        """Who had the turn is gone for good; `alice` had it before her, None: nobody who is left."""

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
        check_choice("handoff", self.handoff, ("peer", "server"))
        check_choice("optimizer_state", self.optimizer_state, POLICIES)

    @property
    def way(self) -> str:  # type: ignore[override]
        peer = "each alice -> the next: weights, {} bytes a turn"
        return peer if self.handoff == "peer" else peer.replace("the next", "server -> the next") + ", twice"

    def begin_turn(self, weights: RoleWeights, alice: Party) -> None:
        if self.holder in (None, alice):  # nobody gives the first Alice her first weights
            self.holder = alice
            return
        way, giver, self.holder = self.way_to(alice), self.holder, alice
        for src, dst in pairwise(way):
            weights.load(weights.carry(weights.tensors, src, dst, "weights"))
            if self.optimizer_state == "carry":
                weights.load_state(weights.carry(weights.state, src, dst, "optimizer_state"))
        if self.optimizer_state == "keep" and weights.at(giver):
            self.kept[giver] = weights.own_state()
        if self.optimizer_state != "carry" and weights.at(alice):
            weights.set_state(self.kept.pop(alice, {}))

    def way_to(self, party: Party) -> list[Party]:
        if self.holder in (None, party):
            return [party]
        return [self.holder, party] if self.handoff == "peer" else [self.holder, SERVER, party]

    def restore(self, alice: Party | None) -> None:
        self.holder = alice  # who still has what she handed over

    def state_dict(self) -> dict[str, Any]:
        return {"holder": self.holder, "kept": self.kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.holder, self.kept = state["holder"], state["kept"]


@dataclass(eq=False)
class Personal(Sharing):
    """Each Alice has weights and an optimizer state of her own, which nobody else sees. All begin alike.

    SplitFed V3's bottoms (Gawali et al. 2020, arXiv 2012.12591). These do cost memory: a copy each.
    """

    first: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False)
    own: dict[Party, dict[str, Any]] = field(default_factory=dict, init=False, repr=False)
    holder: Party | None = field(default=None, init=False, repr=False)
    before: Party | None = field(default=None, init=False, repr=False)

    def begin_turn(self, weights: RoleWeights, alice: Party) -> None:
        if alice == self.holder or not weights.at(alice):  # in a process of her own each has hers at home
            return
        self.first = self.first or copied(weights.tensors)
        if self.holder is not None:
            self.own[self.holder] = {"weights": copied(weights.tensors), "state": weights.own_state()}
        mine = self.own.pop(alice, {"weights": self.first, "state": {}})
        weights.load(mine["weights"])
        weights.set_state(mine["state"])
        self.holder = alice

    def agreed(self, tensors: Mapping[str, Tensor], party: Party) -> Mapping[str, Tensor]:
        """Her own, and the first ones where she never had a turn."""
        if self.holder in (None, party):
            return tensors
        return self.own[party]["weights"] if party in self.own else self.first

    def begin_evaluation(self, weights: RoleWeights, alice: Party) -> None:
        self.before = self.holder

    def end_evaluation(self, weights: RoleWeights) -> None:
        if self.before is not None:
            self.begin_turn(weights, self.before)

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "own": self.own, "holder": self.holder}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.first, self.own, self.holder = state["first"], state["own"], state["holder"]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"`{name}` (={value}) must be one of {', '.join(choices)}")
