"""Whose turn it is: every scheme is a schedule, a line of numbers and names.

scheme        turns                          alice           bob
sequential    a local epoch each             Handoff         Shared
splitfed_v1   a local epoch each             Average         Average
splitfed_v2   a local epoch each, random     Average         Shared
splitfed_v3   a local epoch each             Personal        Average
parallel      all at once, step by step      MeanGradient    MeanGradient
fedavg        a local epoch each, uncut      Average
large_batch   all at once, uncut             MeanGradient
centralised   one Alice with all data, uncut
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor

from splitlearn.errors import check_whole
from splitlearn.layout import Layout, Party
from splitlearn.schedules.aggregation import MeanGradient
from splitlearn.schedules.sharing import Handoff, Personal, Shared, Sharing
from splitlearn.seeds import derive

ORDERS = ("fixed", "random", "cyclic")
Batches = Callable[[Party, int], Sequence[Tensor]]
"""(taker, number of the pass over her rows) to the sample ids of each mini-batch of that pass."""


class Step(NamedTuple):
    """One step of training.

    `batches` are the sample ids of each Alice who takes part; with `ends_round` weights or gradients are averaged
    behind it; `finishes` are those who have no further mini-batch in this epoch.
    """

    batches: dict[Party, Tensor]
    ends_round: bool = False
    finishes: tuple[Party, ...] = ()


class Schedule:
    """Who trains when, and what happens to the weights of each role between turns.

        sequential              splitfed_v1               parallel
        alice0 | 1 2 3 |        alice0 | 1 2 3 | mean     alice0 | 1 | 2 | 3 |
        alice1       | 1 2 3 |  alice1 | 1 2 3 | mean     alice1 | 1 | 2 | 3 |

    An epoch of the trainer is one pass of every Alice who takes part over her rows (or `local_epochs` of them).

    Arguments:
        takers: who takes turns.
        alice: the sharing of the role alice; bob: of every other role.
        turn: `epoch` (all of an Alice's mini-batches of the epoch), a number of mini-batches, after which the next
            Alice has her turn, or `step` (all Alices at once, a mini-batch each). When each has had her turn, the round
            is over.
        order: of the turns: `fixed`, `random` (drawn each epoch) or `cyclic` (each epoch another Alice begins).
        local_epochs: passes over her rows of each Alice in an epoch.
        participation: the share of the Alices who take part in an epoch, drawn each time, in (0, 1]; a half counts up.
        seed: of what is drawn.
    """

    def __init__(
        self,
        takers: Sequence[Party],
        alice: Sharing | None = None,
        bob: Sharing | None = None,
        turn: int | str = "epoch",
        order: str = "fixed",
        local_epochs: int = 1,
        participation: float = 1.0,
        seed: int = 0,
    ) -> None:
        self.takers, self.turn, self.order, self.seed = tuple(takers), turn, order, seed
        self.local_epochs, self.participation = local_epochs, participation
        self.alice = Handoff() if alice is None else alice
        self.bob = Shared() if bob is None else bob
        self._check()
        self.num_participants = _half_up(participation * len(self.takers))

    def participants(self, epoch: int) -> list[Party]:
        """Return who takes part in an epoch, in the order of their turns."""
        order = list(range(len(self.takers)))
        if self.order == "random":
            order = self._draw("turns", epoch)
        elif self.order == "cyclic":
            order = order[epoch % len(order) :] + order[: epoch % len(order)]
        drawn = set(self._draw("participation", epoch)[: self.num_participants])
        return [self.takers[i] for i in order if i in drawn]

    def steps(self, epoch: int, batches: Batches) -> list[Step]:
        """Arrange the mini-batches of an epoch into steps."""
        first = epoch * self.local_epochs
        passes = range(first, first + self.local_epochs)
        mine = {taker: [ids for i in passes for ids in batches(taker, i)] for taker in self.participants(epoch)}
        size = int({"epoch": max(map(len, mine.values())), "step": 1}.get(str(self.turn), self.turn))
        turns = {taker: [ids[i : i + size] for i in range(0, len(ids), size)] for taker, ids in mine.items()}
        steps: list[dict[Party, Tensor]] = []
        ends = set()
        for round_ in zip_longest(*turns.values(), fillvalue=()):
            taking = {taker: ids for taker, ids in zip(turns, round_, strict=True) if ids}
            if self.turn == "step":
                steps.append({taker: ids for taker, (ids,) in taking.items()})
            else:
                steps += [{taker: ids} for taker, batches_ in taking.items() for ids in batches_]
            ends.add(len(steps) - 1)
        last = {taker: i for i, step in enumerate(steps) for taker in step}
        return [
            Step(step, i in ends, tuple(taker for taker in step if last[taker] == i)) for i, step in enumerate(steps)
        ]

    def check(self, layout: Layout) -> None:
        """Raises ValueError when the layout has nobody to take turns, or nobody to share the weights of."""
        if "alice" not in layout.roles and not (type(self.alice) is Handoff and type(self.bob) is Shared):
            raise ValueError(
                f"`schedule.alice` (={self.alice}) with `schedule.bob` (={self.bob}) does not fit {layout.kind}, where "
                "all Alices train at once: take schedule=sequential, or layout two_party, multi_hop or u_shaped"
            )
        if set(layout.roles) == {"alice"} and type(self.bob) is not Shared:
            raise ValueError(
                f"`schedule.bob` (={self.bob}) does not fit {layout.kind}, where there is nobody but Alice: take "
                "layout two_party, multi_hop or u_shaped, or schedule sequential, fedavg or large_batch"
            )

    @property
    def settings(self) -> dict[str, object]:
        names = ("turn", "order", "local_epochs", "participation", "alice", "bob")
        return {name: getattr(self, name) for name in names}

    def describe(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.settings.items())

    def _draw(self, *names: object) -> list[int]:
        generator = torch.Generator().manual_seed(derive(self.seed, *names))
        return torch.randperm(len(self.takers), generator=generator).tolist()

    def _check(self) -> None:
        if not self.takers:
            raise ValueError("`takers` (=()) must name at least one party")
        check_whole("schedule.local_epochs", self.local_epochs)
        if self.turn not in ("epoch", "step"):
            check_whole("schedule.turn", self.turn, ", or one of epoch and step")
        if self.order not in ORDERS:
            raise ValueError(f"`schedule.order` (={self.order}) must be one of {', '.join(ORDERS)}")
        if isinstance(self.participation, (bool, str)) or not 0 < self.participation <= 1:
            raise ValueError(f"`schedule.participation` (={self.participation}) must lie in (0, 1]: 1 is everybody")
        if _half_up(self.participation * len(self.takers)) < 1:
            raise ValueError(
                f"`schedule.participation` (={self.participation}) of {len(self.takers)} Alices rounds to nobody: "
                f"take e.g. {1 / len(self.takers):.2g}"
            )
        for role, sharing in (("alice", self.alice), ("bob", self.bob)):
            if isinstance(sharing, MeanGradient) and self.turn != "step":
                raise ValueError(f"`schedule.{role}` (={sharing}) needs `schedule.turn=step`, not {self.turn}")
        if type(self.alice) is Shared and len(self.takers) > 1:
            raise ValueError(
                f"`schedule.alice` (={self.alice}) moves no weights, and {len(self.takers)} Alices take turns: "
                "take Handoff, Average, MeanGradient or Personal, or num_alices=1"
            )
        if isinstance(self.bob, Personal):
            raise ValueError(
                f"`schedule.bob` (={self.bob}) would leave a top for each Alice, and none for anybody else: "
                "take Shared, Average or MeanGradient"
            )
        if isinstance(self.alice, Handoff) and self.turn == "step":
            raise ValueError(
                f"`schedule.turn` (=step) has all Alices train at once, and `schedule.alice` (={self.alice}) hands on: "
                "take schedule.turn=1, or schedule=parallel"
            )


def _half_up(number: float) -> int:
    return int(number + 0.5)
