"""Moves weights as the schedule says: when the turn passes to another Alice, and at the end of a round."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from splitlearn.layout import Party, Role
from splitlearn.network import Batch, SplitNetwork
from splitlearn.schedules.schedule import Schedule
from splitlearn.schedules.sharing import Personal, Sharing
from splitlearn.schedules.weights import RoleWeights


class Rounds:
    """Where a run stands: who has the turn, and what of whom has been averaged so far.

    Arguments:
        schedule: says what happens to the weights of each role. Checked against the network's layout.
        network: whose weights these are.

    `holder` has the turn or had the last one.
    """

    def __init__(self, schedule: Schedule, network: SplitNetwork) -> None:
        schedule.check(network.layout)
        self.schedule, self.network = schedule, network
        self.holder = schedule.takers[0]
        self.taking = False
        self.num_rows = 0
        self.turns: dict[Party, None] = {}  # who has had one, the latest last
        self.gone: frozenset[Party] = frozenset()
        self.step: dict[Party, Batch] = {}  # the one at hand
        roles = [role for role in network.layout.roles if network.wire.hosts(role)]
        self.weights = {role: RoleWeights(role, network.segments_of(role), network.wire) for role in roles}
        self.sharings = self._new_sharings()
        self.deferred = [role for role, sharing in self.sharings.items() if sharing.defers]
        self.at_once = [role for role in roles if role not in self.deferred]
        self.personal = isinstance(schedule.alice, Personal)
        self.wanting: dict[Role, list[str]] = {}  # what wanted a gradient when a checkpoint was saved

    def begin(self, optimizers: Mapping[Role, Optimizer]) -> None:
        """Before training: take the optimizers to move, and freeze what was frozen when the checkpoint was saved.

        Callbacks freeze in front of a run what they have unfrozen in the middle of the one that is gone on with.
        """
        for role, names in self.wanting.items():
            for name, parameter in self.weights[role].parameters.items():
                parameter.requires_grad_(name in names)
        self.wanting = {}
        for role, weights in self.weights.items():
            weights.optimizer = optimizers.get(role)
        self.find()

    def find(self) -> None:
        """Look the weights up where they are now, and which of them are to be trained."""
        for weights in self.weights.values():
            weights.find()

    def present(self, batches: Mapping[Party, Batch]) -> Iterator[tuple[Party, Batch]]:
        """The mini-batches of a step, without those of Alices who are gone."""
        self.step = {alice: batch for alice, batch in batches.items() if alice not in self.gone}
        return iter(self.step.items())

    @property
    def halfway(self) -> bool:
        """Whether a round is unfinished, so that evaluation takes the weights of its start."""
        return any(bool(getattr(sharing, "start", None)) for sharing in self.sharings.values())

    @property
    def gradients(self) -> dict[Role, dict[str, Tensor]]:
        """Those of every role, by the names of its weights."""
        return {role: weights.gradients for role, weights in self.weights.items()}

    def load_gradients(self, gradients: Mapping[Role, Mapping[str, Tensor]]) -> None:
        for role, of_role in gradients.items():
            self.weights[role].load_gradients(of_role)

    def begin_turn(self, alice: Party) -> None:
        """The turn is Alice's from now on."""
        if self.taking and alice == self.holder:
            return
        self._end_turn()
        for role, weights in self.weights.items():
            self.sharings[role].begin_turn(weights, alice)
        self.holder, self.taking = alice, True
        self.turns.pop(alice, None)
        self.turns[alice] = None

    def end(self) -> None:
        """The round is over."""
        self._end_turn()
        for role, weights in self.weights.items():
            self.sharings[role].end_round(weights)

    def begin_evaluation(self) -> None:
        """Until `end_evaluation`, the weights are those that all agree on, if a round is going on."""
        for role, weights in self.weights.items():
            self.sharings[role].begin_evaluation(weights, self.holder)

    def end_evaluation(self) -> None:
        for role, weights in self.weights.items():
            self.sharings[role].end_evaluation(weights)

    def evaluate(self, batch: Batch) -> Iterator[tuple[Party, Batch, Tensor, Tensor]]:
        """Yield who evaluates, which rows, output and labels, on meta where the loss is held in another process.

        The last Alice who trained evaluates a batch; where bottoms are personal, each row goes through its owner's.
        Rows that nobody owns then go through everybody's, and come once for each.
        """
        for alice, rows in self.by_bottom(batch):
            output, labels, _ = self.network(rows, self.network.layout.cast(alice))
            yield alice, rows, output, labels

    def by_bottom(self, batch: Batch) -> Iterator[tuple[Party, Batch]]:
        """Yield who evaluates and which rows, with her bottom in its place."""
        if not self.personal:
            yield self.holder, batch
            return
        for i, alice in enumerate(self.schedule.takers):
            mine = batch if batch.owners is None else _rows_of(batch, batch.owners == i)
            if len(mine.ids) and alice not in self.gone:
                self._load_bottom_of(alice)
                torch.clear_autocast_cache()  # it may hold the half-precision copies of another's weights
                yield alice, mine._replace(owners=torch.full_like(mine.ids, i))

    @contextmanager
    def as_of(self, alice: Party) -> Iterator[None]:
        """The network as Alice has it at this moment: with her own bottom, where bottoms are personal."""
        if not self.personal or "alice" not in self.weights:
            yield
            return
        sharing, weights = self.sharings["alice"], self.weights["alice"]
        sharing.begin_evaluation(weights, alice)
        sharing.begin_turn(weights, alice)
        try:
            yield
        finally:
            sharing.end_evaluation(weights)

    def state_dict(self) -> dict[str, Any]:
        sharings = {role: sharing.state_dict() for role, sharing in self.sharings.items()}
        wanting = {role: list(weights.wanting) for role, weights in self.weights.items()}
        turns = {"holder": self.holder, "taking": self.taking, "num_rows": self.num_rows, "turns": list(self.turns)}
        return {**turns, "sharings": sharings, "wanting": wanting}

    def sharings_of(self, state: dict[str, Any]) -> dict[Role, Sharing]:
        """Those of a `state_dict` of a checkpoint, beside those of the run."""
        sharings = self._new_sharings()
        for role, sharing in sharings.items():
            sharing.load_state_dict(state["sharings"][role])
        return sharings

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.holder, self.taking, self.num_rows = state["holder"], state["taking"], state["num_rows"]
        self.turns, self.wanting = dict.fromkeys(state["turns"]), state["wanting"]
        for role, sharing in self.sharings.items():
            sharing.load_state_dict(state["sharings"][role])

    def leave_out(self, parties: Collection[Party]) -> None:
        """These Alices are gone for good: their mini-batches are left out, and what they had not handed over."""
        self.gone = frozenset(parties)
        self.turns = {taker: None for taker in self.turns if taker not in parties}
        if self.holder in parties:
            self.taking, self.num_rows = False, 0
            before = next(reversed(self.turns), None)
            for sharing in self.sharings.values():
                sharing.restore(before)
            self.holder = before or next(taker for taker in self.schedule.takers if taker not in parties)

    def receive_pending(self) -> None:
        """Receive what is under way, before all save their state."""
        for role, weights in self.weights.items():
            self.sharings[role].receive_pending(weights)

    def _new_sharings(self) -> dict[Role, Sharing]:
        schedule = self.schedule
        return {role: copy.deepcopy(schedule.alice if role == "alice" else schedule.bob) for role in self.weights}

    def _load_bottom_of(self, alice: Party) -> None:
        """Alice's bottom alone, for evaluation, where bottoms are personal."""
        if "alice" in self.weights:
            self.sharings["alice"].begin_turn(self.weights["alice"], alice)

    def _end_turn(self) -> None:
        if self.taking:
            for role, weights in self.weights.items():
                self.sharings[role].end_turn(weights, self.holder, self.num_rows)
        self.taking, self.num_rows = False, 0


def _rows_of(batch: Batch, which: Tensor) -> Batch:
    places = which.nonzero().flatten()
    fields = {name: field[places.to(field.device)] for name, field in batch.fields.items()}
    return batch._replace(ids=batch.ids[places], fields=fields)
