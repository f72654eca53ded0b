"""The order in which rows are trained on: a function of (seed, taker, epoch), so that a run can go on in the middle."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

import torch
from pytorch_lightning.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from splitlearn.data.rows import Fields, Rows
from splitlearn.layout import Party
from splitlearn.network import Batch
from splitlearn.schedules.schedule import Schedule, Step
from splitlearn.seeds import derive
from splitlearn.training.pace import Ahead, Pace, Stretch

LOOKED_AT = 100  # epochs, to see who never has a turn

Augment = Callable[[Tensor, torch.Generator], Tensor]


class Turns(NamedTuple):
    """A `schedule.Step` with its rows: the mini-batch of each Alice who takes part in it."""

    batches: dict[Party, Batch]
    ends_round: bool
    finishes: tuple[Party, ...]


class TurnLoader:
    """The training data of one epoch after the other, in stretches of steps.

    Its length is the number of steps in an epoch, though it yields them several at a time: `Pace` counts them.
    It has no state: where an epoch goes on follows from the trainer's own count of mini-batches.

    Arguments:
        rows: the data set; shards: the row indices of each taker; batch_size: rows in a mini-batch, the last is short.
        schedule: arranges the takers' mini-batches into steps; pace: the trainer's.
        augment: batch to batch, e.g. `splitlearn.data.augment.crop_and_flip`.
    """

    def __init__(
        self,
        rows: Rows,
        shards: Mapping[Party, Tensor],
        schedule: Schedule,
        pace: Pace,
        batch_size: int,
        seed: int = 0,
        augment: Augment | None = None,
    ) -> None:
        self.rows, self.shards, self.schedule, self.pace = rows, shards, schedule, pace
        self.batch_size, self.seed, self.augment = batch_size, seed, augment

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Stretch[Turns]]:
        if self.pace.trainer.global_step == 0 and (idle := self.idle()):
            cure = "raise `trainer.limit_train_batches`, `overfit_batches` or `max_steps`, or take schedule.turn=1"
            rank_zero_warn(
                f"{', '.join(idle)} will not train, since the trainer's limits come before their turn: {cure}"
            )
        self.pace.ahead = steps = Ahead(self._turns(self.pace.trainer.current_epoch, self.pace.done))
        try:
            while length := self.pace.next_length():
                yield Stretch(steps, length)
        finally:
            self.pace.ahead = None  # or the workers that read for it would live on

    def steps(self, epoch: int) -> list[Step]:
        """Return the steps of an epoch as row indices: each pass over a shard in its own order, every row once."""
        return self.schedule.steps(epoch, self._batches)

    def idle(self) -> list[Party]:
        """Return who takes part, but has no mini-batch before the trainer's limits end each of the epochs."""
        trainer = self.pace.trainer
        left = math.inf if trainer.max_steps == -1 else trainer.max_steps
        limited = left < math.inf or trainer.limit_train_batches != 1.0 or isinstance(trainer.limit_train_batches, int)
        asked = trainer.max_epochs or -1
        epochs = min(LOOKED_AT, asked) if asked > 0 else LOOKED_AT
        overfit = trainer.overfit_batches  # type: ignore[attr-defined]
        take_part, train = set[Party](), set[Party]()
        for epoch in range(epochs if limited else 0):
            steps = self.schedule.steps(0 if overfit else epoch, self._in_order)
            take_part |= {taker for step in steps for taker in step.batches}
            steps = steps[: int(min(trainer.num_training_batches, left))]
            train |= {taker for step in steps for taker in step.batches}
            left -= len(steps)
            if left <= 0 or len(train) == len(self.shards):
                break
        return [taker for taker in self.shards if taker in take_part - train]

    # Lightning asks for these two before it believes that a loader can go on in mid-epoch.
    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _turns(self, epoch: int, start: int) -> Iterator[Turns]:
        steps = self.steps(self.pace.epoch)
        place = sum(len(step.batches) for step in steps[:start])
        passes = islice(self._passes(epoch, steps), place, None)
        steps = steps[start:]
        device = self.pace.trainer.strategy.root_device
        rows = self.rows.stream((ids for step in steps for ids in step.batches.values()), device, passes)
        for step in steps:
            batches = {}
            for taker, ids in step.batches.items():
                number = (epoch, place)
                batches[taker] = Batch(ids, self._augmented(next(rows), number), number)
                place += 1
            yield Turns(batches, step.ends_round, step.finishes)

    def _passes(self, epoch: int, steps: Sequence[Step]) -> Iterator[int]:
        """Which pass over the taker's rows each mini-batch of these steps belongs to, counted from the first epoch."""
        read = Counter[Party]()
        for step in steps:
            for taker, ids in step.batches.items():
                yield epoch * self.schedule.local_epochs + read[taker] // len(self.shards[taker])
                read[taker] += len(ids)

    @cached_property
    def _length(self) -> int:
        """The same for all epochs; where it depends on who takes part, Lightning asks for a loader anew each epoch."""
        return len(self.schedule.steps(self.pace.epoch, self._in_order))

    def _in_order(self, taker: Party, number: int) -> Sequence[Tensor]:
        return self.shards[taker].split(self.batch_size)

    def _batches(self, taker: Party, number: int) -> Sequence[Tensor]:
        shard = self.shards[taker]
        generator = torch.Generator().manual_seed(derive(self.seed, "order", taker, number))
        return shard[torch.randperm(len(shard), generator=generator)].split(self.batch_size)

    def _augmented(self, fields: Fields, number: tuple[int, int]) -> Fields:
        if self.augment is None or "x" not in fields:
            return fields
        generator = torch.Generator().manual_seed(derive(self.seed, "augment", *number))
        return {**fields, "x": self.augment(fields["x"], generator)}


class EvalLoader:
    """The given rows in order, in mini-batches of `batch_size`; `owners` [N] int64 are those of all rows, if known."""

    def __init__(
        self, rows: Rows, ids: Tensor, batch_size: int, device: torch.device, owners: Tensor | None = None
    ) -> None:
        self.rows, self.batches, self.device, self.owners = rows, ids.split(batch_size), device, owners

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for i, (ids, fields) in enumerate(zip(self.batches, self.rows.stream(self.batches, self.device), strict=True)):
            yield Batch(ids, fields, (0, i), None if self.owners is None else self.owners[ids])
