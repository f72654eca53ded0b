"""Losses and correct answers, each Alice's apart, so that their sums are the same in every engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from splitlearn.errors import CURE, DivergedError
from splitlearn.layout import Party
from splitlearn.network import Batch


class EpochLoss:
    """The training loss of an epoch so far: `sums` of it over the rows by the Alice in whose turns they came.

    `last` is the latest loss. In a process that does not hold the loss the sums are missing, until they are told.
    """

    def __init__(self) -> None:
        self.sums: dict[Party, float] = {}
        self.num_rows, self.last = 0, math.nan

    @property
    def mean(self) -> float:
        """The mean over the rows; NaN where nothing is known of it."""
        return math.fsum(self.sums.values()) / self.num_rows if self.sums else math.nan

    def add(self, losses: Sequence[tuple[Party, Batch, Tensor | None]]) -> None:
        """Look at the losses of a stretch, all at once: on a GPU each look waits for it.

        Raises DivergedError for a loss that is not finite.
        """
        self.num_rows += sum(len(batch.ids) for _, batch, _ in losses)
        held = [(alice, batch, loss) for alice, batch, loss in losses if loss is not None]  # others hold the rest
        values = torch.stack([loss for *_, loss in held]).tolist() if held else []
        for (alice, batch, _), value in zip(held, values, strict=True):
            if not math.isfinite(value):
                raise DivergedError(
                    f"the loss is {value} in the turn of {alice} at epoch {batch.number[0]}, mini-batch "
                    f"{batch.number[1]}: {CURE}"
                )
            self.sums[alice] = self.sums.get(alice, 0.0) + value * len(batch.ids)
            self.last = value

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "num_rows": self.num_rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums, self.num_rows = dict(state["sums"]), state["num_rows"]


class Tally:
    """Of some rows the loss and the correct answers, each Alice's apart.

    Who holds the loss adds them up: Bob, or each Alice for herself. Sums are float32, as Lightning's own are.
    """

    def __init__(self) -> None:
        self.sums: dict[Party, list[Tensor]] = {}

    @torch.no_grad()
    def add(self, alice: Party, loss: Tensor, output: Tensor, labels: Tensor) -> None:
        """`loss` is the mean over the rows of `output` [B, classes] and `labels` [B]."""
        correct = (output.argmax(1) == labels).sum()
        new = [loss.detach().float() * len(labels), correct, torch.full_like(correct, len(labels))]
        old = self.sums.get(alice)
        self.sums[alice] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def values(self) -> dict[Party, list[float]]:
        """What JSON can hold of it."""
        return {alice: [value.item() for value in sums] for alice, sums in self.sums.items()}


def means(tallies: Iterable[Mapping[Party, list[float]]]) -> dict[str, Any]:
    """Return the mean loss and the accuracy of all the rows that processes have added up."""
    together = {alice: sums for tally in tallies for alice, sums in tally.items()}
    if not together:  # all rows are of Alices who are gone
        return {}
    loss, correct, num_rows = map(sum, zip(*(together[alice] for alice in sorted(together)), strict=True))
    return {"loss": torch.tensor(loss) / num_rows, "accuracy": torch.tensor(float(correct)) / num_rows}
