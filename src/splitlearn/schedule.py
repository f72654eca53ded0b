"""Whose turn it is, and what happens to weights between turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from splitlearn.layout import Party
from splitlearn.sharing import Handoff, Sharing

Step = dict[Party, Tensor]
"""One step: the sample ids of the mini-batch of each Alice who takes part in it."""


class Sequential:
    """One Alice after the other trains a local epoch, then hands her bottom on (Gupta & Raskar 2018, algorithm 2).

        alice0 | a a a a |- weights ->
        alice1           | b b b b |- weights ->
        bob    | 1 2 3 4 | 5 6 7 8 |

    Arguments:
        takers: who takes turns, in order.
        alice: the sharing of the role alice. Every other role is shared: one party plays it all the time.
    """

    def __init__(self, takers: Sequence[Party], alice: Sharing | None = None) -> None:
        if not takers:
            raise ValueError("`takers` (=()) must name at least one party")
        self.takers = tuple(takers)
        self.alice = alice if alice is not None else Handoff()
        self.holder = self.takers[0]

    def steps(self, batches: Mapping[Party, Sequence[Tensor]]) -> list[Step]:
        """Arrange an epoch's mini-batches, given as sample ids per taker, into steps."""
        return [{taker: ids} for taker in self.takers for ids in batches[taker]]

    def state_dict(self) -> dict[str, Any]:
        return {"holder": self.holder, "alice": self.alice.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.holder = state["holder"]
        self.alice.load_state_dict(state["alice"])
