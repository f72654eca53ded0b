"""How well each Alice is served."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from splitlearn.layout import Party

FEW = 10  # up to so many Alices are reported one by one


def judged(output: Tensor, labels: Tensor, ignore_index: int | None = None) -> tuple[Tensor, Tensor]:
    """Which rows [B] of `output` [B, classes] are right, and which count: those of the label `ignore_index` do not."""
    counted = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    return (output.argmax(1) == labels) & counted, counted


class AccuracyByOwner(Metric):
    """The accuracy on each party's own rows.

    Arguments:
        owners: the parties, in the order of the numbers that `update` is given.
        ignore_index: a label whose rows are left out, as in the loss.
    """

    correct: Tensor
    total: Tensor

    def __init__(self, owners: Sequence[Party], ignore_index: int | None = None) -> None:
        super().__init__(sync_on_compute=False)
        self.owners, self.ignore_index = tuple(owners), ignore_index
        for state in ("correct", "total"):
            self.add_state(state, torch.zeros(len(owners), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, output: Tensor, labels: Tensor, owners: Tensor) -> None:
        """`output` [B, classes] belongs to `labels` [B] and the parties `owners` [B]."""
        owners = owners.to(self.total.device)
        right, counted = (rows.to(self.total.device) for rows in judged(output, labels, self.ignore_index))
        self.total += torch.bincount(owners[counted], minlength=len(self.owners))
        self.correct += torch.bincount(owners[right], minlength=len(self.owners))

    def counts(self) -> list[list[int]]:
        """Return correct rows and all rows by owner, as JSON can hold them."""
        return [self.correct.tolist(), self.total.tolist()]

    def load(self, counts: Sequence[list[list[int]]]) -> None:
        """Take the sum of what several have counted."""
        self.correct, self.total = torch.tensor(counts).sum(0)
        self._update_count += 1  # torchmetrics warns where nothing was counted

    def compute(self) -> dict[str, Tensor]:
        """Return the accuracy of each party that has rows, if they are few, and the lowest of all as `worst`."""
        having = self.total > 0
        accuracy = self.correct / self.total.clamp(min=1)
        if having.sum() < 2:
            return {}
        named = {f"/{owner}": value for owner, value, has in zip(self.owners, accuracy, having, strict=True) if has}
        return {**(named if len(self.owners) <= FEW else {}), "_worst": accuracy[having].min()}
