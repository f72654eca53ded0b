"""How many mini-batches run before Lightning looks again.

Lightning's machinery around a `training_step` costs about as much as a small network's whole step. So a training step
here runs a *stretch* of mini-batches (Keras calls it `steps_per_execution`), and Lightning's own counters are moved on
for each, so that `global_step`, `batch_idx`, `max_steps`, `val_check_interval`, the progress bar and a checkpoint in
mid-epoch count mini-batches as ever. A stretch ends wherever something wants to look: at each logging step, validation,
checkpoint, limit, and after every mini-batch when a callback listens to each.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Generic, TypeVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, ProgressBar, Timer
from pytorch_lightning.utilities.model_helpers import is_overridden

T = TypeVar("T")
PER_BATCH_HOOKS = ("on_train_batch_start", "on_train_batch_end")
# These look at where training stands, not at each mini-batch.
CONTENT_WITH_STRETCHES = (ModelCheckpoint, ProgressBar, Timer)


class Stretch(Generic[T]):
    """The next `length` steps of an iterator, computed as they are used. Iterate it once."""

    def __init__(self, steps: Iterator[T], length: int) -> None:
        self._length = length
        # A callback that listens to every mini-batch gets stretches of one, and may look into them.
        self._steps = list(islice(steps, length)) if length == 1 else islice(steps, length)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[T]:
        return iter(self._steps)


class Pace:
    """Plans stretches for one run of a trainer, and counts their mini-batches for it.

    Arguments:
        trainer: the trainer that runs.
        longest: the most mini-batches in a stretch, at least 1.
    """

    def __init__(self, trainer: pl.Trainer, longest: int) -> None:
        self.trainer = trainer
        self.longest = 1 if _listens_to_each(trainer) else longest

    @property
    def done(self) -> int:
        """Mini-batches of this epoch that are trained."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def next_length(self) -> int:
        """Return the length of the next stretch: up to the first point at which somebody looks."""
        trainer, step = self.trainer, self.trainer.global_step
        ahead = [self.longest, int(trainer.num_training_batches) - self.done]
        if trainer.max_steps != -1:
            ahead.append(trainer.max_steps - step)
        for callback in trainer.checkpoint_callbacks:
            ahead.append(_until(step, getattr(callback, "_every_n_train_steps", 0)))
        if trainer.loggers:
            ahead.append(_until(trainer.fit_loop.epoch_loop._batches_that_stepped, trainer.log_every_n_steps))
        if trainer.enable_validation and isinstance(trainer.val_check_batch, int):
            across_epochs = trainer.check_val_every_n_epoch is None
            counted = trainer.fit_loop.total_batch_idx + 1 if across_epochs else self.done
            ahead.append(_until(counted, trainer.val_check_batch))
        return max(1, min(ahead))

    def run(self, stretch: Stretch[T]) -> Iterator[T]:
        """Yield the steps of a stretch; Lightning counts the first itself. Ends early when the trainer is to stop."""
        loop = self.trainer.fit_loop.epoch_loop
        steps_done = loop.manual_optimization.optim_step_progress
        for i, step in enumerate(stretch):
            if i:
                if self.trainer.should_stop:
                    return
                _count(loop.batch_progress)
                loop._batches_that_stepped += 1
            steps_done.increment_ready()
            yield step
            steps_done.increment_completed()


def _count(progress: pl.loops.progress._BatchProgress) -> None:
    progress.increment_ready()
    progress.increment_started()
    progress.increment_processed()
    progress.increment_completed()


def _until(position: int, every: int) -> float:
    """Return how far it is from `position` to the next multiple of `every`; 0 means never."""
    return every - position % every if every else float("inf")


def _listens_to_each(trainer: pl.Trainer) -> bool:
    module = trainer.lightning_module
    if any(is_overridden(hook, module, pl.LightningModule) for hook in PER_BATCH_HOOKS):
        return True
    return any(
        is_overridden(hook, callback, Callback)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if not isinstance(callback, CONTENT_WITH_STRETCHES) and not getattr(callback, "content_with_stretches", False)
        for hook in PER_BATCH_HOOKS
    )
