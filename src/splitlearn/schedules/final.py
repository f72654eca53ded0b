"""The weights that a run ends with: who has the trained ones, and how they come to everybody else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from splitlearn.layout import Party, Role
from splitlearn.schedules.rounds import Rounds
from splitlearn.schedules.sharing import Sharing
from splitlearn.wire import SERVER

FINAL = ("all", "last")


class Moment(NamedTuple):
    """The weights of each role at one moment of a run, as `RoleWeights.tensors` has them, and what sharing knows."""

    weights: Mapping[Role, Mapping[str, Tensor]]
    sharings: Mapping[Role, Sharing]


class Left(NamedTuple):
    """What a party is left with. `trained_at` has the trained weights, be it `party`; `stale`: she has them not."""

    party: Party
    role: Role
    weights: Mapping[str, Tensor]
    trained_at: Party
    stale: bool


def hand_out(rounds: Rounds, moment: Moment, final: str = "all") -> Iterator[Left]:
    """Yield what each party is left with that this process plays.

    With `final` = `all` those Alices who are behind are given the trained weights, which crosses the wire; with `last`
    they stay behind. The server has a part in this where it has what the Alices agree on.
    """
    wire = rounds.network.wire
    for role, weights in moment.weights.items():
        sharing = moment.sharings[role]
        for party in _players(rounds, role, sharing):
            # Another role than alice is played by one party, who keeps all copies at home.
            way, own = sharing.way_to(party) if role == "alice" else [party], sharing.agreed(weights, party)
            for src, dst in pairwise(way) if final == "all" else ():
                own = rounds.weights[role].carry(own, src, dst, "weights") or own  # nothing comes to another process
            if wire.plays(party):
                yield Left(party, role, own, way[0], stale=len(way) > 1 and final == "last")


def _players(rounds: Rounds, role: Role, sharing: Sharing) -> list[Party]:
    if role != "alice":
        return [role]
    present = [alice for alice in rounds.schedule.takers if alice not in rounds.gone]
    return [*present, SERVER] if sharing.at_server else present
