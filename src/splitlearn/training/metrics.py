"""Losses and correct answers, each Alice's apart, so that their sums are the same in every engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from splitlearn.errors import DivergedError
from splitlearn.layout import Party
from splitlearn.network import Batch
from splitlearn.training.accuracy import judged
from splitlearn.training.losses import Loss


class EpochLoss:
    """The training loss of an epoch so far: by the Alice in whose turns it came, its total and what that is divided by.

    `last` is the latest loss. In a process that does not hold the loss the sums are missing, until they are told.

    Arguments:
        cause: tells of an Alice and her mini-batch why their loss is not finite.
    """

    def __init__(self, cause: Callable[[Party, Batch], str]) -> None:
        self.cause = cause
        self.sums: dict[Party, list[float]] = {}
        self.last = math.nan
        self.new: list[tuple[Party, Batch, Loss]] = []  # not looked at yet

    @property
    def mean(self) -> float:
        """The mean over what the loss divides by; NaN where nothing is known of it."""
        weight = math.fsum(weight for _, weight in self.sums.values())
        return math.fsum(total for total, _ in self.sums.values()) / weight if weight else math.nan

    def add(self, alice: Party, batch: Batch, loss: Loss) -> None:
        """Look at a loss, before anybody's weights are changed by it; on a GPU, where to look is to wait, keep it.

        Raises DivergedError for a loss that is not finite.
        """
        self.new.append((alice, batch, loss))
        if not loss.value.is_cuda:
            self.look()

    def look(self) -> None:
        """Look at what was kept, all at once. Raises DivergedError for a loss that is not finite."""
        new, self.new = self.new, []
        values = torch.stack([loss.value for *_, loss in new]).tolist() if new else []
        for (alice, batch, loss), value in zip(new, values, strict=True):
            weight = float(loss.weight)
            if not math.isfinite(value):
                where = f"in the turn of {alice} at epoch {batch.number[0]}, mini-batch {batch.number[1]}"
                if weight == 0:
                    raise DivergedError(
                        f"the loss is {value} {where}, all labels of which weigh nothing: leave these rows out, take "
                        "larger mini-batches, or weigh every class in `loss.weight`"
                    )
                raise DivergedError(f"the loss is {value} {where}: {self.cause(alice, batch)}")
            total, before = self.sums.get(alice, (0.0, 0.0))
            self.sums[alice] = [total + (value if loss.total is loss.value else value * weight), before + weight]
            self.last = value

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums = dict(state["sums"])


class Tally:
    """Of some rows the loss and the correct answers, each Alice's apart.

    Who holds the loss adds them up: Bob, or each Alice for herself. Sums are float32, as Lightning's own are.

    Arguments:
        ignore_index: a label whose rows are neither right nor wrong, as they are none of the loss.
    """

    def __init__(self, ignore_index: int | None = None) -> None:
        self.ignore_index = ignore_index
        self.sums: dict[Party, list[Tensor]] = {}

    @torch.no_grad()
    def add(self, alice: Party, loss: Loss, output: Tensor, labels: Tensor) -> None:
        """`loss` is that of the rows of `output` [B, classes] and `labels` [B]."""
        correct, num_rows = (rows.sum() for rows in judged(output, labels, self.ignore_index))
        weight = torch.as_tensor(loss.weight, device=correct.device)
        new = [loss.total.float(), weight, correct, num_rows]
        old = self.sums.get(alice)
        self.sums[alice] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def values(self) -> dict[Party, list[float]]:
        """What JSON can hold of it."""
        return {alice: [value.item() for value in sums] for alice, sums in self.sums.items()}


def means(together: Mapping[Party, list[float]]) -> dict[str, Any]:
    """Return the mean loss and the accuracy of all the rows of each Alice that processes have added up.

    The accuracy of no rows is NaN.
    """
    if not together:  # all rows are of Alices who are gone
        return {}
    loss, weight, correct, num_rows = map(sum, zip(*(together[alice] for alice in sorted(together)), strict=True))
    return {"loss": torch.tensor(loss) / weight, "accuracy": torch.tensor(float(correct)) / num_rows}
