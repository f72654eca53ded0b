"""How many mini-batches run before Lightning looks again.

Lightning's machinery around a `training_step` costs about as much as a small network's whole step. So a training step
here runs a *stretch* of mini-batches (Keras calls it `steps_per_execution`), and Lightning's own counters are moved on
for each, so that `global_step`, `batch_idx`, `max_steps`, `val_check_interval`, the progress bar and a checkpoint in
mid-epoch count mini-batches as ever. A stretch ends wherever something wants to look: at each logging step, validation,
checkpoint, limit, after a second, and after every mini-batch when a callback listens to each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, Generic, TypeVar

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, Timer
from pytorch_lightning.utilities.model_helpers import is_overridden

T = TypeVar("T")
PER_BATCH_HOOKS = ("on_train_batch_start", "on_train_batch_end")
# These look at where training stands, not at each mini-batch; so does a callback with `content_with_stretches = True`.
CONTENT_WITH_STRETCHES = (ModelCheckpoint, Timer)
LONGEST_SECONDS = 1.0  # a bar that stands still for longer looks broken, and so does Ctrl-C


class Ahead(Generic[T]):
    """An iterator whose next item can be made ready before it is asked for."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items, self._ready = items, list[T]()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return self._ready.pop() if self._ready else next(self._items)

    def prepare(self) -> None:
        if not self._ready:
            self._ready.extend(islice(self._items, 1))


class Stretch(Generic[T]):
    """The next `length` steps of an iterator, taken one at a time. Who iterates over it sees the step at hand alone.

    Lightning does so to find the size of a batch, and a callback that listens to every mini-batch to look into it.
    """

    def __init__(self, steps: Iterator[T], length: int) -> None:
        self.length = length
        self._steps = steps
        self.at_hand = next(steps)

    def __iter__(self) -> Iterator[T]:
        yield self.at_hand

    def advance(self) -> None:
        self.at_hand = next(self._steps)


class Pace:
    """Plans stretches for one run of a trainer, and counts their mini-batches for it.

    Arguments:
        trainer: the trainer that runs.
        longest: the most mini-batches in a stretch, at least 1.
    """

    def __init__(self, trainer: pl.Trainer, longest: int) -> None:
        self.trainer = trainer
        self.loop = trainer.fit_loop.epoch_loop
        self.longest = 1 if _listens_to_each(trainer) else longest
        self.ahead: Ahead | None = None  # the steps of the epoch at hand
        self.ends: Callable[[int], bool] = lambda step: False  # whether a stretch does, behind that mini-batch

    @property
    def epoch(self) -> int:
        """The epoch whose order is trained in: to overfit, every epoch has the same few mini-batches."""
        return 0 if self.trainer.overfit_batches else self.trainer.current_epoch  # type: ignore[attr-defined]

    @property
    def done(self) -> int:
        """Mini-batches of this epoch that are trained."""
        return self.loop.batch_progress.current.ready

    @property
    def left(self) -> float:
        """Mini-batches of this epoch that are still to be trained."""
        return self.trainer.num_training_batches - self.done

    def next_length(self) -> int:
        """Return the length of the next stretch, up to the first point at which somebody looks; 0 ends the epoch."""
        trainer, step = self.trainer, self.trainer.global_step
        # Lightning counts the steps of its loggers apart; a resumed run may begin with one too few.
        self.loop._batches_that_stepped = step
        ahead = [self.longest, self.left]
        if trainer.max_steps != -1:
            ahead.append(trainer.max_steps - step)
        for callback in trainer.checkpoint_callbacks:
            ahead.append(_until(step, getattr(callback, "_every_n_train_steps", 0)))
        if trainer.loggers:
            ahead.append(_until(step, trainer.log_every_n_steps))  # type: ignore[attr-defined]
        if trainer.enable_validation and isinstance(trainer.val_check_batch, int):
            across_epochs = trainer.check_val_every_n_epoch is None
            ahead.append(_until(self.loop.total_batch_idx + 1 if across_epochs else self.done, trainer.val_check_batch))
        return max(0, int(min(ahead)))

    def prepare(self) -> None:
        """Make the next step ready, if it is to be trained: called where there is time, while others compute."""
        if self.ahead is not None and self.left > 0 and self.trainer.global_step + 1 != self.trainer.max_steps:
            self.ahead.prepare()

    def run(self, stretch: Stretch[T]) -> Iterator[T]:
        """Yield the steps of a stretch; Lightning counts the first itself. Ends early when the trainer is to stop."""
        progress, steps_done = self.loop.batch_progress, self.loop.manual_optimization.optim_step_progress
        results = self.loop._results
        last, deadline = self.done + self.left, time.monotonic() + LONGEST_SECONDS
        for i in range(stretch.length):
            if i:
                stretch.advance()
                progress.increment_by(1)
                self.loop._batches_that_stepped += 1
                results.batch, results.batch_size = stretch, None  # as Lightning's on_batch_start has it
            progress.is_last_batch = progress.current.ready == last
            steps_done.increment_ready()
            yield stretch.at_hand
            steps_done.increment_completed()
            if self.ends(self.trainer.global_step) or self.trainer.should_stop or time.monotonic() > deadline:
                return


def go_on(fit_loop: dict[str, Any], left: float) -> None:
    """Change the state of Lightning's loops in a checkpoint so that a resumed run leaves out and repeats nothing.

    By itself Lightning leaves out the validation that was due after the mini-batch behind which it saved, and after
    the last one also the end of the epoch; under `max_steps` it ends an epoch twice behind which it saved. An epoch
    that a limit broke off, with mini-batches `left`, goes on where it was.
    """
    epoch, batch = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    ended = epoch["current"]["processed"] == epoch["current"]["started"]
    halfway = batch["current"]["processed"] > 0 and (not ended or left > 0)
    just_trained = batch["current"]["completed"] < batch["current"]["processed"]
    for count in (epoch["current"], epoch["total"]):
        count["processed"] = count["completed"] = count["started"] - halfway
    for count in (batch["current"], batch["total"]):
        count["completed"] = count["processed"]
    if not halfway:
        batch["current"] = dict.fromkeys(batch["current"], 0)
        batch["is_last_batch"] = False
    if just_trained:
        # A validation whose first batch has begun is what Lightning runs again, if it is due.
        validation = fit_loop["epoch_loop.val_loop.batch_progress"]
        validation["current"] = dict.fromkeys(validation["current"], 0)
        validation["total"] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def _until(position: int, every: int) -> float:
    """Return how far it is from `position` to the next multiple of `every`; 0 means never."""
    return every - position % every if every else float("inf")


def _listens_to_each(trainer: pl.Trainer) -> bool:
    module = trainer.lightning_module
    listeners: list[tuple[Any, type]] = [(module, pl.LightningModule)]
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if not getattr(callback, "content_with_stretches", False):
            kind = next((kind for kind in CONTENT_WITH_STRETCHES if isinstance(callback, kind)), Callback)
            listeners.append((callback, kind))
    return any(is_overridden(hook, listener, kind) for listener, kind in listeners for hook in PER_BATCH_HOOKS)
