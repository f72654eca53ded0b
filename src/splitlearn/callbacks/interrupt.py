"""A signal ends the stretch at hand, and leaves a checkpoint."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from splitlearn.training.stopping import StoppedError, heeded, was_stopped_by


class Interrupt(Callback):
    """Ctrl-C, SIGTERM or SIGHUP ends the stretch or the validation at hand, saves a checkpoint and stops.

    A second one stops at once.

    Without this, one party's optimizer would have stepped and another's not.
    """

    content_with_stretches = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.asked: int | None = None  # the number of the signal
        self.before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.asked = None
        if threading.current_thread() is threading.main_thread():  # no other may listen to signals
            self.before = {number: signal.signal(number, self._ask) for number in heeded()}

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._stop(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop(trainer)
        self._restore()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self._restore()

    def _stop(self, trainer: pl.Trainer) -> None:
        if self.asked is not None:
            trainer.save_checkpoint(self.path)
            where = f"behind mini-batch {trainer.global_step}"
            cure = f"To go on from there, resume with ckpt={self.path}"
            raise StoppedError(self.asked, f"the run {was_stopped_by(self.asked)} {where}. {cure}")

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
