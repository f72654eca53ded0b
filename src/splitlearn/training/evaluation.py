"""A validation or a test: what the network that all agree on makes of rows that are held out."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from splitlearn.errors import DivergedError
from splitlearn.layout import Party
from splitlearn.ledger import Ledger
from splitlearn.network import Batch, SplitNetwork
from splitlearn.schedules.rounds import Rounds
from splitlearn.training.finite import cause, explained
from splitlearn.training.losses import MeanLoss
from splitlearn.training.metrics import Tally, means

Part = dict[str, Tensor | None]
"""`output`, `labels` and `owners` of the rows that one Alice has evaluated."""


class Prediction(NamedTuple):
    """The `output` [B, ...] for the rows `ids` [B] int64, their places in the data set.

    Where bottoms are personal a row is predicted by its owner's, or by everybody's if nobody owns it: `owners` [B]
    int64 are then the places among the takers of those whose bottoms they were. `output` is on meta where the last
    stage runs in another process.
    """

    ids: Tensor
    output: Tensor
    owners: Tensor | None


class Evaluation:
    """Runs the held-out rows, and adds up loss and correct answers where the loss is held.

    What crosses is counted in a `ledger` of its own, apart from that of training.
    """

    def __init__(self, network: SplitNetwork, rounds: Rounds, loss: MeanLoss) -> None:
        self.network, self.rounds, self.loss = network, rounds, loss
        self.ledger, self.trained = Ledger(), network.wire.ledger
        self.tally = Tally(loss.ignore_index)

    def begin(self) -> None:
        self.rounds.receive_pending()  # what is under way is of the training
        self.network.wire.ledger = self.ledger
        self.rounds.find()
        self.rounds.begin_evaluation()
        self.tally = Tally(self.loss.ignore_index)

    def step(self, batch: Batch, stage: str, num_steps: int) -> list[Part]:
        """Return what is held here. Raises DivergedError, behind `num_steps` of training, for a loss not finite."""
        parts: list[Part] = []
        with explained(self.network, batch, self.rounds.holder):
            for alice, rows, output, labels in self.rounds.evaluate(batch):
                if not output.is_meta:
                    parts.append(self._add(alice, rows, output, labels, f"{stage}/loss", num_steps))
        return parts

    def predict(self, batch: Batch) -> Prediction:
        """Return what is made of these rows, where the last stage runs."""
        layout = self.network.layout
        found = []
        for alice, rows in self.rounds.by_bottom(batch):
            cast = layout.cast(alice)
            output = self.network.predict(rows, cast, self.network.holder(cast))
            found.append(Prediction(rows.ids, output, rows.owners if self.rounds.personal else None))
        if len(found) == 1:
            return found[0]
        return Prediction(*(torch.cat([part[i] for part in found]) for i in range(3)))  # type: ignore[misc]

    def go_on(self) -> None:
        """Go on training."""
        self.rounds.end_evaluation()
        self.network.wire.ledger = self.trained

    def end(self) -> dict[str, Any]:
        """Go on training. Return loss and accuracy over the rows of all processes."""
        self.go_on()
        holder = self.network.layout.stages[-1].role
        return means(self.network.wire.gather_by_alice(self.tally.values(), holder))

    def _add(self, alice: Party, rows: Batch, output: Tensor, labels: Tensor, name: str, num_steps: int) -> Part:
        loss = self.loss.join([self.loss.of(output, labels, rows.number).detach()], [self.loss.weight_of(labels)])
        if not torch.isfinite(loss.total):
            told = f"{name} is {loss.value.item()} after {num_steps} mini-batches"
            raise DivergedError(f"{told}: {cause(self.network, rows, alice)}")
        self.tally.add(alice, loss, output, labels)
        return {"output": output, "labels": labels, "owners": rows.owners}
